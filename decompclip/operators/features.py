"""Features of a sparse autoencoder: spliced into the tower, their direct effects, their ablation and the images that show them most.

    sae = load_sae("clip-b-32-layer-9-mlp-out/")                            SAELens' or Prisma's files
    terms = feature_terms(model, sae, images)                               features, bias and error sum to mlps[9], exactly
    attribute(d, "a dog", features=terms, model=model)                      which features move images toward a text
    with model.hooks(AblateFeatures(sae, features[[5, 7]])): ...            without two features
    top_images(model, sae, images, features[[5, 7]]).figure()               where they are most active

What an autoencoder misses is kept as an error, so that nothing changes that is not asked for. A direct effect is what of an
activation reaches the feature through the stream alone, at the last LayerNorm's scale. For what a component writes that is the
component's term; for a stream (`hook_resid_post` of a block) it is the terms of all that was written so far, and what later
layers make of it is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from decompclip.api import check_count
from decompclip.data.pixels import bytes_of
from decompclip.decomposition.components import Components, features, resolve
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.maps import Convention, frozen, full_precision, pieces, temporary, wide
from decompclip.decomposition.terms import Rows, pooled_rows
from decompclip.display import Result
from decompclip.models.sae import Site, SparseAutoencoder
from decompclip.operators.ablation import TokenChoice, check_rows, fit_rows, show_rows, token_mask
from decompclip.operators.inputs import Images, image_batches
from decompclip.operators.intervention import Chosen, Intervention, Where
from decompclip.operators.neurons import FineTerms
from decompclip.operators.parts import image_names
from decompclip.tower.vit import HasTower, Hook, HookedViT, tower

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from decompclip.models.clip import HookedCLIP

Edit = Callable[[Float[Tensor, "batch row feature"]], Float[Tensor, "batch row feature"]]

PICTURED = 32
"""Features up to this number have their pictures kept."""


@dataclass(frozen=True, eq=False)
class Splice:
    """An autoencoder put into the tower: `with model.hooks(Splice(sae)):`.

    Attributes:
        sae: of one of the tower's hook points.
        edit: what to make of the features' activations, all of them, in their shape; None leaves them.
        error: whether to keep what the autoencoder misses. With it an edit that changes nothing leaves the activations as they
            are, to the last bit; without it the tower runs on what the autoencoder makes of its activations.
    """

    sae: SparseAutoencoder
    edit: Edit | None = None
    _: KW_ONLY
    error: bool = True

    def fwd_hooks(self, visual: HookedViT) -> list[Hook]:
        """The hook, which raises ValueError where the edit gives something else than activations.

        Args:
            visual: the tower that is to run with it.

        Raises:
            ValueError: the autoencoder is of another width or hook point.
        """
        _site(self.sae, visual)
        sae = self.sae.to(visual.device)
        read = _read_rows(sae, visual)

        def run(x: Tensor, hook: Any) -> Tensor | None:
            if self.edit is None and self.error:
                return None
            rows = wide(x.flatten(2))  # the heads of a token stand side by side
            code = sae.read(rows)
            acts = code.acts if self.edit is None else self.edit(code.acts)
            if not isinstance(acts, Tensor) or acts.shape != code.acts.shape:
                found = list(acts.shape) if isinstance(acts, Tensor) else type(acts).__name__
                raise ValueError(
                    f"expected an edit that gives activations {list(code.acts.shape)}, as it gets them; received {found}; return all"
                )
            new = code._replace(acts=acts)
            with full_precision(rows):
                if self.error:
                    made = rows + ((new.acts - code.acts) @ sae.W_dec * code.scale).to(rows)
                else:
                    made = sae.write(new).to(rows)
            here = fit_rows(read, x.shape[1], visual.cfg.pooled_rows, axis=-1)
            return torch.where(here[:, None], made, rows).view(x.shape).to(x)

        return [(sae.hook, run)]


def _site(sae: SparseAutoencoder, visual: HookedViT) -> Site:
    """Where in the tower it reads. Raises ValueError as `SparseAutoencoder.site`, and for what is none."""
    if not isinstance(sae, SparseAutoencoder):
        raise ValueError(f"expected a SparseAutoencoder; received {sae!r}; open files with load_sae")
    return sae.site(visual)


def _read_rows(sae: SparseAutoencoder, visual: HookedViT) -> Bool[Tensor, " token"]:
    """Which tokens the autoencoder reads."""
    tokens: dict[str, TokenChoice] = {"all": "all", "class": (0,), "patches": "patches"}
    return token_mask(tokens[sae.tokens], visual.cfg.n_tokens, visual.cfg).to(visual.device)


def _finite(x: Tensor, what: str) -> Tensor:
    if not x.isfinite().all():
        raise ValueError(f"expected finite {what}; received nan or inf; check the images, and run in fp32")
    return x


def _chosen(components: Components, sae: SparseAutoencoder, visual: HookedViT) -> Int[Tensor, " feature"]:
    """The features that an expression names, in rising order."""
    mask = resolve(components, visual, features=len(sae))
    if not mask.features.any() or mask.flat.any():
        raise ValueError(f"expected features alone; received {components!r}; for instance features[[5, 7]]")
    return mask.features.nonzero()[:, 0]


@dataclass(frozen=True, eq=False, repr=False)
class FeatureTerms(FineTerms):
    """Terms of features of a sparse autoencoder, for a batch of images.

    The terms of all features, `bias` and `error` sum to the terms of `of` (and the constants that these write).

    Attributes:
        of: the components whose sum the autoencoder's activations are.
        unit: what coordinates would be, were an activation one at every token.
        bias: terms of the decoder's bias, and of the means of normalised activations.
        error: terms of what the autoencoder misses, and of tokens that it does not read.
        hook: of the autoencoder.
        sae: its digest.
    """

    of: Components
    unit: Float[Tensor, "batch pool_head"]
    bias: Float[Tensor, "batch d_embed"]
    error: Float[Tensor, "batch d_embed"]
    hook: str
    sae: str

    what = "feature"
    of_images = ("coords", "unit", "bias", "error")

    @property
    def labels(self) -> list[str]:
        return [str(features[i]) for i in self.index.tolist()]

    def to_frame(self) -> pd.DataFrame:
        """One row a feature, then "bias" and "error": length of its term (mean over images), the largest, and the share of
        images in which the feature is active where they are pooled."""
        import pandas as pd

        others = torch.stack([self.bias, self.error], dim=1).norm(dim=-1)
        lengths = torch.cat([self.lengths, others], dim=1).cpu()
        active = (self.coords != 0).any(1).double().mean(0).tolist()
        return pd.DataFrame(
            {
                "part": [*self.labels, "bias", "error"],
                "feature": pd.array([*self.index.tolist(), None, None]),
                "length": lengths.mean(0).numpy(),
                "largest": lengths.amax(0).numpy(),
                "active": [*active, 1.0, 1.0],
            }
        )


@torch.no_grad()
def feature_terms(
    model: HookedViT | HasTower,
    sae: SparseAutoencoder,
    images: Float[Tensor, "batch 3 h w"],
    chosen: Components = features,
    *,
    convention: Convention = "centred",
    normalize: bool = False,
) -> FeatureTerms:
    """The direct effects of features, from one forward pass.

    Args:
        model: the tower, or a model with one.
        sae: of one of its hook points.
        images: a batch as the tower takes it.
        chosen: such as `features[[5, 7]]`; by default all.
        convention: of the terms, as `decompose` has it.
        normalize: whether they are those of unit features.

    Returns:
        The terms, feature by feature; bias and error are the whole autoencoder's.

    Raises:
        IndexError: a feature that the autoencoder does not have.
        ValueError: the autoencoder is of another width or hook point, of one that is no part of the stream, or of tokens
            that are not pooled; no images, or activations that are not finite; the expression names something else than features.
    """
    visual = tower(model)
    site, cfg, digest = _site(sae, visual), visual.cfg, sae.digest
    if not site.written:
        raise ValueError(
            f"expected an autoencoder of what is written to the stream, whose features have a direct effect; received {sae!r}; "
            "ablate its features causally, `model.hooks(AblateFeatures(...))`"
        )
    if not len(images):
        raise ValueError("expected at least one image; received none; check the image source")
    index = _chosen(chosen, sae, visual)
    read = _read_rows(sae, visual)[cfg.pooled_rows]
    if not read.any():
        raise ValueError(
            f"expected an autoencoder of tokens that the feature is read from; received {sae!r}, for a tower with "
            f"pool={cfg.pool!r}; ablate its features causally"
        )
    seen: list[Tensor] = []
    pooled = Rows(visual, with_mean=False)
    ends = [(name, see) for name, see in pooled.hooks() if not str(name).startswith("blocks.")]
    keep: Hook = (sae.hook, lambda x, hook: seen.append(wide(pooled_rows(cfg, x)).clone()))
    with visual.hooks(fwd_hooks=[*ends, keep]):
        feature = _finite(wide(visual(images)), "features")
    length = feature.norm(dim=-1) if normalize else feature.new_ones(len(feature))
    sae, x = sae.to(visual.device), _finite(seen[0], f"activations at {sae.hook}")
    weights = pooled.weights / length[:, None, None]
    if weights.shape[-1] != x.shape[1]:  # the mean of rows over one scale
        weights = weights.expand(-1, -1, x.shape[1]) / x.shape[1]
    own, coords, units, means = weights * read.to(weights), [], [], []
    fixed, W_dec = frozen(visual, convention), sae.W_dec.to(own)
    with full_precision(x):
        for piece in pieces(len(x), x.shape[1] * len(sae) * 8, temporary(x.device)):
            code = sae.read(x[piece])
            scaled = own[piece] * code.scale.mT.to(own)
            coords.append(scaled @ code.acts.to(own))
            units.append(scaled.sum(-1))
            means.append((own[piece] @ code.mean.to(own))[..., 0])
        every, unit, mean = torch.cat(coords), torch.cat(units), torch.cat(means)
        bias = unit[..., None] * sae.b_dec.to(own) + mean[..., None]
        error = weights @ x - every @ W_dec - bias
        of_bias, of_error = (
            fixed.read.finish(torch.einsum("bqd,qdp->bqp", y, fixed.into)) for y in (bias, error)
        )
        index = index.to(x.device)
        maps = torch.einsum("jd,qdp->qjp", W_dec[index], fixed.into)
        maps = maps if fixed.read.out is None else maps @ fixed.read.out
    return FeatureTerms(
        index=index,
        coords=every[..., index],
        maps=maps,
        convention=convention,
        normalized=normalize,
        model=fixed.maps.fingerprint,
        of=site.components,
        unit=unit,
        bias=of_bias,
        error=of_error,
        hook=sae.hook,
        sae=digest,
    )


@dataclass(frozen=True, eq=False, repr=False)
class AblateFeatures(Intervention):
    """Features of a sparse autoencoder silenced, or set to activations of your own; its error is kept.

        AblateFeatures(sae, features[[5, 7]])                                             causal
        AblateFeatures(sae, features[5], fill=top_images(...).mean)                       to their means
        AblateFeatures(sae, features[5], terms=feature_terms(model, sae, images, features[5]))   direct, on these images

    `where` has no place for features: an image is edited where its mask names all components that the autoencoder's
    activations belong to.

    Attributes:
        components: which features.
        fill: their activations, in rising order; None silences them.
        terms: of the images that are edited and the same features, which direct mode needs.
        rows: which tokens a causal edit reaches.
    """

    sae: SparseAutoencoder
    components: Components
    _: KW_ONLY
    fill: Float[Tensor, " feature"] | None = None
    terms: FeatureTerms | None = None
    rows: TokenChoice = "all"

    def __post_init__(self) -> None:
        check_rows(self.rows)

    def _filled(self, count: int) -> Float[Tensor, " feature"]:
        if self.fill is None:
            return torch.zeros(count)
        if (
            not isinstance(self.fill, Tensor)
            or list(self.fill.shape) != [count]
            or not self.fill.isfinite().all()
        ):
            raise ValueError(
                f"expected a fill of {count} features, {self.components!r}: finite numbers in a tensor [{count}]; received "
                f"{self.fill!r}; give one a feature, in rising order"
            )
        return self.fill

    def __call__(self, d: Decomposition, *, where: Where | None = None) -> Decomposition:
        terms = self.terms
        if terms is None:
            raise ValueError(
                "expected the features' terms, which a decomposition does not keep; received none; pass "
                f"terms=feature_terms(model, sae, images, {self.components!r}) of the same images"
            )
        terms.check(d)
        if terms.sae != self.sae.digest:
            raise ValueError(
                f"expected terms of {self.sae!r}; received terms of another autoencoder, of {terms.hook}; make them with the "
                "same autoencoder, in the same precision"
            )
        mask, named = resolve(terms.of, d), resolve(self.components, d, features=len(self.sae)).features
        if not torch.equal(named.nonzero()[:, 0], terms.index.cpu()):
            raise ValueError(
                f"expected terms of {self.components!r}; received {terms!r} of others; make them with the same expression"
            )
        if mask.heads.any():  # else it is one term
            raise ValueError(
                f"expected features of one MLP or of the embedding, whose term can be edited; received those of {terms.of!r}, "
                "a sum of terms; take attribute(d, toward, features=terms), or ablate causally"
            )
        (part,) = mask.singles
        fill = self._filled(len(terms.index)).to(terms.coords)
        change = torch.einsum("bqj,qjd->bd", terms.unit[..., None] * fill - terms.coords, terms.maps)
        change = (change * _images(mask, where, len(d)).to(change)[:, None]).to(d.embed)
        if part.kind == "embed":
            return d.edit(embed=d.embed + change)
        edited = d.mlps.clone()
        edited[:, part.layer] += change
        return d.edit(mlps=edited)

    def fwd_hooks(self, visual: HookedViT, *, where: Where | None = None) -> list[Hook]:
        site, cfg = _site(self.sae, visual), visual.cfg
        index = _chosen(self.components, self.sae, visual).to(visual.device)
        fill = self._filled(len(index)).to(visual.device)
        mask = resolve(site.components, visual)
        tokens = token_mask(self.rows, cfg.n_tokens, cfg).to(visual.device)

        def silence(acts: Tensor) -> Tensor:
            here = fit_rows(tokens, acts.shape[1], cfg.pooled_rows, axis=-1)
            at = _images(mask, where, len(acts)).to(acts.device)[:, None] & here
            return acts.index_copy(-1, index, torch.where(at[..., None], fill.to(acts), acts[..., index]))

        return Splice(self.sae, silence).fwd_hooks(visual)

    def __repr__(self) -> str:
        fill = "" if self.fill is None else ", filled"
        return f"AblateFeatures({self.sae!r}, {self.components!r}{fill}{show_rows(self.rows)})"


def _images(mask: Any, where: Where | None, batch: int) -> Bool[Tensor, " #batch"]:
    """The images in which all components of a mask may be edited."""
    at = Chosen.of(mask, where, batch)
    count = at.heads.sum((1, 2)) + at.mlps.sum(1) + at.embed.long()  # no autoencoder is of the pool's MLP
    return count == mask.flat.sum()


@dataclass(frozen=True, eq=False, repr=False)
class TopImages(Result):
    """The images in which each feature is most active, and how often it is.

    Attributes:
        index: which features.
        activation: the largest of an image, the images with the largest first.
        images, tokens: where these are.
        mean: over all images and tokens that the autoencoder reads.
        active: share of images with the feature active in some token.
        names: of all images.
        pictures: of those found; None for bare towers, and for more than 32 features.
    """

    index: Int[Tensor, " feature"]
    activation: Float[Tensor, "feature k"]
    images: Int[Tensor, "feature k"]
    tokens: Int[Tensor, "feature k"]
    mean: Float[Tensor, " feature"]
    active: Float[Tensor, " feature"]
    names: tuple[str, ...]
    pictures: UInt8[Tensor, "feature k h w 3"] | None

    def to_frame(self) -> pd.DataFrame:
        """One row a feature and image: feature, rank, image, name, token, activation, mean, active."""
        import pandas as pd

        count, k = self.images.shape
        found = self.images.flatten().tolist()
        return pd.DataFrame(
            {
                "feature": self.index.repeat_interleave(k).numpy(),
                "rank": list(range(1, k + 1)) * count,
                "image": found,
                "name": [self.names[i] for i in found],
                "token": self.tokens.flatten().numpy(),
                "activation": self.activation.flatten().numpy(),
                "mean": self.mean.repeat_interleave(k).numpy(),
                "active": self.active.repeat_interleave(k).numpy(),
            }
        )

    def figure(self) -> go.Figure:
        """A row a feature: the images, with its activation in each.

        Raises:
            ValueError: the pictures were not kept.
        """
        from decompclip.figures.gallery import PictureRow, picture_rows

        if self.pictures is None:
            raise ValueError(
                f"expected pictures; received none, as for bare towers and more than {PICTURED} features; ask for fewer, of a "
                "HookedCLIP"
            )
        rows = [
            PictureRow(
                f"features[{feature}], in {share:.0%}",
                None,
                list(pictures),
                [f"{x:.2f} {self.names[i]}" for x, i in zip(values, images, strict=True)],
            )
            for feature, share, pictures, values, images in zip(
                self.index.tolist(),
                self.active.tolist(),
                self.pictures,
                self.activation.tolist(),
                self.images.tolist(),
                strict=True,
            )
        ]
        return picture_rows(rows, title=f"most active of {len(self.names)} images")

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        silent = int((self.active == 0).sum())
        return f"TopImages({len(self)} features, {silent} never active, {len(self.names)} images)"


@torch.no_grad()
def top_images(
    model: HookedCLIP | HookedViT,
    sae: SparseAutoencoder,
    images: Images,
    chosen: Components = features,
    *,
    k: int = 8,
    batch_size: int = 64,
    names: Sequence[str] | None = None,
) -> TopImages:
    """The images in which features are most active: by the largest activation of a token.

    Args:
        model: the tower, or a model with one, whose pictures are kept for the figure.
        sae: of one of its hook points.
        images: as the tower takes them.
        chosen: such as `features[[5, 7]]`; by default all.
        k: images of each feature; at most all.
        batch_size: images in a forward pass, which ends behind the hook point.
        names: of the images; by default their numbers.

    Returns:
        Images, tokens and activations; means and shares over all images.

    Raises:
        IndexError: a feature that the autoencoder does not have.
        ValueError: no images, k below one, names of another number, or an autoencoder or expression as in `feature_terms`.
    """
    check_count(k, "images")
    visual = tower(model)
    site, index = _site(sae, visual), _chosen(chosen, sae, visual).to(visual.device)
    sae, read = sae.to(visual.device), _read_rows(sae, visual).nonzero()[:, 0]
    pictured = len(index) <= PICTURED and hasattr(model, "denormalize")
    best: list[Tensor] = []  # activation, image, token: [feature k]
    seen: list[tuple[Tensor, Tensor]] = []
    pictures, count = {}, 0
    total: Any = 0
    often: Any = 0

    def keep(x: Tensor, hook: Any) -> None:
        nonlocal total
        rows = _finite(x, f"activations at {sae.hook}").flatten(2)[:, read]
        found = []
        for piece in pieces(len(rows), rows.shape[1] * len(sae) * 8, temporary(x.device)):
            acts = sae.read(rows[piece]).acts[..., index]
            most, token = acts.max(1)
            found.append((most, token))
            total = total + acts.double().sum((0, 1))
        most, token = (torch.cat(x) for x in zip(*found, strict=True))
        seen.append((most, token))

    for batch in image_batches(images, batch_size=batch_size, device=visual.device):
        with visual.hooks(fwd_hooks=[(sae.hook, keep)]):
            visual(batch.to(visual.device, visual.dtype), stop_at_layer=site.layer + 1)
        most, token = (x.T for x in seen.pop())  # [feature batch]
        often = often + (most > 0).double().sum(1)
        places = torch.arange(count, count := count + len(batch), device=most.device).expand(len(index), -1)
        new = [most, places, read[token]]
        best = [torch.cat(pair, dim=1) for pair in zip(best, new, strict=True)] if best else new
        order = best[0].topk(min(k, count)).indices
        best = [x.gather(1, order) for x in best]
        if pictured:
            found = set(best[1].flatten().tolist())
            shown = {i: batch[i - places[0, 0]] for i in found if i >= places[0, 0]}
            pixels = bytes_of(model.denormalize(torch.stack([*shown.values()])).cpu()) if shown else ()  # pyright: ignore
            pictures = {
                i: x for i, x in (pictures | dict(zip(shown, pixels, strict=True))).items() if i in found
            }
    if not best:
        raise ValueError("expected at least one image; received none; check the image source")
    activation, found, token = (x.cpu() for x in best)
    kept = (
        torch.stack([torch.stack([pictures[i] for i in row]) for row in found.tolist()]) if pictured else None
    )
    return TopImages(
        index=index.cpu(),
        activation=activation,
        images=found,
        tokens=token,
        mean=(total / (count * len(read))).float().cpu(),
        active=(often / count).float().cpu(),
        names=image_names(names, count),
        pictures=kept,
    )
