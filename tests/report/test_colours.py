"""Words stand out from their ground in both schemes: WCAG's contrast of 4.5 to 1."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

CSS = (files("decompclip.report") / "templates" / "report.css").read_text(encoding="utf-8")


def schemes() -> dict[str, dict[str, str]]:
    """Custom properties of each scheme, as the style sheet has them."""
    found = re.findall(r"([^{}]*:root[^{}]*)\{([^{}]*--paper[^{}]*)\}", CSS)
    named = {}
    for place, (selector, body) in enumerate(found):
        named[f"{place}: {selector.strip()}"] = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{3,6})", body))
    return named


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * d for d in colour[1:])
    channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_light_dark_chosen_dark_and_paper_are_there() -> None:
    assert len(schemes()) == 4
    dark, chosen = [s for s in schemes().values() if luminance(s["paper"]) < 0.1]
    assert dark == chosen


@pytest.mark.parametrize("name", schemes())
@pytest.mark.parametrize("ground", ["paper", "card"])
@pytest.mark.parametrize("word", ["ink", "soft", "accent", "evidence", "none", "unclear", "note"])
def test_words_stand_out(name: str, ground: str, word: str) -> None:
    colours = schemes()[name]
    high, low = sorted((luminance(colours[ground]), luminance(colours[word])), reverse=True)
    assert (high + 0.05) / (low + 0.05) >= 4.5
