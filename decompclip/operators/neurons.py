"""Single neurons of MLPs: their terms, and their ablation, direct and causal (docs/method.md, section 1).

A neuron adds `activation * W_out[neuron]` to the stream. Its term is one number of the image times a direction of the
model. All neurons of an MLP and its output bias sum to the MLP's term.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decompclip.decomposition.components import ComponentMask, Components, mlps, resolve
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.maps import Convention, frozen, full_precision, same_model, wide
from decompclip.decomposition.terms import Rows
from decompclip.display import Result
from decompclip.operators.ablation import TokenChoice, check_rows, fit_rows, show_rows, token_mask
from decompclip.operators.intervention import Chosen, Intervention, Where
from decompclip.tower.layers import blocks
from decompclip.tower.vit import Hook, HookedViT

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


SHOWN = 30
"""Parts drawn, those with the longest terms."""

Fine = TypeVar("Fine", bound="FineTerms")


@dataclass(frozen=True, eq=False, repr=False)
class FineTerms(Result, ABC):
    """Terms of parts finer than a component, for a batch of images: neurons, or features of a sparse autoencoder.

    Attributes:
        index: which.
        coords: what their directions are multiplied by: activations at the pooled rows, as each is weighted.
        maps: their directions in the joint space, through each head of the pooling (one, but for attention pools).
        normalized: whether the terms are those of unit features.
        model: fingerprint of the tower (`decompclip.decomposition.maps`); None where unknown.
    """

    index: Int[Tensor, " part"]
    coords: Float[Tensor, "batch pool_head part"]
    maps: Float[Tensor, "pool_head part d_embed"]
    convention: Convention
    normalized: bool
    model: Float[Tensor, " weight"] | None

    largest = "length"
    what: ClassVar[str]  # in words, one of the parts
    of_images: ClassVar[tuple[str, ...]]  # fields with a row an image

    @property
    def terms(self) -> Float[Tensor, "batch part d_embed"]:
        return torch.einsum("bqj,qjd->bjd", self.coords, self.maps)

    @property
    def lengths(self) -> Float[Tensor, "batch part"]:
        """Of the terms, which need not fit in memory: through the Gram of each part's directions."""
        grams = torch.einsum("qjd,pjd->jqp", self.maps, self.maps)
        return torch.einsum("bqj,jqp,bpj->bj", self.coords, grams, self.coords).clamp(min=0).sqrt()

    @property
    @abstractmethod
    def labels(self) -> list[str]:
        """A name for each part."""

    def figure(self) -> go.Figure:
        """The parts with the longest terms."""
        from decompclip.figures.bars import bar_rows

        lengths, labels = self.lengths, self.labels
        mean, most = lengths.mean(0), lengths.amax(0)
        shown = mean.argsort(descending=True, stable=True)[:SHOWN].tolist()
        return bar_rows(
            [labels[i] for i in shown],
            {"mean over images": mean[shown].tolist()},
            unit="length of the term",
            largest={"largest": most[shown].tolist()},
            row_height=16,
        )

    def toward(self, along: Float[Tensor, "text d_embed"]) -> Float[Tensor, "batch part text"]:
        """The terms' products with directions, without forming the terms."""
        return torch.einsum("bqj,qjt->bjt", self.coords, self.maps @ along.to(self.maps).T)

    def select(self: Fine, images: Any) -> Fine:
        """Of some of the images: a slice, a mask, or indices."""
        return replace(self, **{name: getattr(self, name)[images] for name in self.of_images})

    def __len__(self) -> int:
        return len(self.coords)

    def check(self, d: Decomposition) -> None:
        """Raises ValueError unless the terms may be those of a decomposition: as many images, its options, its model.

        Whether the images are the same ones, and in the same order, cannot be told from the terms.
        """
        if (len(self), self.convention, self.normalized) != (len(d), d.convention, d.normalized):
            raise ValueError(
                f"expected {self.what} terms of {len(d)} images, convention={d.convention!r}, normalize={d.normalized}; "
                f"received {self!r}, normalize={self.normalized}; make both from the same images and options"
            )
        theirs = d.maps.fingerprint
        if self.model is not None and theirs is not None and not same_model(self.model, theirs):
            raise ValueError(
                f"expected {self.what} terms of the model that was decomposed; received {self!r} of other weights; make "
                "both with the same model"
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.index)} {self.what}s, {len(self)} images, {self.convention})"


@dataclass(frozen=True, eq=False, repr=False)
class NeuronTerms(FineTerms):
    """Terms of some neurons, for a batch of images.

    Attributes:
        layers: of the neurons.
        post: activations at every token.
        d_mlp: how many neurons each MLP of the tower has.
    """

    layers: Int[Tensor, " part"]
    post: Float[Tensor, "batch token part"]
    d_mlp: int

    what = "neuron"
    of_images = ("coords", "post")

    @property
    def labels(self) -> list[str]:
        return [
            f"neurons[{at}, {i}]" for at, i in zip(self.layers.tolist(), self.index.tolist(), strict=True)
        ]

    @property
    def mean(self) -> NeuronTerms:
        """Of one image, the average one."""
        return replace(self, coords=self.coords.mean(0, keepdim=True), post=self.post.mean(0, keepdim=True))

    def to_frame(self) -> pd.DataFrame:
        """One row a neuron: layer, neuron, activation (mean over images and tokens), length of its term (mean over
        images) and the largest."""
        import pandas as pd

        lengths = self.lengths
        columns = {
            "layer": self.layers,
            "neuron": self.index,
            "activation": self.post.mean((0, 1)),
            "length": lengths.mean(0),
            "largest": lengths.amax(0),
        }
        return pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})

    def of(self, layers: Tensor, index: Tensor) -> bool:
        """Whether these neurons are meant."""
        return torch.equal(self.layers, layers) and torch.equal(self.index, index)


@torch.no_grad()
def neuron_terms(
    visual: HookedViT,
    images: Float[Tensor, "batch 3 h w"],
    chosen: Components,
    *,
    convention: Convention = "centred",
    normalize: bool = False,
) -> NeuronTerms:
    """The terms of the neurons that an expression names, from one forward pass that keeps them alone.

    Args:
        visual: an image tower.
        images: a batch as the tower takes it.
        chosen: such as `neurons[3, [5, 7]]`.
        convention: of the terms, as `decompose` has it.
        normalize: whether they are those of unit features.

    Returns:
        The terms, neuron by neuron.

    Raises:
        IndexError: the expression names a layer or neuron that the tower does not have.
        ValueError: it names no neurons, or more than neurons; or the tower normalises what its MLPs put out.
    """
    check_linear(visual)
    layers, index = neuron_places(chosen, visual)
    named = [int(layer) for layer in layers.unique()]
    names = [f"blocks.{layer}.mlp.hook_post" for layer in named]
    kept: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any) -> None:
        layer = int(hook.name.split(".")[1])
        kept[hook.name] = wide(x[..., index[layers == layer].to(x.device)]).clone()

    pooled = Rows(visual, with_mean=False)
    ends = [(name, hook) for name, hook in pooled.hooks() if not str(name).startswith("blocks.")]
    with visual.hooks(fwd_hooks=[*ends, *((name, keep) for name in names)]):
        feature = wide(visual(images))
    pooled.length = feature.norm(dim=-1) if normalize else None
    post = torch.cat([kept[name] for name in names], dim=-1)
    fixed = frozen(visual, convention)
    with full_precision(post):
        rows = post[:, visual.cfg.pooled_rows]
        coords = pooled.weights @ (rows if pooled.each else rows.mean(1, keepdim=True))
        into = torch.einsum("jd,qdp->qjp", neuron_writes(visual, layers, index), fixed.into)
        maps = into if fixed.read.out is None else into @ fixed.read.out
    return NeuronTerms(
        index=index,
        coords=coords,
        maps=maps,
        convention=convention,
        normalized=normalize,
        model=fixed.maps.fingerprint,
        layers=layers,
        post=post,
        d_mlp=visual.cfg.d_mlp,
    )


def check_linear(visual: HookedViT) -> None:
    """Raises ValueError where a LayerNorm behind the MLPs keeps neurons from having terms of their own."""
    if visual.cfg.norm != "pre":
        raise ValueError(
            "expected a tower without a LayerNorm behind its MLPs; received one with norm="
            f"{visual.cfg.norm!r}; ablate its neurons causally, which needs no terms"
        )


def neuron_writes(visual: HookedViT, layers: Tensor, index: Tensor) -> Float[Tensor, "neuron d_model"]:
    """What each neuron writes to the stream, past LayerScale."""
    written = []
    for layer in layers.unique():
        block = blocks(visual)[int(layer)]
        scale = 1.0 if block.ls2 is None else wide(block.ls2)
        W_out = wide(block.mlp.W_out)
        written.append(W_out.T[index[layers == layer].to(W_out.device)] * scale)
    return torch.cat(written)


def mean_neurons(
    visual: HookedViT,
    batches: Iterable[Float[Tensor, "_ 3 h w"]],
    chosen: Components,
    *,
    convention: Convention = "centred",
    normalize: bool = False,
) -> NeuronTerms:
    """The average of `neuron_terms` over a data set: what mean-ablation fills in.

    Args:
        visual, chosen, convention, normalize: as `neuron_terms`.
        batches: of images as the tower takes them.

    Returns:
        The terms of the average image.

    Raises:
        ValueError: there are no images, or as `neuron_terms`.
    """
    total, mean = 0, None
    for images in batches:
        terms = neuron_terms(visual, images, chosen, convention=convention, normalize=normalize)
        total += len(terms)
        new, weight = terms.mean, len(terms) / total
        if mean is not None:
            pairs = ((mean.coords, new.coords), (mean.post, new.post))
            coords, post = (a + weight * (b - a) for a, b in pairs)
            new = replace(mean, coords=coords, post=post)
        mean = new
    if mean is None:
        raise ValueError("expected batches of images; received none; check the image source")
    return mean


@dataclass(frozen=True, eq=False, repr=False)
class AblateNeurons(Intervention):
    """Neurons of MLPs silenced, or set to what they are on average or in other images.

        AblateNeurons(neurons[3, [5, 7]])                                           causal
        AblateNeurons(neurons[3], fill=mean_neurons(visual, batches, neurons[3]))   to the mean
        AblateNeurons(neurons[3], terms=neuron_terms(visual, images, neurons[3]))   direct, on these images

    `where` has no place for single neurons: where an image's mask leaves out the MLP of a layer, all neurons of that
    layer stay as they are in that image, else all that the expression names are edited.

    Attributes:
        components: which neurons.
        fill: their `mean`, or the terms of other images (one each); None silences them.
        terms: of the images that are edited and the same neurons, which direct mode needs.
        rows: which tokens a causal edit reaches.
    """

    components: Components
    _: KW_ONLY
    fill: NeuronTerms | None = None
    terms: NeuronTerms | None = None
    rows: TokenChoice = "all"

    def __post_init__(self) -> None:
        check_rows(self.rows)
        fill, terms = self.fill, self.terms
        if fill is None or terms is None:
            return
        if not fill.of(terms.layers, terms.index) or fill.normalized != terms.normalized:
            raise ValueError(
                f"expected a fill of the neurons of the terms, {terms!r}, normalize={terms.normalized}; received {fill!r}, "
                f"normalize={fill.normalized}; make both with one expression and the same options"
            )
        _check_model(fill, terms.model)

    def __call__(self, d: Decomposition, *, where: Where | None = None) -> Decomposition:
        terms = self.terms
        if terms is None:
            raise ValueError(
                "expected the neurons' terms, which a decomposition does not keep; received none; pass "
                f"terms=neuron_terms(visual, images, {self.components!r}) of the same images"
            )
        terms.check(d)
        named = _places(self.components, resolve(self.components, d, neurons=terms.d_mlp))
        if not terms.of(*named):
            raise ValueError(
                f"expected terms of {self.components!r}; received {terms!r} of others; make them with the same expression"
            )
        layers = torch.zeros(d.n_layers, dtype=torch.bool).index_fill(0, terms.layers.cpu(), True)
        chosen = Chosen.of(_as_mlps(layers, d), where, len(d)).mlps.to(d.mlps.device)
        change = -terms.coords if self.fill is None else self.fill.coords.to(terms.coords) - terms.coords
        change = (change * chosen[:, None, terms.layers]).to(d.mlps)
        mlps = d.mlps.clone()
        for layer in terms.layers.unique():
            of_layer = terms.layers == layer
            mlps[:, layer] += torch.einsum(
                "bqj,qjd->bd", change[..., of_layer], terms.maps[:, of_layer].to(d.mlps)
            )
        return d.edit(mlps=mlps)

    def fwd_hooks(self, visual: HookedViT, *, where: Where | None = None) -> list[Hook]:
        layers, index = neuron_places(self.components, visual)
        fill = self.fill
        if fill is not None and not fill.of(layers, index):
            raise ValueError(
                f"expected a fill of the neurons {self.components!r}; received {fill!r} of others; make it with the "
                "same expression"
            )
        if fill is not None:
            _check_model(fill, frozen(visual, fill.convention).maps.fingerprint)
        named = torch.zeros(visual.cfg.n_layers, dtype=torch.bool).index_fill(0, layers, True)
        mask = _as_mlps(named, visual)
        tokens, pooled = token_mask(self.rows, visual.cfg.n_tokens, visual.cfg), visual.cfg.pooled_rows

        def silence(x: Tensor, hook: Any, layer: int) -> Tensor:
            places = index[layers == layer].to(x.device)
            at = Chosen.of(mask, where, len(x)).mlps[:, layer, None, None].to(x.device)
            here = fit_rows(tokens, x.shape[1], pooled, axis=-1).to(x.device)
            at = at & here.view(-1, here.shape[-1], 1)
            new = x.new_zeros(1)
            if fill is not None:
                new = fit_rows(fill.post, x.shape[1], pooled, axis=1)[..., layers == layer].to(x)
            return x.index_copy(-1, places, torch.where(at, new, x[..., places]))

        return [
            (f"blocks.{layer}.mlp.hook_post", partial(silence, layer=layer))
            for layer in layers.unique().tolist()
        ]

    def __repr__(self) -> str:
        fill = "" if self.fill is None else f", fill={self.fill!r}"
        return f"AblateNeurons({self.components!r}{fill}{show_rows(self.rows)})"


def neuron_places(
    chosen: Components, visual: HookedViT
) -> tuple[Int[Tensor, " neuron"], Int[Tensor, " neuron"]]:
    """Layer and index of each neuron, in rising order."""
    return _places(chosen, resolve(chosen, visual, neurons=True))


def _places(chosen: Components, mask: ComponentMask) -> tuple[Int[Tensor, " neuron"], Int[Tensor, " neuron"]]:
    if not mask.neurons.any() or mask.flat.any():
        raise ValueError(f"expected neurons alone; received {chosen!r}; for instance neurons[3, [5, 7]]")
    layers, index = mask.neurons.nonzero().T
    return layers, index


def _check_model(fill: NeuronTerms, model: Tensor | None) -> None:
    if fill.model is not None and model is not None and not same_model(fill.model, model):
        raise ValueError(
            f"expected a fill of the model that is edited; received {fill!r} of other weights; make it with the same model"
        )


def _as_mlps(layers: Tensor, of: Decomposition | HookedViT) -> ComponentMask:
    """The MLPs that neurons belong to, for what `where` says of them."""
    return resolve(mlps[layers.nonzero().flatten().tolist()], of)
