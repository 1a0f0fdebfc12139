"""What cannot be seen in a name is shown, and what can stays."""

from __future__ import annotations

import os

import pytest

from decompclip.display import inert, printable, printable_all, shown, some


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("cat photo.png", "cat photo.png"),
        ("Größe 10 × 10, 犬, ภาพ, e\u0301", "Größe 10 × 10, 犬, ภาพ, e\u0301"),
        ("10\u00a0%", "10\u00a0%"),
        (os.fsdecode(b"caf\xe9.png"), "caf\\xe9.png"),
        ("\ud800", "\\ud800"),
        ("cat\u202egnp.exe", "cat\\u202egnp.exe"),
        ("\u2066a\u2069\u200b\ufeff", "\\u2066a\\u2069\\u200b\\ufeff"),
        ("\x1b[31mred\x07\x00\x7f\x9b", "\\x1b[31mred\\x07\\x00\\x7f\\x9b"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("a\u2028b\u2029", "a\\u2028b\\u2029"),
        ("\U000e0041", "\\U000e0041"),
        ("👩\u200d🔬 می\u200cشود", "👩\u200d🔬 می\u200cشود"),
        ("ca\u200dt", "ca\\u200dt"),
    ],
)
def test_names_are_shown_as_they_are(name: str, seen: str) -> None:
    assert printable(name) == seen
    assert printable(seen) == seen
    seen.encode()
    assert printable_all({name: [name, (name,), 0.5, None, True]}) == {seen: [seen, [seen], 0.5, None, True]}


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("+cmd|' /C calc'!A0", "'+cmd|' /C calc'!A0"),
        ("-cat", "'-cat"),
        ("@SUM(1)", "'@SUM(1)"),
        (" =1", "' =1"),
        ("＝1+1", "'＝1+1"),
        ("\t=1", "\\t=1"),
        ("\r=1", "\\r=1"),
        ("-0.5", "-0.5"),
        ("+1e-7", "+1e-7"),
        ("-1+1", "'-1+1"),
        ("cat", "cat"),
        ("", ""),
    ],
)
def test_cells_are_no_formulas_and_numbers_stay(name: str, cell: str) -> None:
    assert inert(name) == cell


def test_our_own_markup_is_left_alone() -> None:
    from markupsafe import Markup

    assert shown(Markup("<b>\n</b>")) == "<b>\n</b>"
    assert shown("a\nb") == "a\\nb"
    assert shown(3) == 3


def test_of_many_names_the_first_are_said() -> None:
    assert [some("abcd"[:n], 2) for n in range(4)] == ["none", "a", "a, b", "a, b and 1 more"]
    assert some("abc") == "a, b, c" and some("abcd", comma="; ") == "a; b; c and 1 more"
