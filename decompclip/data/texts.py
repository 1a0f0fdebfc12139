"""Pools of short descriptions for TEXTSPAN to choose from: a general one, one of the Shapes world, any text file."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, combinations, product
from pathlib import Path

from decompclip.data.shapes import PROPERTIES, vocabulary, with_article

POOL = Path(__file__).parent / "pool" / "descriptions.txt"
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
