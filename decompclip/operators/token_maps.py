"""TokenMaps: one number a token, for some heads and images, laid out as the patches lie in the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from einops import repeat
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from decompclip.figures.gallery import Overlay


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

    def select(self, maps: Sequence[int] | None = None, images: Sequence[int] | None = None) -> TokenMaps:
        """Some of the maps, of some of the images, by their places.

        Raises:
            IndexError: there is no such map or image.
        """
        count = len(self.patches)
        maps = range(count) if maps is None else [_place(i, count, "a map") for i in maps]
        images = range(len(self)) if images is None else [_place(i, len(self), "an image") for i in images]
        rows, columns = torch.tensor(list(maps), dtype=torch.long), list(images)
        return replace(
            self,
            patches=self.patches[rows][:, columns],
            prefix=self.prefix[rows][:, columns],
            heads=tuple(self.heads[i] for i in maps) if self.heads else (),
            names=tuple(self.names[i] for i in images),
            pictures=None if self.pictures is None else self.pictures[columns],
        )

    def pixels(self, *, smooth: bool = False) -> Float[Tensor, "map batch h w"]:
        """Every pixel with the number of its patch; zero in a margin that no patch sees.

        Args:
            smooth: interpolate between the middles of patches, for the eye; scores are those of patches.
        """
        (height, width), (rows, columns) = self.patch_size, self.patches.shape[2:]
        if smooth:
            size = (rows * height, columns * width)
            large = F.interpolate(self.patches, size, mode="bilinear", align_corners=False)
        else:
            large = repeat(self.patches, "m b r c -> m b (r y) (c x)", y=height, x=width)
        bottom, right = (size - seen for size, seen in zip(self.image_size, large.shape[2:], strict=True))
        return F.pad(large, (0, right, 0, bottom))

    def overlay(
        self, index: int = 0, image: int = 0, *, smooth: bool = False, top: float | None = None
    ) -> UInt8[Tensor, "h w 3"]:
        """One map over its picture, at the image's resolution.

        Args:
            top: number of the strongest colour; by default the map's largest over all images.

        Raises:
            ValueError: the pictures are not known.
            IndexError: there is no such map or image.
        """
        from decompclip.figures.pictures import lay_over

        if self.pictures is None:
            raise ValueError(
                "expected maps that know their pictures; received maps without; make them with a HookedCLIP and "
                "pictures=True"
            )
        one = self.select([index], [image])
        top = float(self.top[index]) if top is None else top
        return lay_over(self.pictures[image], one.pixels(smooth=smooth)[0, 0], signed=self.signed, top=top)

    @property
    def signed(self) -> bool:
        """Whether numbers below zero mean something."""
        return self.kind == "contribution"

    def to_frame(self) -> pd.DataFrame:
        """One row a token: layer, head, image, name, token, row, column (none of prefix tokens), value."""
        import pandas as pd

        n_prefix, columns = self.prefix.shape[2], self.patches.shape[3]
        values = torch.cat([self.prefix, self.patches.flatten(2)], dim=2)
        which, image, token = np.indices(tuple(values.shape)).reshape(3, -1)
        patch = token - n_prefix
        heads = np.array(self.heads or [(-1, -1)])

        def known(numbers: np.ndarray, where: np.ndarray) -> pd.Series:
            return pd.Series(numbers, dtype="Int64").where(pd.Series(where))

        of_head = np.full(len(token), bool(self.heads))
        return pd.DataFrame(
            {
                "layer": known(heads[which, 0], of_head),
                "head": known(heads[which, 1], of_head),
                "image": image,
                "name": np.array(self.names, dtype=object)[image],
                "token": token,
                "row": known(patch // columns, patch >= 0),
                "column": known(patch % columns, patch >= 0),
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

    def _facts(self) -> dict[str, str]:
        shown = ", ".join(self.labels[:6]) + (
            f" and {extra} more" if (extra := len(self.labels) - 6) > 0 else ""
        )
        rows, columns = self.patches.shape[2:]
        facts = {"maps": shown, "images": str(len(self)), "patches": f"{rows} x {columns}"}
        facts["other tokens"] = str(self.prefix.shape[2])
        return facts | ({"toward": self.toward} if self.toward else {})

    def __repr__(self) -> str:
        return f"TokenMaps({self.kind}: {', '.join(f'{k}: {v}' for k, v in self._facts().items())})"

    def _repr_html_(self) -> str:
        return facts_table(f"TokenMaps: {self.kind}", self._facts())


def facts_table(caption: str, facts: dict[str, str]) -> str:
    """A small table for notebooks, with everything in it escaped."""
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items()
    )
    return f"<table><caption>{escape(caption)}</caption>{rows}</table>"


def _place(index: int, size: int, what: str) -> int:
    if not -size <= index < size:
        raise IndexError(f"expected {what} in 0..{size - 1}; received {index}")
    return index % size
