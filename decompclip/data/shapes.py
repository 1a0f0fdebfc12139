"""Shapes: a procedural image-text world in which everything about an image is known.

One object per image, with six properties (`PROPERTIES`). Image `i` of a world is a pure function of
`(seed, i)`: nothing is stored, any index can be drawn at any time, and disjoint seeds or index ranges are
disjoint samples. Every image carries its attributes, so that what a head encodes can be scored.

The twelve silhouettes are signed-distance tables. A table samples the signed distance to a silhouette's outline on a
regular grid over [-1.5, 1.5]^2 (negative inside, y pointing down, the silhouette filling roughly [-1, 1]^2). Rendering
an object is then one bilinear look-up, which anti-aliases the edge at any size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from decompclip.data.files import SkippedFile
from decompclip.data.images import ImageBatch
from decompclip.data.pairs import Pairs

EXTENT = 1.5
"""Half-width of the square that a table covers, in units of the object's radius."""

TABLE_SIZE = 97

DRAWS = 16
"""Numbers drawn for an image: one a property, the others for what is nuisance."""

_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0.0, -1.0), (1.0, 0.8), (-1.0, 0.8)],
    "cross": [
        (-0.3, -1.0), (0.3, -1.0), (0.3, -0.3), (1.0, -0.3), (1.0, 0.3), (0.3, 0.3),
        (0.3, 1.0), (-0.3, 1.0), (-0.3, 0.3), (-1.0, 0.3), (-1.0, -0.3), (-0.3, -0.3),
    ],
    "arrow": [
        (-1.0, -0.35), (0.1, -0.35), (0.1, -0.95), (1.05, 0.0), (0.1, 0.95), (0.1, 0.35), (-1.0, 0.35),
    ],
    "hourglass": [(-0.9, -1.0), (0.9, -1.0), (0.15, 0.0), (0.9, 1.0), (-0.9, 1.0), (-0.15, 0.0)],
    "bolt": [(0.5, -1.0), (-0.75, 0.15), (-0.1, 0.15), (-0.5, 1.0), (0.75, -0.2), (0.1, -0.2)],
}  # fmt: skip


def _star() -> list[tuple[float, float]]:
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2 == 0, 1.08, 0.45)
    return [(float(r * np.cos(a)), float(r * np.sin(a))) for r, a in zip(radii, angles, strict=True)]


def _polygon(x: np.ndarray, y: np.ndarray, corners: list[tuple[float, float]]) -> np.ndarray:
    """Exact signed distance to a simple polygon (even-odd rule)."""
    nearest = np.full_like(x, np.inf)
    inside = np.zeros_like(x, dtype=bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        ex, ey = x1 - x0, y1 - y0
        t = np.clip(((x - x0) * ex + (y - y0) * ey) / (ex * ex + ey * ey), 0.0, 1.0)
        nearest = np.minimum(nearest, np.hypot(x - x0 - t * ex, y - y0 - t * ey))
        if ey != 0.0:
            inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + ex * (y - y0) / ey)
    return np.where(inside, -nearest, nearest)


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    t = np.linspace(0.0, 2 * np.pi, 72, endpoint=False)
    px = 16 * np.sin(t) ** 3 / 16.5
    py = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16.5 - 0.1
    return _polygon(x, y, list(zip(px.tolist(), py.tolist(), strict=True)))


def _mushroom(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    cap = np.maximum(np.hypot(x, y) - 1.0, y)
    stem = np.maximum(np.abs(x) - 0.28, np.maximum(-y - 0.1, y - 0.95))
    return np.minimum(cap, stem)


def _distance(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    r = np.hypot(x, y)
    match name:
        case "circle":
            return r - 0.92
        case "ring":
            return np.abs(r - 0.75) - 0.25
        case "crescent":
            return np.maximum(r - 1.0, 0.85 - np.hypot(x - 0.5, y))
        case "heart":
            return _heart(x, y)
        case "mushroom":
            return _mushroom(x, y)
        case "star":
            return _polygon(x, y, _star())
        case _:
            return _polygon(x, y, _POLYGONS[name])


@lru_cache(maxsize=1)
def distance_tables(names: tuple[str, ...]) -> Float[Tensor, "shape 1 rows columns"]:
    """Signed-distance tables of the named silhouettes, in units of the object's radius."""
    axis = np.linspace(-EXTENT, EXTENT, TABLE_SIZE)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return torch.from_numpy(np.stack([_distance(name, x, y) for name in names])).float().unsqueeze(1)


PROPERTIES: dict[str, tuple[str, ...]] = {
    "shape": (
        "circle", "square", "triangle", "star", "cross", "heart",
        "crescent", "ring", "arrow", "hourglass", "bolt", "mushroom",
    ),
    "colour": ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"),
    "texture": ("plain", "striped", "dotted", "checkered"),
    "size": ("small", "medium", "large"),
    "position": ("top left", "top right", "bottom left", "bottom right", "centre"),
    "background": ("white", "grey", "black", "tan", "navy"),
}  # fmt: skip
"""Every property of the world with its values; a class of the world is a shape."""

RESOLUTION = 48

_COLOURS = torch.tensor(
    [
        [0.88, 0.10, 0.10], [1.00, 0.52, 0.05], [0.98, 0.90, 0.10], [0.10, 0.65, 0.20],
        [0.10, 0.82, 0.88], [0.12, 0.25, 0.95], [0.55, 0.12, 0.75], [1.00, 0.50, 0.75],
    ]
)  # fmt: skip
_BACKGROUNDS = torch.tensor(
    [[0.96, 0.96, 0.96], [0.50, 0.50, 0.50], [0.04, 0.04, 0.04], [0.80, 0.70, 0.52], [0.06, 0.08, 0.30]]
)
# Lengths in units of the image's width, so that a world looks alike at every resolution.
_RADII = torch.tensor([0.20, 0.27, 0.35])
_CENTRES = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]) * 0.14
_PERIOD = 0.125
_NOISE = 0.03


@dataclass(frozen=True)
class Attributes:
    """Index of each property's value (into `PROPERTIES[name]`), one entry an image."""

    shape: Int[Tensor, " batch"]
    colour: Int[Tensor, " batch"]
    texture: Int[Tensor, " batch"]
    size: Int[Tensor, " batch"]
    position: Int[Tensor, " batch"]
    background: Int[Tensor, " batch"]

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: slice | Tensor) -> Attributes:
        return Attributes(*(getattr(self, f.name)[index] for f in fields(self)))

    def words(self, i: int) -> dict[str, str]:
        """The properties of image `i` in words."""
        return {name: values[int(getattr(self, name)[i])] for name, values in PROPERTIES.items()}


@dataclass(frozen=True)
class ShapesBatch:
    """Images in [0, 1], their attributes and the world's indices they stand at."""

    images: Float[Tensor, "batch 3 h w"]
    attributes: Attributes
    indices: Int[Tensor, " batch"]

    @property
    def labels(self) -> Int[Tensor, " batch"]:
        """The class of each image: its shape."""
        return self.attributes.shape


@dataclass(frozen=True)
class Shapes:
    """A finite, seeded sample of the world: images `0 .. length-1` of stream `seed`.

    Args:
        length: number of images.
        seed: the stream; equal `(seed, index)` gives the same image, whatever the batch it is drawn in.
        resolution: height and width in pixels.
    """

    length: int
    seed: int = 0
    resolution: int = RESOLUTION

    @property
    def class_names(self) -> tuple[str, ...]:
        return PROPERTIES["shape"]

    @property
    def pure(self) -> bool:
        """Whether it may be read ahead (`decompclip.data.feed`): it draws from generators of its own."""
        return True

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "3 h w"], int]:
        if not -self.length <= index < self.length:
            raise IndexError(f"image {index} of a Shapes world of {self.length} images")
        batch = self.draw([index % self.length])
        return batch.images[0], int(batch.labels[0])

    def attributes(self) -> Attributes:
        """Of all images, of which none is drawn."""
        uniform = np.empty((self.length, DRAWS))
        for index in range(self.length):
            uniform[index] = _generator(self.seed, index).random(DRAWS)
        return _attributes(torch.from_numpy(uniform).float())

    def batches(self, batch_size: int = 256) -> Iterator[ShapesBatch]:
        """The whole sample in order, `batch_size` images at a time.

        Args:
            batch_size: images in a batch.
        """
        return self.part(range(self.length), batch_size)

    def part(self, places: Sequence[int], batch_size: int = 256) -> Iterator[ShapesBatch]:
        """The images at some places, as `batches` gives them."""
        for start in range(0, len(places), batch_size):
            yield self.draw(places[start : start + batch_size])

    def draw(self, indices: Sequence[int]) -> ShapesBatch:
        """Render the images at `indices`.

        Args:
            indices: places in the sample.

        Raises:
            IndexError: an index lies outside `0 .. length-1`.
        """
        if len(indices) and not (min(indices) >= 0 and max(indices) < self.length):
            raise IndexError(
                f"indices {min(indices)}..{max(indices)} of a Shapes world of {self.length} images"
            )
        return draw(indices, seed=self.seed, resolution=self.resolution)


def draw(indices: Sequence[int], *, seed: int, resolution: int = RESOLUTION) -> ShapesBatch:
    """Render the images that stand at `indices` of the endless stream `seed`.

    Args:
        indices: which images of the stream.
        seed, resolution: as `Shapes`.
    """
    n, pixels = len(indices), 3 * resolution * resolution
    uniform = np.empty((n, DRAWS))
    noise = np.empty((n, pixels), dtype=np.float32)
    for row, index in enumerate(indices):
        generator = _generator(seed, index)
        uniform[row] = generator.random(DRAWS)
        generator.standard_normal(dtype=np.float32, out=noise[row])
    u = torch.from_numpy(uniform).float()
    attributes = _attributes(u)
    images = _render(attributes, u[:, len(PROPERTIES) :], resolution)
    images += _NOISE * torch.from_numpy(noise).view_as(images)
    return ShapesBatch(images.clamp_(0.0, 1.0), attributes, torch.tensor(list(indices), dtype=torch.long))


def _generator(seed: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, index]))


def _attributes(u: Float[Tensor, "batch draw"]) -> Attributes:
    """`u` holds an image's first draws, in [0, 1)."""
    sizes = [len(values) for values in PROPERTIES.values()]
    # the last is the float32 rounding of a uniform just under one
    return Attributes(*((u[:, k] * m).long().clamp_max(m - 1) for k, m in enumerate(sizes)))


def _render(
    attributes: Attributes, u: Float[Tensor, "batch nuisance"], resolution: int
) -> Float[Tensor, "batch 3 h w"]:
    """Noise-free images; `u` holds the nuisance draws (jitter, tilt, light, phase) in [0, 1)."""
    jitter = 2 * u - 1
    radius = _RADII[attributes.size] * (1 + 0.07 * jitter[:, 0])
    centre = _CENTRES[attributes.position] + 0.02 * jitter[:, 1:3]
    tilt = 0.15 * jitter[:, 3]

    axis = (torch.arange(resolution) + 0.5) / resolution - 0.5
    x = rearrange(axis, "w -> 1 1 w") - rearrange(centre[:, 0], "b -> b 1 1")
    y = rearrange(axis, "h -> 1 h 1") - rearrange(centre[:, 1], "b -> b 1 1")
    cos, sin = (rearrange(f(tilt), "b -> b 1 1") for f in (torch.cos, torch.sin))
    px, py = cos * x + sin * y, cos * y - sin * x  # object coordinates, in image widths

    r = rearrange(radius, "b -> b 1 1")
    grid = torch.stack([px / r, py / r], dim=-1) / EXTENT
    tables = distance_tables(PROPERTIES["shape"])[attributes.shape]
    distance = F.grid_sample(tables, grid, padding_mode="border", align_corners=True)[:, 0] * r
    alpha = (0.5 - distance * resolution).clamp(0.0, 1.0)

    light = 1 + 0.12 * (_unit(jitter[:, 4:6])[:, :1, None] * x + _unit(jitter[:, 4:6])[:, 1:, None] * y) / r
    marks = _texture(attributes.texture, px, py, phase=u[:, 6:8])
    colour = (_COLOURS[attributes.colour] + 0.04 * jitter[:, 8:9]).clamp(0, 1)[:, :, None, None]
    ground = (_BACKGROUNDS[attributes.background] + 0.03 * jitter[:, 9:10]).clamp(0, 1)[:, :, None, None]
    surface = (colour * (1 - 0.55 * marks[:, None]) * light[:, None]).clamp(0, 1)
    return ground + alpha[:, None] * (surface - ground)


def _unit(v: Float[Tensor, "batch 2"]) -> Float[Tensor, "batch 2"]:
    return F.normalize(v, dim=1)


def _texture(
    kind: Int[Tensor, " batch"],
    x: Float[Tensor, "batch h w"],
    y: Float[Tensor, "batch h w"],
    *,
    phase: Float[Tensor, "batch 2"],
) -> Float[Tensor, "batch h w"]:
    """Darkness of the object's surface in [0, 1]: plain 0, stripes, dots or checks elsewhere."""
    a = torch.sin(2 * torch.pi * (x / _PERIOD + phase[:, 0, None, None]))
    b = torch.sin(2 * torch.pi * (y / _PERIOD + phase[:, 1, None, None]))
    stripes, dots, checks = b, a + b - 0.5, a * b * 3
    patterns = torch.stack([torch.full_like(a, -1.0), stripes, dots, checks], dim=1)
    chosen = patterns[torch.arange(len(kind)), kind]
    return torch.sigmoid(8 * chosen) * (kind != 0)[:, None, None]


CONTEXT_LENGTH = 20
MENTION = 0.5
"""Probability that a caption mentions a given property other than the shape."""

GENERIC = 0.1
"""Probability that a caption says "object" in place of the shape's name."""

_PREFIXES = ("", "a photo of ", "a picture of ", "an image of ", "a drawing of ", "there is ", "this is ")
_POSITION_PHRASES = ("at the {}", "in the {}")
_BACKGROUND_PHRASES = ("on a {} background", "against a {} background")
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
        str(generator.choice(options)) for options in (_PREFIXES, _POSITION_PHRASES, _BACKGROUND_PHRASES)
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
    texts = [
        *_PREFIXES,
        *_POSITION_PHRASES,
        *_BACKGROUND_PHRASES,
        *(v for values in PROPERTIES.values() for v in values),
    ]
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
        length: number of pairs.
        seed: of the world.
        resolution: side of the images in pixels.
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
        super().__init__(
            class_names=self.world.class_names,
            templates=templates("shape"),
            caption_seed=seed + 10_000 if caption_seed is None else caption_seed,
            order_seed=order_seed,
        )

    @cached_property
    def _attributes(self) -> Attributes:
        return self.world.attributes()

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


@dataclass(frozen=True)
class ShapesSource:
    """Images of the Shapes world as a model takes them, labelled by their shape, named `shapes/<seed>/<index>`.

    Args:
        world: which images.
        normalise: from pixels in [0, 1] to the model's input.
        transform: applied to the pixels before that, with each image's index; for instance a trigger.
    """

    world: Shapes
    normalise: Callable[[Float[Tensor, "batch 3 h w"]], Float[Tensor, "batch 3 h w"]]
    transform: (
        Callable[[Float[Tensor, "batch 3 h w"], Sequence[int]], Float[Tensor, "batch 3 h w"]] | None
    ) = None

    @property
    def pure(self) -> bool:
        """Whether it may be read ahead (`decompclip.data.feed`): a transform may draw."""
        return self.transform is None

    @property
    def skipped(self) -> tuple[SkippedFile, ...]:
        return ()

    def __len__(self) -> int:
        return len(self.world)

    def batches(self, batch_size: int = 64) -> Iterator[ImageBatch]:
        """All images in order, `batch_size` at a time."""
        return self.part(range(len(self)), batch_size)

    def part(self, places: Sequence[int], batch_size: int = 64) -> Iterator[ImageBatch]:
        """The images at some places, as `batches` gives them."""
        for batch in self.world.part(places, batch_size):
            indices = batch.indices.tolist()
            pixels = batch.images if self.transform is None else self.transform(batch.images, indices)
            names = tuple(f"shapes/{self.world.seed}/{index}" for index in indices)
            yield ImageBatch(self.normalise(pixels), batch.labels, names, batch.indices)
