"""Components taken from other images: patching, resampling, repair where a selector says so (docs/method.md, section 2)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decompclip.decomposition.components import ComponentMask, Components, heads, resolve
from decompclip.decomposition.decomposition import Decomposition, check_alike
from decompclip.operators.ablation import Fill, Replacement, stream_values
from decompclip.operators.intervention import Intervention, Restricted, Where, both
from decompclip.tower.vit import Hook, HookedViT

SAME = {torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest difference of one image's features in two runs, as a share of their length, by dtype; 1e-3 elsewhere."""


@dataclass(frozen=True, eq=False, repr=False)
class FromImages(Replacement):
    """Components replaced by those of other images: what `Patch` and `ResampleAblate` share.

    Attributes:
        source: the other images' terms, under the same model and options.
        images: the source's images, which causal mode needs.
    """

    source: Decomposition
    _: KW_ONLY
    images: Float[Tensor, "batch 3 h w"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images is not None and len(self.images) != len(self.source):
            raise ValueError(
                f"expected the {len(self.source)} images that the source was decomposed from; received "
                f"{len(self.images)} images; pass those very images, in the same order"
            )

    def _stream(self, visual: HookedViT, mask: ComponentMask) -> Fill:
        """The components' contributions to the stream, of the source's images.

        Raises:
            ValueError: no images, or the tower does not give them the source's features.
        """
        if self.images is None:
            raise ValueError(
                "expected the source's images, for a causal edit writes what they leave in the stream; received none; "
                f"pass {type(self).__name__}(..., images=images)"
            )
        values, features = stream_values(visual, self.images, mask)
        known = self.source.features if self.source.target is None else self.source.target
        if known.shape == features.shape:
            found = features / features.norm(dim=-1, keepdim=True) if self.source.normalized else features
            misses = (found.to(known) - known).norm(dim=-1) / known.norm(dim=-1)
            if float(misses.max()) <= SAME.get(features.dtype, 1e-3):
                return values
            what = f"whose features differ, by {float(misses.max()):.0%} in image {int(misses.argmax())}"
        else:
            what = f"whose features are {list(features.shape)}, not {list(known.shape)}"
        raise ValueError(
            f"expected the images that the source was decomposed from, and the same model; received images {what}; "
            "pass those very images in the same order, and a source that was not edited"
        )

    def _about(self) -> str:
        return f", {len(self.source)} images"


@dataclass(frozen=True, eq=False, repr=False)
class Patch(FromImages):
    """Components replaced by those of other images: image i receives from image i of the source.

    Attributes:
        components, rows: as in `Replacement`.
        source: the other images' terms; one image serves for all.
        images: the source's images, which causal mode needs.
    """

    def term_fill(self, d: Decomposition, mask: ComponentMask) -> Fill:
        source = self.source
        check_alike(d, source)
        if len(source) not in (1, len(d)):
            raise ValueError(
                f"expected a source of {len(d)} images, one for each that is edited (or of one for all); received "
                f"{len(source)}; pair the images first"
            )
        return Fill(source.coords, source.mlps, source.embed, source.pool)

    def stream_fill(self, visual: HookedViT, mask: ComponentMask) -> Fill:
        return self._stream(visual, mask)


@dataclass(frozen=True, eq=False, repr=False)
class ResampleAblate(FromImages):
    """Components replaced by the same component of another image, drawn anew for each component.

    Where the source is as long as the batch, an image never receives from the one at its own place.

    Attributes:
        components, rows: as in `Replacement`.
        source: decomposed images to draw from.
        images: the source's images, which causal mode needs; as many as the batch that is run.
        seed: of the draws.
    """

    _: KW_ONLY
    seed: int = 0

    def term_fill(self, d: Decomposition, mask: ComponentMask) -> Fill:
        check_alike(d, self.source)
        of_heads, of_mlps, of_embed, of_pool = self._draws(len(d), mask, d.coords.device)
        layer, head = torch.arange(d.n_layers)[:, None], torch.arange(d.n_heads)
        source = self.source
        return Fill(
            source.coords[of_heads, layer, head],
            source.mlps[of_mlps, layer[:, 0]],
            source.embed[of_embed],
            source.pool[of_pool],
        )

    def stream_fill(self, visual: HookedViT, mask: ComponentMask) -> Fill:
        values = self._stream(visual, mask)
        assert self.images is not None and isinstance(values.heads, dict) and isinstance(values.mlps, dict)
        of_heads, of_mlps, of_embed, of_pool = self._draws(len(self.images), mask, self.images.device)
        head = torch.arange(visual.cfg.n_heads)
        return Fill(
            # [batch head token d_head], for the two indices stand apart
            {i: z[of_heads[:, i], :, head].transpose(1, 2) for i, z in values.heads.items()},
            {i: out[of_mlps[:, i]] for i, out in values.mlps.items()},
            values.embed[of_embed],
            None if values.pool is None else values.pool[of_pool],
        )

    def _draws(self, batch: int, mask: ComponentMask, device: torch.device) -> list[Int[Tensor, "batch ..."]]:
        n, own = len(self.source), int(len(self.source) == batch)
        if n <= own:
            raise ValueError(
                f"expected a source with other images to draw from; received one of {n} images; pass a larger one"
            )
        generator = torch.Generator().manual_seed(self.seed)
        place = torch.arange(batch)
        draws = []
        for shape in (mask.heads.shape, mask.mlps.shape, (), ()):
            steps = torch.randint(own, n, (batch, *shape), generator=generator)
            start = own * place.view(-1, *[1] * len(shape))
            draws.append(((start + steps) % n).to(device))
        return draws

    def _about(self) -> str:
        return f"{super()._about()}, seed={self.seed}"


@runtime_checkable
class Flags(Protocol):
    """What says which components of which images look infected, such as a fitted `Selector`."""

    def flags(self, d: Decomposition) -> Where: ...


@dataclass(frozen=True, eq=False, repr=False)
class Repair(Intervention):
    """An edit of the components that a selector flags, image by image.

        Repair(selector, MeanAblate(heads, moments))(d)
        with model.hooks(repair.at(d)): ...             causal, on the flags of a first pass

    Flags `[batch layer head]` restrict heads alone (`Where`): a fill of MLPs edits those of every image then.

    Attributes:
        selector: has `flags(d)`; those of `decompclip.defenses` must be fitted.
        fill: what is done to the flagged components.
    """

    selector: Flags
    fill: Intervention

    def __call__(self, d: Decomposition, *, where: Where | None = None) -> Decomposition:
        flagged = self.selector.flags(d)
        return self.fill(d, where=both(flagged, where))

    def at(self, d: Decomposition) -> Restricted:
        """The edit of what is flagged in these very images, for either mode.

        Args:
            d: terms of the images, from a first pass.
        """
        return self.fill.on(self.selector.flags(d))

    def fwd_hooks(self, visual: HookedViT, *, where: Where | None = None) -> list[Hook]:
        """The fill at `where`, the flags of a first pass.

        Raises:
            ValueError: no `where`.
        """
        if where is None:
            raise ValueError(
                "expected where, the components to edit, for they are known only once the image is decomposed; received "
                "none; use repair.at(model.decompose(images)) of the same images as the intervention"
            )
        return self.fill.fwd_hooks(visual, where=where)

    def __repr__(self) -> str:
        return f"Repair({self.selector!r}, {self.fill!r})"


def decomp_reverse(
    triggered: Decomposition,
    selector: Flags,
    *,
    components: Components = heads,
    images: Float[Tensor, "batch 3 h w"] | None = None,
) -> Restricted:
    """Decomp-Reverse: copies into each clean image what the selector flags in its triggered pair (paper, section 3.3).

    `decomp_reverse(triggered, selector)(clean)` answers with the target as far as the flagged heads carry the attack.

    Args:
        triggered: of the triggered images, in the order of the clean ones.
        selector: what says which components of which images look infected.
        components: of which only the flagged are copied; more than heads where the flags are of all components.
        images: the triggered images, which causal mode needs.

    Returns:
        An intervention for the clean images.

    Raises:
        ValueError: components beside heads, for flags of heads alone.
    """
    flagged = selector.flags(triggered)
    if flagged.ndim == 3 and resolve(components, triggered).beside_heads:
        raise ValueError(
            f"expected heads, of which alone the selector's flags {list(flagged.shape)} speak; received {components!r}, whose "
            "others would be copied into every image; name heads, or take a selector that flags [batch component]"
        )
    return Patch(components, triggered, images=images).on(flagged)
