"""The general text pool of TEXTSPAN, built from the lists in `text_pool/`.

Command:   python -m analyses.build_text_pool           (`--check`: only say whether the built file is up to date)
Run time:  a second.
Writes:    decompclip/data/pool/descriptions.txt, one description a line.

A list is blocks between blank lines. Lines that start with `>` are the block's templates; the rest are its words,
between commas. Every word goes into every template: `{}` takes the word as it stands, `{a}` with its article. What
stands twice, whatever its capitals, is kept once, at its first place.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from decompclip.files import write_text
from decompclip.operators.inputs import POOL

LISTS = Path(__file__).parent / "text_pool"

# Where the first letter misleads about the sound.
_SOUNDS = {"hourglass": "an", "x-ray": "an"} | dict.fromkeys(
    ("unicorn", "uniform", "university", "yacht", "yellow", "one"), "a"
)


def with_article(phrase: str) -> str:
    """The phrase behind the article that its first word's sound asks for."""
    first = re.split(r"[ -]", phrase)[0]
    article = _SOUNDS.get(first, "an" if first[0].lower() in "aeiou" else "a")
    return f"{article} {phrase}"


def expand(block: str) -> list[str]:
    """The descriptions of one block.

    Raises:
        ValueError: it has no template or no word, or a template has no slot.
    """
    lines = [line.strip() for line in block.strip().splitlines()]
    templates = [line.lstrip("> ") for line in lines if line.startswith(">")]
    body = " ".join(line for line in lines if not line.startswith(">"))
    words = [word.strip() for word in body.split(",") if word.strip()]
    if not templates or not words or not all("{}" in t or "{a}" in t for t in templates):
        raise ValueError(
            f"expected a block of templates with a slot ({{}} or {{a}}) and of words; received {block[:60]!r}; "
            "see the head of this file"
        )
    return [t.replace("{a}", with_article(word)).replace("{}", word) for t in templates for word in words]


def build(folder: Path = LISTS) -> list[str]:
    """The pool: topic by topic in the order of the lists' names."""
    kept: dict[str, str] = {}
    for file in sorted(folder.glob("*.txt")):
        for block in re.split(r"\n\s*\n", file.read_text(encoding="utf-8").strip()):
            for text in expand(block):
                kept.setdefault(text.casefold(), text)
    return list(kept.values())


def as_file(texts: list[str]) -> str:
    return "".join(f"{text}\n" for text in texts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the file is out of date")
    given = parser.parse_args()
    texts = build()
    if given.check:
        if not POOL.is_file() or POOL.read_text(encoding="utf-8") != as_file(texts):
            raise SystemExit(f"{POOL} is not what the lists give; run python -m analyses.build_text_pool")
        return
    write_text(POOL, as_file(texts))
    print(f"{len(texts)} descriptions in {POOL}")


if __name__ == "__main__":
    main()
