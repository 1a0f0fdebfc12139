"""What operators read: batches of images, encoded texts, and what stands in where a user gives none."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from decompclip.api import check_count
from decompclip.data.feed import feed
from decompclip.data.images import ImageSource
from decompclip.data.pairs import Pairs
from decompclip.data.shapes import PROPERTIES, Shapes, vocabulary, with_article
from decompclip.decomposition.maps import term_maps
from decompclip.models.text import WordTokenizer, texts_of

if TYPE_CHECKING:
    from decompclip.models.clip import HookedCLIP


Images = Tensor | Iterable[Any] | ImageSource
"""`[batch 3 h w]` as the tower takes them, batches of such images one after another, or a source of them."""


def image_batches(
    images: Images, *, batch_size: int, device: torch.device | str | None = None
) -> Iterator[Float[Tensor, "batch 3 h w"]]:
    """Batches of at most `batch_size` images, none of them empty.

    Args:
        images: a tensor, batches, or a source.
        batch_size: images in a batch.
        device: where a source's images go; see `decompclip.data.feed.feed`.

    Raises:
        ValueError: a batch size that is no whole number of at least one, or something else than batches of images.
    """
    check_count(batch_size, "images", "batch_size")
    batches: Iterable[Any] = [images] if isinstance(images, Tensor) else ()
    if isinstance(images, ImageSource) and not isinstance(images, Pairs):  # whose pixels are not normalised
        batches = (batch.images for batch in feed(images, batch_size, device=device))
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


N_IMAGES = 1024
SEED = 20_240_507
"""Of the default images; no bundled model has seen this stream."""

UNIT = 1e-3
"""How far from one a unit feature's length may be: what half precision leaves of it."""


@dataclass(frozen=True, eq=False, repr=False)
class TextFeatures:
    """Texts and their unit features under a model's text tower.

    Attributes:
        model: fingerprint of the model's image tower (`decompclip.decomposition.maps`), which shows whether terms are of
            the same model; None where unknown.
    """

    texts: tuple[str, ...]
    features: Float[Tensor, "text d_embed"]
    model: Float[Tensor, " weight"] | None = None

    def __post_init__(self) -> None:
        if not self.texts or self.features.ndim != 2 or len(self.features) != len(self.texts):
            raise ValueError(
                f"expected at least one text and features [text, d_embed] of as many; received {len(self.texts)} texts, "
                f"features {list(self.features.shape)}; make both with encode_texts"
            )
        if not self.features.isfinite().all():
            bad = int((~self.features.isfinite().all(1)).nonzero()[0])
            raise ValueError(
                f"expected finite text features; received nan or inf, first for {self.texts[bad]!r}; leave that text "
                "out, or encode in fp32"
            )
        lengths = self.features.double().norm(dim=1)
        worst = int((off := (lengths - 1).abs()).argmax())
        if off[worst] > UNIT:
            raise ValueError(
                f"expected text features of length 1, or the longest would be picked; received one of length "
                f"{float(lengths[worst]):.3g} for {self.texts[worst]!r}; normalise them, or make them with encode_texts"
            )

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        return f"TextFeatures({len(self)} texts: {self.texts[0]!r}, ...)"


def encode_texts(
    model: HookedCLIP,
    texts: TextFeatures | Sequence[str] | Path | None = None,
    *,
    batch_size: int = 256,
) -> TextFeatures:
    """Texts with their unit features, for any number of calls of `textspan`.

    Args:
        model: whose text tower encodes them.
        texts: descriptions, or the path of a file with one a line; None: the default pool for this model. Features
            come back as they are.
        batch_size: texts at a time.

    Returns:
        The texts and their features.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there are no texts, an empty one, a single string, or the file holds none.
    """
    if isinstance(texts, TextFeatures):
        return texts
    if isinstance(texts, str):
        raise ValueError(
            f"expected a list of texts; received the single string {texts!r}; put it into a list, or pass the path of a "
            "text file as pathlib.Path"
        )
    if isinstance(texts, Path):
        texts = load_texts(texts)
    texts = default_texts(model) if texts is None else tuple(texts)
    if not texts:
        raise ValueError("expected at least one text; received none; leave texts out for the default pool")
    if "" in map(str.strip, texts_of(texts)):
        raise ValueError(
            f"expected texts that say something; received an empty one among {len(texts)}; leave it out"
        )
    with torch.no_grad():
        parts = [
            F.normalize(model.encode_text(texts[start : start + batch_size]).float(), dim=-1)
            for start in range(0, len(texts), batch_size)
        ]
    return TextFeatures(texts, torch.cat(parts), term_maps(model.visual, "centred").fingerprint)


def default_texts(model: HookedCLIP) -> tuple[str, ...]:
    """The general pool; for a model with a vocabulary of its own, what of the Shapes pool it has words for.

    Raises:
        ValueError: it has words for none.
    """
    if not isinstance(model.tokenizer, WordTokenizer):
        return general_texts()
    texts = shapes_texts(model.tokenizer.words)
    if not texts:
        raise ValueError(
            f"expected texts for {model.name!r}, whose vocabulary is none of the Shapes world's; received none; pass "
            "texts=[...] in the words of model.tokenizer.words"
        )
    return texts


def default_images(model: HookedCLIP, *, batch_size: int) -> Iterator[Float[Tensor, "batch 3 h w"]]:
    """Drawings of the Shapes world in the model's size, at least twice as many as a term has coordinates.

    A model with no vocabulary of its own was trained on photographs: it is warned about.
    """
    world = Shapes(max(N_IMAGES, 2 * model.cfg.d_embed), seed=SEED, resolution=max(model.image_size))
    if not isinstance(model.tokenizer, WordTokenizer):
        warnings.warn(
            f"no images given: {model.name!r} is read on {len(world)} drawings of the Shapes world, which say little "
            "about a model trained on photographs; pass images=FolderSource(folder, model.preprocess), or batches of "
            "preprocessed images",
            stacklevel=4,
        )
    return _drawings(model, world.batches(batch_size))


def _drawings(model: HookedCLIP, batches: Iterable[Any]) -> Iterator[Float[Tensor, "batch 3 h w"]]:
    for batch in batches:
        size = tuple(model.image_size)  # where it is theirs, they stay as they are, to the last bit
        yield model.normalize(F.interpolate(batch.images, size, mode="bilinear", antialias=True))


POOL = Path(__file__).parents[1] / "data" / "pool" / "descriptions.txt"
"""The general pool; `analyses/training/build_text_pool.py` builds it from lists of words."""

_ORDER = ("size", "colour", "texture")  # of adjectives, as captions put them


def general_texts() -> tuple[str, ...]:
    """Over 3,000 short descriptions of whatever an image may show, written for this project."""
    return load_texts(POOL)


def load_texts(path: str | Path) -> tuple[str, ...]:
    """The descriptions of a text file, one a line; blank lines and repeated ones are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no description, or is not UTF-8 text.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a text file with one description a line; received {path}, which is no file"
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"expected a text file in UTF-8; received {path}, which is not ({error.reason} at byte {error.start}); "
            "save it as UTF-8"
        ) from None
    texts = tuple(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not texts:
        raise ValueError(
            f"expected a text file with one description a line; received {path}, which holds none; write at least "
            "one"
        )
    return texts


def shapes_texts(words: Sequence[str] | None = None) -> tuple[str, ...]:
    """Descriptions of the Shapes world: every value of a property, then every pair of values of two.

    Args:
        words: a vocabulary; texts with other words are left out. None: that of the world's captions.
    """
    known = set(vocabulary() if words is None else words)
    pairs = (
        _describe({a: x, b: y})
        for a, b in combinations(PROPERTIES, 2)
        for x, y in product(PROPERTIES[a], PROPERTIES[b])
    )
    singles = (_describe({name: value}) for name, values in PROPERTIES.items() for value in values)
    return tuple(text for text in chain(singles, pairs) if known.issuperset(text.split()))


def _describe(words: dict[str, str]) -> str:
    """As a caption says it; an image's shape is an "object" where it is not named."""
    adjectives = [words[name] for name in _ORDER if name in words]
    phrase = [with_article(" ".join([*adjectives, words.get("shape", "object")]))]
    phrase += [f"in the {words['position']}"] if "position" in words else []
    phrase += [f"on a {words['background']} background"] if "background" in words else []
    return " ".join(phrase)
