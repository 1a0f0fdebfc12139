"""The text pools."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from analyses.training import build_text_pool
from decompclip.data.shapes import CONTEXT_LENGTH, PROPERTIES, vocabulary
from decompclip.models.text import WordTokenizer
from decompclip.operators.inputs import POOL, general_texts, load_texts, shapes_texts


def test_the_general_pool_is_large_short_and_without_repeats() -> None:
    texts = general_texts()
    assert len(texts) >= 3000
    assert len({text.casefold() for text in texts}) == len(texts)
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ',-]*", text) for text in texts)
    assert max(len(text.split()) for text in texts) <= 10


def test_the_general_pool_is_what_the_lists_give() -> None:
    assert POOL.read_text(encoding="utf-8") == build_text_pool.as_file(build_text_pool.build())


def test_the_general_pool_is_diverse() -> None:
    topics = [file.read_text(encoding="utf-8") for file in build_text_pool.LISTS.glob("*.txt")]
    sizes = [sum(map(len, map(build_text_pool.expand, topic.strip().split("\n\n")))) for topic in topics]
    assert len(sizes) >= 15
    assert min(sizes) >= 100
    assert max(sizes) <= len(general_texts()) / 8
    words = {word for text in general_texts() for word in text.casefold().split()}
    assert len(words) >= 2000


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("dog", "a dog"),
        ("Asian market", "an Asian market"),
        ("hourglass", "an hourglass"),
        ("x-ray", "a x-ray"),  # by its first word, "x"
        ("unicorn", "a unicorn"),
        ("yellow object", "a yellow object"),
    ],
)
def test_articles(phrase: str, expected: str) -> None:
    assert build_text_pool.with_article(phrase) == expected


def test_blocks_expand_templates_by_words() -> None:
    assert build_text_pool.expand("> {a}\n> red {}\nant, fly,\nowl") == [
        "an ant", "a fly", "an owl", "red ant", "red fly", "red owl",
    ]  # fmt: skip


@pytest.mark.parametrize("block", ["ant, fly", "> a thing\nant", "> {}"])
def test_a_broken_block_is_named(block: str) -> None:
    with pytest.raises(ValueError, match="expected a block of templates with a slot"):
        build_text_pool.expand(block)


def test_what_stands_twice_is_kept_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("> {}\nred, Blue\n\n> {}\nblue, green", encoding="utf-8")
    (tmp_path / "b.txt").write_text("> {}\nRed", encoding="utf-8")
    assert build_text_pool.build(tmp_path) == ["red", "Blue", "green"]


def test_any_text_file(tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_bytes("\ufeffa dog\r\n\r\n  caf\u00e9 \r\na dog\r\nA dog".encode())
    assert load_texts(file) == load_texts(str(file)) == ("a dog", "caf\u00e9", "A dog")


def test_text_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"one description a line; received .*no\.txt, which is no file"
    ):
        load_texts(tmp_path / "no.txt")
    with pytest.raises(FileNotFoundError, match="which is no file"):
        load_texts(tmp_path)
    (tmp_path / "empty.txt").write_text("\n  \n", encoding="utf-8")
    with pytest.raises(ValueError, match="which holds none; write at least one"):
        load_texts(tmp_path / "empty.txt")
    (tmp_path / "old.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"UTF-8; received .* at byte 3\); save it as UTF-8"):
        load_texts(tmp_path / "old.txt")


def test_the_shapes_pool_speaks_the_world_s_language() -> None:
    texts = shapes_texts()
    assert len(set(texts)) == len(texts)
    for values in PROPERTIES.values():
        assert all(any(re.search(rf"\b{value}\b", text) for text in texts) for value in values)
    assert {"a circle", "a red object", "an orange arrow", "a small object in the top left"} <= set(texts)
    tokenizer = WordTokenizer(vocabulary(), CONTEXT_LENGTH)
    assert not (tokenizer(list(texts)) == tokenizer.unknown_id).any()
    assert max(len(text.split()) for text in texts) <= CONTEXT_LENGTH - 2


def test_the_shapes_pool_in_fewer_words() -> None:
    assert shapes_texts(["a", "an", "red", "object", "arrow"]) == ("an arrow", "a red object", "a red arrow")
    assert shapes_texts(["house"]) == ()
