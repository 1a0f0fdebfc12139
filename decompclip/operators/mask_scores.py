"""Do maps find a trigger? Share of the positive contribution in a mask, and the pointing game (docs/method.md, section 4).

Scores count patches: a patch is inside where the mask touches it, since a token mixes all its pixels. The pointing game
(Zhang et al., 2016) asks whether the strongest patch is inside. Chance is the share of patches that are inside. The
control is the same mask on the paired clean image, where there is nothing to find.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float
from torch import Tensor

from decompclip.api import check_choice
from decompclip.intervals import Rate, Z
from decompclip.operators.tokens import MapKind, TokenMaps
from decompclip.results import Result

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from decompclip.figures.scatter import Point


Inside = Literal["touched", "covered"]
SHARE, HITS = "share of what is positive, inside the mask", "strongest patch inside the mask"
MAX_ROWS = 24


@dataclass(frozen=True, eq=False, repr=False)
class MaskScores(Result):
    """How well maps point to a mask.

    Attributes:
        share: of what is positive, how much lies in the mask; nan where nothing is positive.
        hit: whether the strongest patch, of value above zero, lies in it.
        chance: what a map that knows nothing scores: the mask's share of the patches.
        heads, labels, kind, toward: of the maps.
        inside: what counts: patches that the mask touches, or the part of each that it covers.
    """

    share: Float[Tensor, "map batch"]
    hit: Bool[Tensor, "map batch"]
    chance: Float[Tensor, " batch"]
    heads: tuple[tuple[int, int], ...]
    labels: tuple[str, ...]
    kind: MapKind
    toward: str
    inside: Inside

    largest = "share"

    @property
    def mean_share(self) -> Float[Tensor, " map"]:
        """Over the images where something is positive."""
        return self.share.nanmean(1)

    @property
    def hit_rate(self) -> Float[Tensor, " map"]:
        """The pointing game's score: the share of images with a hit."""
        return self.hit.float().mean(1)

    @property
    def order(self) -> list[int]:
        """Places of the maps, the highest mean share first; those with nothing positive last."""
        return self.mean_share.nan_to_num(-1).argsort(descending=True, stable=True).tolist()

    def __len__(self) -> int:
        return len(self.chance)

    def to_frame(self) -> pd.DataFrame:
        """One row a map: mean share with its standard error, hit rate, chance, and how many images count."""
        import pandas as pd

        counted = (~self.share.isnan()).sum(1)
        spread = (self.share - self.mean_share[:, None]).square().nansum(1) / (counted - 1)
        return pd.DataFrame(
            {
                "map": self.labels,
                "share": self.mean_share.tolist(),
                "share_error": (spread / counted).sqrt().tolist(),
                "hit_rate": self.hit_rate.tolist(),
                "chance": float(self.chance.mean()),
                "images": len(self),
                "images_with_share": counted.tolist(),
            }
        )

    def figure(
        self,
        *,
        control: MaskScores | None = None,
        control_name: str = "clean images",
        count: int = MAX_ROWS,
    ) -> go.Figure:
        """One row a map, the highest share first; 95 % intervals over images; the dotted line is chance.

        Args:
            control: of the same maps where there is nothing to find (hollow markers), such as the paired clean images'.
            control_name: what the legend calls it.
            count: rows; the maps with the lowest shares are left out, and counted below.

        Raises:
            ValueError: the control is of other maps.
        """
        from decompclip.figures.scatter import PERCENT, Panel, point_panels
        from decompclip.figures.theme import Style

        if control is not None and control.labels != self.labels:
            raise ValueError(
                "expected a control of the same maps; received one of others; score both for the same heads"
            )
        order = self.order[:count]
        points, styles = {}, {}
        for scores, suffix, form in ((self, "", ""), (control, f" ({control_name})", "-open")):
            if scores is not None:
                share, hits = SHARE + suffix, HITS + suffix
                points |= {share: scores._share_points(order), hits: scores._hit_points(order)}
                styles |= {share: Style(share, "#D55E00", "solid", "circle" + form)}
                styles |= {hits: Style(hits, "#0072B2", "dash", "diamond" + form)}
        chance, more = 100 * float(self.chance.mean()), len(self.labels) - len(order)
        unit = "%" + (f" (not shown: {more} maps of lower share)" if more else "")
        panel = Panel("", f"{unit}; dotted: chance, {chance:.1f} %", points, PERCENT, chance)
        return point_panels([self.labels[i] for i in order], [panel], styles=styles)

    def _share_points(self, order: list[int]) -> list[Point]:
        from decompclip.figures.scatter import Point

        frame = self.to_frame().iloc[order]
        half = (Z * frame["share_error"]).fillna(0.0)
        low, high = (frame["share"] - half).clip(lower=0), (frame["share"] + half).clip(upper=1)
        ends = zip(frame["share"], low, high, strict=True)
        return [Point(100 * value, 100 * lower, 100 * upper) for value, lower, upper in ends]

    def _hit_points(self, order: list[int]) -> list[Point]:
        from decompclip.figures.scatter import Point

        return [Point.of(Rate.of(self.hit[i]).to_dict()) for i in order]

    def __repr__(self) -> str:
        best, toward = self.order[0], f" toward {self.toward}" if self.toward else ""
        return (
            f"MaskScores({len(self.labels)} maps of {self.kind}{toward}, {len(self)} images; highest {self.labels[best]}, "
            f"share {float(self.mean_share[best]):.3f}, hits {float(self.hit_rate[best]):.3f}; chance "
            f"{float(self.chance.mean()):.3f})"
        )


def score_masks(
    maps: TokenMaps, masks: Bool[Tensor, "batch h w"], *, inside: Inside = "touched"
) -> MaskScores:
    """Score maps against masks of pixels, such as `trigger.mask(height, width, indices)`.

    Prefix tokens lie nowhere, and count neither way. Of equal strongest patches the first in reading order counts.

    Args:
        maps: of some heads and images.
        masks: of the images, at the size that the tower takes.
        inside: "touched": a patch counts whole where the mask touches it; "covered": by the part that the mask covers.

    Returns:
        Share, hit and chance, map by map and image by image.

    Raises:
        ValueError: masks of another shape or not boolean, or an image whose mask touches no patch.
    """
    check_choice("inside", inside, Inside)
    weight = _on_patches(maps, masks)
    touched = weight > 0
    weight = touched.float() if inside == "touched" else weight
    positive = maps.patches.clamp(min=0).flatten(2)
    peak = positive.argmax(2)
    found = positive.amax(2) > 0
    return MaskScores(
        share=(positive * weight).sum(2) / positive.sum(2),  # 0 / 0, where nothing is positive, is nan
        hit=touched[torch.arange(len(maps)), peak] & found,
        chance=weight.mean(1),
        heads=maps.heads,
        labels=maps.labels,
        kind=maps.kind,
        toward=maps.toward,
        inside=inside,
    )


def _on_patches(maps: TokenMaps, masks: Tensor) -> Float[Tensor, "batch patch"]:
    """The part of each patch that the mask covers."""
    expected = (len(maps), *maps.image_size)
    if tuple(masks.shape) != expected or masks.dtype != torch.bool:
        raise ValueError(
            f"expected boolean masks [batch, h, w] = {list(expected)}; received {masks.dtype} {list(masks.shape)}; "
            "give one mask an image, at the size that the tower takes, as trigger.mask(h, w, indices) does"
        )
    (height, width), (rows, columns) = maps.patch_size, maps.patches.shape[2:]
    seen = masks.cpu()[:, : rows * height, : columns * width].float()
    covered = reduce(seen, "b (r y) (c x) -> b r c", "mean", y=height, x=width)
    weight = rearrange(covered, "b r c -> b (r c)")
    empty = (weight.amax(1) == 0).nonzero()[:, 0].tolist()
    if empty:
        raise ValueError(
            f"expected masks that touch a patch; received masks that touch none, first of image {empty[0]} "
            f"({len(empty)} in all); leave those images out"
        )
    return weight
