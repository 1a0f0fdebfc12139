"""Batches of images out of what a user has: a tensor, batches, or a source such as `FolderSource`.

Activation patching: what one run's activations do in another's, place by place.

The base images run with one activation of the source images' run written in; how far the score moves from the base's
toward the source's is the effect of that place. Base clean, source triggered: where the attack can be written in; the
other way round: where it can be taken out. Every patch here is exact; `decompclip.operators.attribution` estimates all
of them from one gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from decompclip.tower.vit import HookedViT

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from decompclip.models.clip import HookedCLIP


@runtime_checkable
class Source(Protocol):
    """Images as the tower takes them, such as `FolderSource`: `batch.images` of its batches."""

    @property
    def skipped(self) -> Sequence[Any]: ...

    def batches(self, batch_size: int = ...) -> Iterator[Any]: ...


Images = Tensor | Iterable[Any] | Source
"""`[batch 3 h w]` as the tower takes them, batches of such images one after another, or a source of them."""


def image_batches(images: Images, *, batch_size: int) -> Iterator[Float[Tensor, "batch 3 h w"]]:
    """Batches of at most `batch_size` images, none of them empty.

    Raises:
        ValueError: a batch size below one, or something else than batches of images.
    """
    if batch_size < 1:
        raise ValueError(f"expected a batch_size of at least 1; received {batch_size}")
    batches: Iterable[Any] = [images] if isinstance(images, Tensor) else ()
    if isinstance(images, Source):
        batches = (batch.images for batch in images.batches(batch_size))
    elif not isinstance(images, Tensor):
        batches = images
    for batch in batches:
        if not isinstance(batch, Tensor) or batch.ndim != 4:
            found = list(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
            raise ValueError(
                f"expected batches of images [batch, 3, h, w] as the tower takes them; received {found}; preprocess "
                "pictures with model.preprocess or pixels with model.normalize, and pass at least one"
            )
        yield from batch.split(batch_size) if len(batch) else ()


Site = Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z"]
SITE_NAMES = {
    "resid_pre": "stream before the block",
    "resid_mid": "stream between attention and MLP",
    "resid_post": "stream after the block",
    "attn_out": "attention output",
    "mlp_out": "MLP output",
    "z": "heads (z)",
}
ImageBatches = Float[Tensor, "batch 3 h w"] | Iterable[Float[Tensor, "_ 3 h w"]]
Score = Callable[[Float[Tensor, "batch d_embed"]], Float[Tensor, " batch"]]
POINTS: dict[str, str] = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "z": "attn.hook_z",
}


@dataclass(frozen=True, eq=False, repr=False)
class Patching:
    """Effects of patching, by site.

    Attributes:
        effects: the mean change of the score; axes `[layer]`, and for z `[layer head]`; then `token` where patched
            token by token.
        base, source: the scores of the two runs as they are.
        by_token: whether each token was patched alone.
        method: "exact", or "attribution" where estimated from gradients.
        checks: of an estimate, some places and their exact effects: site, place in `effects`, effect.
    """

    effects: Mapping[str, Float[Tensor, "layer ..."]]
    base: Float[Tensor, " batch"]
    source: Float[Tensor, " batch"]
    by_token: bool
    method: Literal["exact", "attribution"]
    checks: tuple[tuple[Site, tuple[int, ...], float], ...] = ()

    @property
    def gap(self) -> float:
        """By how much the source's mean score exceeds the base's: the effect of patching everything."""
        return float((self.source - self.base).mean())

    def merge(self, other: Patching) -> Patching:
        """The effects over the images of both; checks, which are of one batch, are dropped.

        Raises:
            ValueError: the two were not patched at the same places, or not in the same way.
        """
        if (
            self.effects.keys() != other.effects.keys()
            or self.by_token != other.by_token
            or self.method != other.method
        ):
            raise ValueError(
                f"expected patches of the same places in the same way; received {self!r} and {other!r}"
            )
        weight = len(other.base) / (len(self.base) + len(other.base))
        effects = {site: x.lerp(other.effects[site].to(x), weight) for site, x in self.effects.items()}
        before, after = torch.cat([self.base, other.base]), torch.cat([self.source, other.source])
        return Patching(effects, before, after, self.by_token, self.method)

    def shares(self, site: Site) -> Float[Tensor, "layer ..."]:
        """The effects of a site as shares of the gap."""
        return self.effects[site] / self.gap

    def correlation(self, other: Patching) -> dict[str, float]:
        """Pearson's correlation of the effects of each common site with another method's; nan where all effects of
        a site are equal, as those of the whole stream are.

        Raises:
            ValueError: the two were not patched at the same places.
        """
        found = {}
        for site in [site for site in self.effects if site in other.effects]:
            ours, theirs = self.effects[site], other.effects[site]
            if ours.shape != theirs.shape:
                raise ValueError(
                    f"expected effects {list(ours.shape)} of {site}, as the first has them; received "
                    f"{list(theirs.shape)}; patch both with the same by_token"
                )
            both = torch.stack([ours.flatten(), theirs.flatten()]).double()
            varies = both.std(dim=1) > 1e-5 * both.abs().amax(1)
            found[site] = float(torch.corrcoef(both)[0, 1]) if bool(varies.all()) else float("nan")
        return found

    @property
    def agreement(self) -> float:
        """Pearson's correlation of an estimate with its checks, all sites together; nan without checks."""
        if not self.checks:
            return float("nan")
        pairs = [(float(self.effects[site][place]), exact) for site, place, exact in self.checks]
        return float(torch.corrcoef(torch.tensor(pairs).double().T)[0, 1])

    def to_frame(self) -> pd.DataFrame:
        """One row a place: site, layer, head, token (none where not taken apart), effect, share; and `exact`, the
        effect where an estimate was checked, if it was."""
        import pandas as pd

        exact = {(site, place): effect for site, place, effect in self.checks}
        rows = []
        for site, effects in self.effects.items():
            for place in torch.ones(effects.shape).nonzero().tolist():
                layer, *rest = place
                head = rest.pop(0) if site == "z" else None
                token = rest.pop(0) if self.by_token else None
                effect = float(effects[tuple(place)])
                share = effect / self.gap if self.gap else float("nan")
                rows.append((site, layer, head, token, effect, share, exact.get((site, tuple(place)))))
        names = ["site", "layer", "head", "token", "effect", "share", "exact"]
        frame = pd.DataFrame(rows, columns=names).astype(
            {"head": "Int64", "token": "Int64", "exact": "float"}
        )
        return frame if self.checks else frame.drop(columns="exact")

    def figure(self, *, shares: bool = True) -> go.Figure:
        """Heat maps on common colours, one for each site.

        Args:
            shares: of the gap between the two runs: 1 does what patching everything does; else changes of the score.
        """
        from decompclip.figures.heatmaps import Grid, grid_maps

        scale = 1 / self.gap if shares and self.gap else 1.0
        grids = []
        for site, effects in self.effects.items():
            columns, axis = self._columns(site)
            names = columns if axis else [""]
            grids.append(Grid(SITE_NAMES[site], scale * effects.reshape(len(effects), -1), names, axis))
        top = max(float(grid.values.abs().max()) for grid in grids)
        return grid_maps(grids, unit="share of the gap" if shares else "change of the score", top=top)

    def _columns(self, site: str) -> tuple[list[str], str]:
        """Names of what a site is taken apart into, and what they are; heads token by token stand side by side."""
        shape = self.effects[site].shape[1:]
        if site == "z" and self.by_token:
            return [f"{head}.{token}" for head in range(shape[0]) for token in range(shape[1])], "head.token"
        axis = "head" if site == "z" else "token" if self.by_token else ""
        return [str(place) for place in range(shape[0] if shape else 1)], axis

    def __repr__(self) -> str:
        places = {site: "x".join(map(str, effects.shape)) for site, effects in self.effects.items()}
        sites = ", ".join(f"{site} {shape}" for site, shape in places.items())
        checked = (
            f", correlation {self.agreement:.2f} with {len(self.checks)} exact runs" if self.checks else ""
        )
        return f"Patching({self.method}{checked}: {sites}; {len(self.base)} images, gap {self.gap:.3f})"

    def _repr_html_(self) -> str:
        return self.to_frame().to_html(index=False, float_format="{:.4f}".format, max_rows=60)


@torch.no_grad()
def activation_patching(
    model: HookedViT | HookedCLIP,
    base: ImageBatches,
    source: ImageBatches,
    score: Float[Tensor, " d_embed"] | Score,
    *,
    sites: Sequence[Site] = get_args(Site),
    by_token: bool = False,
) -> Patching:
    """Patch each layer of each site alone (each head of z, and each token with `by_token`): a forward pass each.

    Args:
        base: images that run with the patch, image i with activations of image i of the source; one batch, or
            batches one after the other.
        score: a direction that unit features are multiplied with (the target's text less another's, say), or a
            function of the features.
        sites: hook points of the blocks; "z" is patched head by head.

    Raises:
        ValueError: an unknown site, no batches of images, not as many source as base images, or a direction of
            another width than the features.
    """
    if not isinstance(base, Tensor):
        one = partial(activation_patching, model, score=score, sites=sites, by_token=by_token)
        return over_batches(one, base, source)
    visual, source = check_request(model, base, source, sites)
    judge = scorer(score, visual)
    n_layers = visual.cfg.n_layers
    names = {site: [f"blocks.{layer}.{POINTS[site]}" for layer in range(n_layers)] for site in sites}
    donor = record(visual, source, [name for each in names.values() for name in each])
    before = judge(visual(base))
    effects = {}
    for site, of_layers in names.items():
        found = []
        for name in of_layers:
            given = donor[name]
            for place in _places(given, site, by_token):
                with visual.hooks(fwd_hooks=[(name, writing(given, place))]):
                    found.append((judge(visual(base)) - before).mean())
        effects[site] = torch.stack(found).view(n_layers, *_units(donor[of_layers[0]], site, by_token))
    after = judge(visual(source))
    return Patching(effects, before, after, by_token, "exact")


def writing(given: Tensor, place: tuple[Any, ...]) -> Callable[[Tensor, Any], Tensor]:
    """A hook that writes another run's activation at one place, `(image, token)` or `(image, token, head)`."""

    def write(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[place] = given[place]
        return x

    return write


def _places(given: Tensor, site: str, by_token: bool) -> Iterator[tuple[Any, ...]]:
    everything = slice(None)
    tokens: list[Any] = list(range(given.shape[1])) if by_token else [everything]
    units: list[Any] = list(range(given.shape[2])) if site == "z" else [everything]
    yield from ((everything, token, unit) for unit in units for token in tokens)


def _units(given: Tensor, site: str, by_token: bool) -> tuple[int, ...]:
    return (*([given.shape[2]] if site == "z" else []), *([given.shape[1]] if by_token else []))


@runtime_checkable
class Mergeable(Protocol):
    def merge(self, other: Any, /) -> Any: ...


Result = TypeVar("Result", bound=Mergeable)


def over_batches(patch: Callable[..., Result], base: Iterable[Tensor], source: ImageBatches) -> Result:
    """The results of batches, one after the other, as one.

    Raises:
        ValueError: there are no batches, or not as many of the source.
    """
    if isinstance(source, Tensor):
        raise ValueError(
            "expected base and source both as one batch or both as batches; received batches and a tensor"
        )
    results = (patch(ours, theirs) for ours, theirs in zip(base, source, strict=True))
    first = next(results, None)
    if first is None:
        raise ValueError("expected at least one batch of images; received none; check the image source")
    return reduce(lambda a, b: a.merge(b), results, first)


def check_request(
    model: HookedViT | HookedCLIP, base: Tensor, source: ImageBatches, sites: Sequence[str]
) -> tuple[HookedViT, Tensor]:
    """The tower and the source's batch, once the request is known to make sense.

    Raises:
        ValueError: an unknown site, none, no batches of images, or not as many source as base images.
    """
    for name, images in (("base", base), ("source", source)):
        if not isinstance(images, Tensor) or images.ndim != 4:
            form = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"expected {name} as one batch of images [batch, 3, h, w]; received {form}")
    for site in sites or ("none",):
        if site not in POINTS:
            raise ValueError(f"expected sites of {tuple(POINTS)}; received {site!r}")
    assert isinstance(source, Tensor)
    if len(base) != len(source) or not len(base):
        raise ValueError(
            f"expected a source image for each base image, and at least one; received {len(base)} base and "
            f"{len(source)} source images; pair them first"
        )
    return (model if isinstance(model, HookedViT) else model.visual), source


def scorer(score: Float[Tensor, " d_embed"] | Score, visual: HookedViT) -> Score:
    """A score as a function of features; of a direction: the unit feature's dot product with it.

    Raises:
        ValueError: a direction of another width than the features.
    """
    if not isinstance(score, Tensor):
        return score
    if score.shape != (visual.cfg.d_embed,):
        raise ValueError(
            f"expected a direction [{visual.cfg.d_embed}], as wide as the features; received {list(score.shape)}; take "
            "the difference of two texts of the same model"
        )
    direction = score
    return lambda features: F.normalize(features, dim=-1) @ direction.to(features)


def record(visual: HookedViT, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Activations of one run, with their graph where gradients are on; all tokens of the last block too."""
    kept: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any) -> None:
        kept[hook.name] = x

    with visual.hooks(fwd_hooks=[(name, keep) for name in names]):
        visual(images, pooled_rows=False)
    return kept
