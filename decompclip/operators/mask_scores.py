"""Do maps find a trigger, or an object? Share of what is positive in a mask, the pointing game, and scores of segmentation.

    score_masks(maps, trigger.mask(h, w, indices))                       a trigger (docs/method.md, section 4)
    segment({"attention": maps.patches[0]}, box_masks(boxes, h, w))      an object

Scores count patches: a patch is inside where the mask touches it, since a token mixes all its pixels. The pointing game
(Zhang et al., 2016) asks whether the strongest patch is inside. Chance is the share of patches that are inside. The
control is the same mask on the paired clean image, where there is nothing to find.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from decompclip.api import check_choice, check_count
from decompclip.display import Result
from decompclip.intervals import CONFIDENCE, Rate, Z
from decompclip.operators.tokens import MapKind, TokenMaps

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
        return self.mean_share.nan_to_num(-torch.inf).argsort(descending=True, stable=True).tolist()

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
        return point_panels(
            [self.labels[i] for i in order], [panel], styles=styles, bars="95 % interval over images"
        )

    def _share_points(self, order: list[int]) -> list[Point]:
        from decompclip.figures.scatter import Point

        frame = self.to_frame().iloc[order]
        return [
            # of one image there is no error
            Point(100 * share)
            if math.isnan(error)
            else Point(100 * share, 100 * max(share - Z * error, 0), 100 * min(share + Z * error, 1))
            for share, error in zip(frame["share"], frame["share_error"], strict=True)
        ]

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


MEASURES = ("pixel accuracy", "mean IoU", "mean AP")


@dataclass(frozen=True, eq=False, repr=False)
class Segmentation(Result):
    """How well maps tell an object from its background, pixel by pixel (`segment`).

    Attributes:
        labels: of the maps.
        intersection, union: of what a map says and the mask, in pixels: of the background, and of the object.
        precision: average precision in each image.
        pixels: of an image.
    """

    labels: tuple[str, ...]
    intersection: Float[Tensor, "map batch 2"]
    union: Float[Tensor, "map batch 2"]
    precision: Float[Tensor, "map batch"]
    pixels: int

    @property
    def scores(self) -> Float[Tensor, "map measure"]:
        """Of each map, the three `MEASURES`."""
        return self._scores(torch.ones(1, len(self), dtype=torch.float64)).squeeze(0)

    def intervals(self, *, draws: int = 2000, seed: int = 0) -> Float[Tensor, "2 map measure"]:
        """95 % intervals, low and high: percentiles over bootstrap draws of the images.

        Args:
            draws: how many.
            seed: of the draws.
        """
        return _ends(self._drawn(draws, seed))

    def difference(self, a: str, b: str, *, draws: int = 2000, seed: int = 0) -> Float[Tensor, "3 measure"]:
        """Scores of one map less those of another, and the 95 % interval over draws of the same images for both.

        Raises:
            ValueError: there is no such map.
        """
        check_choice("a", a, self.labels)
        check_choice("b", b, self.labels)
        first, second = self.labels.index(a), self.labels.index(b)
        drawn = self._drawn(draws, seed)
        ends = _ends(drawn[:, first] - drawn[:, second])
        return torch.cat([(self.scores[first] - self.scores[second])[None], ends])

    def _drawn(self, draws: int, seed: int) -> Float[Tensor, "draw map measure"]:
        check_count(draws, "draws", "draws")
        n, generator = len(self), torch.Generator().manual_seed(seed)
        counts = torch.zeros(draws, n, dtype=torch.float64)
        chosen = torch.randint(n, (draws, n), generator=generator)
        return self._scores(counts.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.float64)))

    def _scores(self, counts: Float[Tensor, "draw batch"]) -> Float[Tensor, "draw map measure"]:
        """With each image as often as it is drawn."""
        both, either = (
            torch.einsum("db,mbc->dmc", counts, x.double()) for x in (self.intersection, self.union)
        )
        precision = torch.einsum("db,mb->dm", counts, self.precision.double()) / counts.sum(1, keepdim=True)
        accuracy = both.sum(2) / (counts.sum(1, keepdim=True) * self.pixels)
        return torch.stack([accuracy, (both / either.clamp_min(1)).mean(2), precision], dim=2)

    def to_frame(self) -> pd.DataFrame:
        """One row a map and measure: score with the ends of its interval."""
        import pandas as pd

        low, high = self.intervals().flatten(1).tolist()
        names = [(label, measure) for label in self.labels for measure in MEASURES]
        columns = {"map": [n for n, _ in names], "measure": [n for _, n in names]}
        return pd.DataFrame(columns | {"score": self.scores.flatten().tolist(), "low": low, "high": high})

    def figure(self) -> go.Figure:
        """One row a map, a panel a measure, with 95 % intervals over images."""
        from decompclip.figures.scatter import Panel, Point, point_panels

        frame, panels = self.to_frame(), []
        for measure in MEASURES:
            rows = frame[frame["measure"] == measure]
            ends = zip(rows["score"], rows["low"], rows["high"], strict=True)
            panels.append(
                Panel(measure, "%", {"all images": [Point(*(100 * x for x in row)) for row in ends]})
            )
        return point_panels(self.labels, panels, bars="95 % interval over images")

    def __len__(self) -> int:
        return self.intersection.shape[1]

    def __repr__(self) -> str:
        best = int(self.scores[:, 2].argmax())
        return f"Segmentation({len(self.labels)} maps, {len(self)} images; highest AP {self.labels[best]})"


def _ends(drawn: Float[Tensor, "draw ..."]) -> Float[Tensor, "2 ..."]:
    """Of the interval that holds a share `CONFIDENCE` of the draws."""
    return drawn.quantile(drawn.new_tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]), dim=0)


def box_masks(boxes: Int[Tensor, "batch 4"], height: int, width: int) -> Bool[Tensor, "batch h w"]:
    """Masks of boxes, each its left, top, right and bottom pixel, which belong to it.

    Args:
        boxes: one an image.
        height, width: of the images.

    Raises:
        ValueError: boxes of another shape, or one that is empty, or not within the image.
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"expected boxes [batch, 4]; received {list(boxes.shape)}; give one an image")
    boxes = boxes.cpu()
    left, top, right, bottom = boxes.T[..., None]
    within = (
        (left >= 0) & (top >= 0) & (left <= right) & (top <= bottom) & (right < width) & (bottom < height)
    )
    if not within.all():
        worst = int((~within[:, 0]).nonzero()[0])
        raise ValueError(
            f"expected boxes left, top, right, bottom within {height} x {width} pixels; received {boxes[worst].tolist()} of "
            f"image {worst}; give boxes at the size of the masks"
        )
    x, y = torch.arange(width), torch.arange(height)
    columns, rows = (x >= left) & (x <= right), (y >= top) & (y <= bottom)
    return rows[:, :, None] & columns[:, None]


def segment(
    maps: Mapping[str, Float[Tensor, "batch row column"]], masks: Bool[Tensor, "batch h w"]
) -> Segmentation:
    """Score maps as segmentations: what of an image do they call the object?

    As Chefer, Gur and Wolf (CVPR 2021) and Gandelsman, Efros and Steinhardt (ICLR 2024) have it. A map is enlarged to
    the image, bilinearly, and brought to 0..1; pixels above its mean are the object. Pixel accuracy counts all pixels of all
    images; the IoU of the object, and of the background, are those of all images together, of which the mean is taken. The
    average precision ranks the pixels of an image by the map for the object, and by one less the map for the background; of it
    the mean over images.

    Args:
        maps: of the same images, by name: patches, such as `TokenMaps.patches` of one map.
        masks: True on the object, at any size.

    Returns:
        The scores, map by map.

    Raises:
        ValueError: no maps or images, maps or masks of another shape, maps that are not finite, masks that are not boolean, or maps
            and masks of other numbers of images.
    """
    from sklearn.metrics import average_precision_score

    if not isinstance(maps, Mapping) or not all(isinstance(x, Tensor) and x.ndim == 3 for x in maps.values()):
        found = maps if isinstance(maps, Mapping) else {type(maps).__name__: maps}
        shapes = {name: list(getattr(x, "shape", ())) for name, x in found.items()}
        raise ValueError(
            f"expected maps [batch, row, column] by name; received {shapes}; of TokenMaps take patches of one map, or their sum "
            "over maps: {'attention': maps.patches.mean(0)}"
        )
    if masks.dtype != torch.bool or masks.ndim != 3:
        raise ValueError(
            f"expected boolean masks [batch, h, w]; received {masks.dtype} {list(masks.shape)}; say which numbers are the object, such "
            "as masks > 0; pixels that are to be ignored have no place here: leave those images out"
        )
    masks, maps = masks.cpu(), {name: x.detach().cpu() for name, x in maps.items()}
    if not maps or not len(masks) or any(len(x) != len(masks) for x in maps.values()):
        sizes = {name: len(x) for name, x in maps.items()}
        raise ValueError(
            f"expected a map for each of {len(masks)} masks, at least one; received {sizes or 'no maps'}"
        )
    both, either, precision = [], [], []
    sides = torch.stack([~masks, masks], dim=-1)  # [batch h w side]
    for name, of_map in maps.items():
        if not of_map.isfinite().all():
            raise ValueError(f"expected finite maps; received nan or inf in {name!r}; leave those images out")
        large = functional.interpolate(of_map[:, None].double(), masks.shape[1:], mode="bilinear")[:, 0]
        low, high = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
        level = (large - low) / (high - low).clamp_min(torch.finfo(large.dtype).tiny)
        said = level > level.mean((1, 2), keepdim=True)
        says = torch.stack([~said, said], dim=-1)
        both.append((says & sides).sum((1, 2)))
        either.append((says | sides).sum((1, 2)))
        ranked = torch.stack([1 - level, level], dim=-1).flatten(1).numpy()
        precision.append(
            [average_precision_score(t, s) for t, s in zip(sides.flatten(1).numpy(), ranked, strict=True)]
        )
    return Segmentation(
        labels=tuple(maps),
        intersection=torch.stack(both).double(),
        union=torch.stack(either).double(),
        precision=torch.tensor(precision, dtype=torch.float64),
        pixels=masks[0].numel(),
    )
