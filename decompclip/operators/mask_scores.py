"""Do maps find a trigger? Share of the positive contribution in a mask, and the pointing game (METHOD 4).

Scores count patches: a patch is inside where the mask touches it, since a token mixes all its pixels. The pointing
game (Zhang et al., 2016) asks whether the strongest patch is inside. Beside both stands chance, the share of
patches that are inside: an image that is all trigger is found by any map. The control is the same mask on the
clean twin, where there is nothing to find.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float
from torch import Tensor

from decompclip.operators.token_maps import MapKind, TokenMaps, facts_table

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Inside = Literal["touched", "covered"]


@dataclass(frozen=True, eq=False, repr=False)
class MaskScores:
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

    def figure(self, **options: Any) -> go.Figure:
        """Both scores of each map, with intervals; options as `decompclip.figures.mask_scores.scores` takes them."""
        from decompclip.figures.mask_scores import scores

        return scores(self, **options)

    def _facts(self) -> dict[str, str]:
        best = self.order[0]
        return {
            "maps": f"{len(self.labels)} of {self.kind}" + (f" toward {self.toward}" if self.toward else ""),
            "images": str(len(self)),
            "highest": f"{self.labels[best]}, share {float(self.mean_share[best]):.3f}, "
            f"hits {float(self.hit_rate[best]):.3f}",
            "chance": f"{float(self.chance.mean()):.3f}",
        }

    def __repr__(self) -> str:
        return f"MaskScores({'; '.join(f'{k}: {v}' for k, v in self._facts().items())})"

    def _repr_html_(self) -> str:
        return facts_table("MaskScores", self._facts())


def score_masks(
    maps: TokenMaps, masks: Bool[Tensor, "batch h w"], *, inside: Inside = "touched"
) -> MaskScores:
    """Score maps against masks of pixels, such as `trigger.mask(height, width, indices)`.

    Prefix tokens lie nowhere, and count neither way. Of equal strongest patches the first in reading order counts.

    Args:
        inside: "touched": a patch counts whole where the mask touches it; "covered": by the part that the mask covers.

    Raises:
        ValueError: masks of another shape or not boolean, or an image whose mask touches no patch.
    """
    if inside not in get_args(Inside):
        raise ValueError(f"expected inside of {get_args(Inside)}; received {inside!r}")
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
