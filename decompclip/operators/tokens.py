"""Tokens: heads that no longer read some tokens (`AblateTokens`), and numbers by token laid out as patches (`TokenMaps`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from decompclip.decomposition.components import ComponentMask, Components, resolve
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.maps import wide
from decompclip.decomposition.terms import TokenTerms
from decompclip.display import some
from decompclip.operators.ablation import check_rows, token_mask
from decompclip.operators.intervention import Chosen, Intervention, Where
from decompclip.operators.parts import place_of
from decompclip.tower.layers import blocks
from decompclip.tower.vit import Hook, HookedViT

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from decompclip.figures.gallery import Overlay


@dataclass(frozen=True, eq=False, repr=False)
class TokenValues:
    """What all heads read of each token, on average over images: what `AblateTokens` fills in.

    Attributes:
        values: their values, with the bias.
        bias: the heads' value bias, which the centred convention counts apart.
    """

    values: Float[Tensor, "layer head token d_head"]
    bias: Float[Tensor, "layer head d_head"]

    def __repr__(self) -> str:
        layers, heads, tokens, _ = self.values.shape
        return f"TokenValues({layers} layers x {heads} heads, {tokens} tokens)"


@torch.no_grad()
def mean_values(visual: HookedViT, batches: Iterable[Float[Tensor, "_ 3 h w"]]) -> TokenValues:
    """The heads' values of each token, averaged over a data set.

    Args:
        visual: an image tower.
        batches: of images as the tower takes them.

    Returns:
        The means, in fp32 at least.

    Raises:
        ValueError: there are no images.
    """
    layers = range(visual.cfg.n_layers)
    names = [f"blocks.{layer}.attn.hook_v" for layer in layers]
    sums: dict[str, Tensor] = {}
    total = 0

    def add(v: Tensor, hook: Any) -> None:
        sums[hook.name] = sums.get(hook.name, 0) + wide(v).sum(0).transpose(0, 1)

    for images in batches:
        with visual.hooks(fwd_hooks=[(name, add) for name in names]):
            visual(images)
        total += len(images)
    if not total:
        raise ValueError("expected batches of images; received none; check the image source")
    bias = torch.stack([wide(block.attn.b_V).detach() for block in blocks(visual)])
    return TokenValues(torch.stack([sums[name] / total for name in names]), bias)


@dataclass(frozen=True, eq=False, repr=False)
class AblateTokens(Intervention):
    """Heads that no longer read some tokens, such as the patches that a trigger covers. Their attention stays as it is.

        AblateTokens(heads[-1], (3, 4))                                        nothing in their place
        AblateTokens(heads[-1], (3, 4), fill=mean_values(visual, batches))     what they are on average

    Direct: the tokens' shares are taken out of the heads' terms, or are those of the fill (decompose with `tokens=`). Causal:
    at these tokens the heads' values are their bias alone, or the fill's.

    Attributes:
        components: which heads.
        tokens: numbers (0 is the class token, where there is one), or a mask `[token]` or `[batch token]`.
        fill: what the heads read there instead; None for nothing.
    """

    components: Components
    tokens: tuple[int, ...] | Bool[Tensor, "*batch token"]
    _: KW_ONLY
    fill: TokenValues | None = None

    def __post_init__(self) -> None:
        check_rows(self.tokens, "tokens", ())

    def __call__(self, d: Decomposition, *, where: Where | None = None) -> Decomposition:
        chosen = Chosen.of(self._heads(d), where, len(d)).heads
        coords = d.coords.clone()
        for layer, head in chosen.any(0).nonzero().tolist():
            terms = d._asked(layer, head)
            fill = None
            if self.fill is not None:
                shape = (d.n_layers, d.n_heads, *terms.values.shape[2:])
                fill = self._filled(shape)[layer, head]
                fill = (fill - self.fill.bias[layer, head] if d.convention == "centred" else fill).to(coords)
            shares = _shares(d, layer, head, terms, fill)
            silenced = self._mask(shares.shape[1], len(d)).to(shares.device) & chosen[
                :, layer, head, None
            ].to(shares.device)
            coords[:, layer, head, : shares.shape[2]] -= (shares * silenced[..., None]).sum(1)
        return d.edit(coords=coords) if chosen.any() else d

    def fwd_hooks(self, visual: HookedViT, *, where: Where | None = None) -> list[Hook]:
        mask, cfg = self._heads(visual), visual.cfg
        fill = None
        if self.fill is not None:
            fill = self._filled((cfg.n_layers, cfg.n_heads, cfg.n_tokens, cfg.d_head))

        def silence(v: Tensor, hook: Any, layer: int) -> Tensor:
            of_heads = Chosen.of(mask, where, len(v)).heads[:, None, layer].to(v.device)
            silenced = self._mask(v.shape[1], len(v)).to(v.device)[..., None] & of_heads
            new = blocks(visual)[layer].attn.b_V.detach() if fill is None else fill[layer].transpose(0, 1)
            return torch.where(silenced[..., None], new.to(v), v)

        return [
            (f"blocks.{layer}.attn.hook_v", partial(silence, layer=layer))
            for layer in mask.heads.any(1).nonzero().flatten().tolist()
        ]

    def _filled(self, shape: tuple[int, ...]) -> Float[Tensor, "layer head token d_head"]:
        """The fill's values; raises ValueError where they are of another tower."""
        assert self.fill is not None
        if tuple(self.fill.values.shape) != shape:
            raise ValueError(
                f"expected a fill [layer, head, token, d_head] = {list(shape)}; received {list(self.fill.values.shape)}; make "
                "it with mean_values of the same tower"
            )
        return self.fill.values

    def _heads(self, of: Decomposition | HookedViT) -> ComponentMask:
        """Which are meant; raises ValueError where the expression names more than heads."""
        mask = resolve(self.components, of)
        if mask.beside_heads:
            raise ValueError(f"expected heads, for they alone read tokens; received {self.components!r}")
        return mask

    def _mask(self, n_tokens: int, batch: int) -> Bool[Tensor, "#batch token"]:
        tokens = torch.atleast_2d(token_mask(self.tokens, n_tokens))
        if len(tokens) not in (1, batch):
            raise ValueError(
                f"expected a mask for each of {batch} images, or one for all; received {list(tokens.shape)}; give one "
                "row for each image of this very batch"
            )
        return tokens

    def __repr__(self) -> str:
        of = f"mask of {int(self.tokens.sum())}" if isinstance(self.tokens, Tensor) else repr(self.tokens)
        return (
            f"AblateTokens({self.components!r}, {of}{'' if self.fill is None else f', fill={self.fill!r}'})"
        )


def _shares(
    d: Decomposition, layer: int, head: int, terms: TokenTerms, fill: Float[Tensor, "token d_head"] | None
) -> Float[Tensor, "batch token coord"]:
    """The tokens' shares of a head's coordinates, constants aside; beyond those of a fill."""
    maps, values = d.maps, terms.values[:, 0]
    values = values if fill is None else values - fill
    weights = (terms.attention * terms.scale[..., None])[:, 0]
    weighted = weights.mT[..., None] * values[:, :, None]
    if maps.tokens is None:
        return weighted[:, :, 0]
    assert maps.out is not None
    return torch.einsum("bnqe,qed->bnd", weighted, maps.tokens[layer, head] @ maps.out)


MapKind = Literal["attention", "contribution", "rollout"]


@dataclass(frozen=True, eq=False, repr=False)
class TokenMaps:
    """Maps of heads (or of the whole tower: rollout) over the patches of images, on the CPU.

    Made by `attention_maps`, `contribution_maps` and `rollout` of `decompclip.operators`.

    Attributes:
        patches: a number a patch. `map` goes through `heads`; a rollout is one map.
        prefix: the same of the tokens that lie nowhere in the image (class token, registers).
        heads: (layer, head) of each map; none of a rollout.
        image_size, patch_size: height and width, pixels.
        toward: what text contributions are counted toward.
        names: of the images.
        pictures: the images themselves, where they are known.
    """

    patches: Float[Tensor, "map batch rows columns"]
    prefix: Float[Tensor, "map batch prefix"]
    kind: MapKind
    heads: tuple[tuple[int, int], ...]
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    names: tuple[str, ...]
    toward: str = ""
    pictures: UInt8[Tensor, "batch h w 3"] | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """A name for each map."""
        return tuple(f"head {layer}.{head}" for layer, head in self.heads) or (self.kind,)

    @property
    def total(self) -> Float[Tensor, "map batch"]:
        """Sums over all tokens: 1 of attention and rollout; of contributions, the head's own."""
        return self.patches.sum((2, 3)) + self.prefix.sum(2)

    @property
    def top(self) -> Float[Tensor, " map"]:
        """Largest size of each map over all images: the end of its colour scale."""
        return self.patches.abs().amax((1, 2, 3))

    def __len__(self) -> int:
        return self.patches.shape[1]

    def of(self, layer: int, head: int) -> Float[Tensor, "batch rows columns"]:
        """The maps of one head, both counted from 0.

        Raises:
            LookupError: it is none of these maps'.
        """
        if (layer, head) not in self.heads:
            raise LookupError(
                f"expected a head among {', '.join(self.labels)}; received {layer}.{head}; ask for it when the "
                f"maps are made: heads[{layer}, {head}]"
            )
        return self.patches[self.heads.index((layer, head))]

    def select(
        self, maps: Sequence[int | str] | None = None, images: Sequence[int | str] | None = None
    ) -> TokenMaps:
        """Some of the maps, of some of the images, by their places, or by `labels` and `names`.

        Raises:
            LookupError: there is no such map or image.
        """
        chosen = range(len(self.patches)) if maps is None else [place_of(i, self.labels, "map") for i in maps]
        shown = range(len(self)) if images is None else [place_of(i, self.names, "image") for i in images]
        rows, columns = torch.tensor(list(chosen), dtype=torch.long), list(shown)
        return replace(
            self,
            patches=self.patches[rows][:, columns],
            prefix=self.prefix[rows][:, columns],
            heads=tuple(self.heads[i] for i in chosen) if self.heads else (),
            names=tuple(self.names[i] for i in shown),
            pictures=None if self.pictures is None else self.pictures[columns],
        )

    @property
    def signed(self) -> bool:
        """Whether numbers below zero mean something."""
        return self.kind == "contribution"

    def to_frame(self) -> pd.DataFrame:
        """One row a token: layer, head, image, name, token, row, column (none of prefix tokens), value."""
        import pandas as pd

        values = torch.cat([self.prefix, self.patches.flatten(2)], dim=2)
        which, image, token = (x.ravel() for x in np.indices(tuple(values.shape)))
        nowhere, grid = [(None, None)] * self.prefix.shape[2], np.ndindex(*self.patches.shape[2:])
        layers, heads, rows, columns = (
            pd.array(numbers, dtype="Int64")
            for places in (self.heads or [(None, None)], [*nowhere, *grid])
            for numbers in zip(*places, strict=True)
        )
        return pd.DataFrame(
            {
                "layer": layers[which],
                "head": heads[which],
                "image": image,
                "name": np.array(self.names)[image],
                "token": token,
                "row": rows[token],
                "column": columns[token],
                "value": values.flatten().double().numpy(),
            }
        )

    def figure(self, *others: TokenMaps, **options: Any) -> go.Figure:
        """A gallery, maps by images.

        Args:
            others: more maps of the same images, such as a rollout, to stand below.
            options: `masks`, `scale`, `smooth`, `notes`, as `decompclip.figures.gallery.gallery` takes them.

        Raises:
            ValueError: as `gallery`.
        """
        from decompclip.figures.gallery import gallery

        return gallery(*(maps.overlays() for maps in (self, *others)), **options)

    def overlays(self) -> Overlay:
        """What a gallery draws: the maps with their names and pictures."""
        from decompclip.figures.gallery import Overlay

        return Overlay(
            self.patches,
            self.labels,
            self.names,
            self.image_size,
            self.patch_size,
            self.signed,
            self.toward,
            self.pictures,
        )

    def __repr__(self) -> str:
        rows, columns = self.patches.shape[2:]
        toward = f", toward {self.toward}" if self.toward else ""
        return (
            f"TokenMaps({self.kind}: {some(self.labels, 6)}; {len(self)} images, {rows} x {columns} "
            f"patches and {self.prefix.shape[2]} other tokens{toward})"
        )

    def _repr_html_(self) -> str:
        return f"<p>{escape(repr(self))}</p>"
