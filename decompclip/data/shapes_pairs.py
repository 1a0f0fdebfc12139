"""Natural captions of the Shapes world: the shape, and a random subset of the other properties.

The Shapes world as image-caption pairs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
from jaxtyping import Int
from torch import Tensor

from decompclip.data.pairs import Pairs
from decompclip.data.shapes import PROPERTIES, RESOLUTION, Attributes, Shapes

CONTEXT_LENGTH = 20
MENTION = 0.5
"""Probability that a caption mentions a given property other than the shape."""

GENERIC = 0.1
"""Probability that a caption says "object" in place of the shape's name."""

_PREFIXES = ("", "a photo of ", "a picture of ", "an image of ", "a drawing of ", "there is ", "this is ")
_POSITIONS = ("at the {}", "in the {}")
_BACKGROUNDS = ("on a {} background", "against a {} background")
_SHAPE_PROMPTS = (
    "{}",
    "a {}",
    "a photo of a {}",
    "a picture of a {}",
    "an image of a {}",
    "a drawing of a {}",
)


def caption(words: dict[str, str], generator: np.random.Generator) -> str:
    """One caption for an image whose properties are `words` (see `Attributes.words`)."""
    u = generator.random(6)
    kept = {
        name: words[name] for name, x in zip(PROPERTIES, u, strict=True) if name != "shape" and x < MENTION
    }
    noun = "object" if u[0] < GENERIC else words["shape"]
    adjectives = [kept[name] for name in ("size", "colour", "texture") if name in kept]
    phrase = with_article(" ".join([*adjectives, noun]))
    prefix, position, background = (
        str(generator.choice(options)) for options in (_PREFIXES, _POSITIONS, _BACKGROUNDS)
    )
    tail = [position.format(kept["position"])] if "position" in kept else []
    tail += [background.format(kept["background"])] if "background" in kept else []
    return " ".join([prefix + phrase, *tail])


def shapes_captions(attributes: Attributes, indices: Sequence[int], *, seed: int) -> list[str]:
    """Captions of a batch; the caption of an image is a pure function of `(seed, index)`."""
    return [
        caption(attributes.words(row), np.random.Generator(np.random.Philox(key=[seed, int(index)])))
        for row, index in enumerate(indices)
    ]


def with_article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def vocabulary() -> tuple[str, ...]:
    """Every word that a caption can hold, sorted."""
    texts = [*_PREFIXES, *_POSITIONS, *_BACKGROUNDS, *(v for values in PROPERTIES.values() for v in values)]
    return tuple(sorted({"a", "an", "object", *re.findall(r"[a-z]+", " ".join(texts))}))


def templates(name: str) -> tuple[str, ...]:
    """Zero-shot prompt templates for one property; `{}` takes the property's value.

    For a property other than the shape the templates run over all shapes, since captions nearly always
    name one.
    """
    if name == "shape":
        return _SHAPE_PROMPTS
    nouns = ("object", *PROPERTIES["shape"])
    match name:
        case "position":
            return tuple(f"{with_article(noun)} in the {{}}" for noun in nouns)
        case "background":
            return tuple(f"{with_article(noun)} on a {{}} background" for noun in nouns)
        case _:
            return tuple(f"a {{}} {noun}" for noun in nouns)


class ShapesPairs(Pairs):
    """Images of the Shapes world with natural captions.

    Args:
        length, seed, resolution: as `Shapes`.
        caption_seed: of the captions; the bundled models were trained with `seed + 10_000`, the default.
        order_seed: as `Pairs`.
    """

    def __init__(
        self,
        length: int,
        *,
        seed: int = 0,
        resolution: int = RESOLUTION,
        caption_seed: int | None = None,
        order_seed: int = 0,
    ) -> None:
        self.world = Shapes(length, seed=seed, resolution=resolution)
        self.caption_seed = seed + 10_000 if caption_seed is None else caption_seed
        super().__init__(
            class_names=self.world.class_names, templates=templates("shape"), order_seed=order_seed
        )

    @cached_property
    def _attributes(
        self,
    ) -> Attributes:  # they do not depend on the resolution, and one pixel is drawn at once
        return replace(self.world, resolution=1).draw(range(len(self.world))).attributes

    @cached_property
    def ids(self) -> Sequence[str]:
        return [f"shapes/{self.world.seed}/{index}" for index in range(len(self.world))]

    @cached_property
    def captions(self) -> Sequence[str]:
        return shapes_captions(self._attributes, range(len(self.world)), seed=self.caption_seed)

    @property
    def labels(self) -> Int[Tensor, " pair"]:
        return self._attributes.shape

    def _images(self, indices: Sequence[int]) -> list[Tensor | str]:
        return list(self.world.draw(indices).images)
