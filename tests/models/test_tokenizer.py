"""WordTokenizer: ids, cuts and unknown words."""

from __future__ import annotations

import warnings

import pytest

from decompclip.models.text import WordTokenizer

TOKENIZER = WordTokenizer(("a", "blue", "star"), 6)


def test_words_become_ids_between_start_and_end() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens = TOKENIZER(["A blue, STAR.", ""])
    assert tokens.tolist() == [[1, 2, 3, 4, 6, 0], [1, 6, 0, 0, 0, 0]]


def test_the_end_is_the_largest_id() -> None:
    assert TOKENIZER.end_id == TOKENIZER.vocab_size - 1  # open_clip's text tower pools there


def test_one_text_is_a_row() -> None:
    assert TOKENIZER("a star").tolist() == TOKENIZER(["a star"]).tolist()


def test_unknown_words_are_named() -> None:
    with pytest.warns(
        UserWarning, match=r"vocabulary of 3: green, wug; .*`model.tokenizer.words` lists the known"
    ):
        tokens = TOKENIZER(["a green wug"])
    assert tokens.tolist() == [[1, 2, 5, 5, 6, 0]]


def test_a_long_text_is_cut_and_keeps_its_end() -> None:
    with pytest.warns(
        UserWarning, match="1 texts are longer than 4 words and were cut, first: 'a a a a blue'"
    ):
        tokens = TOKENIZER(["a a a a blue", "a"])
    assert tokens[0].tolist() == [1, 2, 2, 2, 2, 6]
