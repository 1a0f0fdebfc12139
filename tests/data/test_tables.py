"""Tables as people have them: with and without quoting, from spreadsheets, with paths that lead elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from decompclip.data.tables import CsvPairs

CAPTIONS = [
    "a dog",
    '"wow", said the man',
    "a cat",
    'a 5" pipe',
    '"so it ends',
    "a bird",
    '""',
    "it's",
    "a\u2028b",
    'x"',
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for n in range(3):
        Image.new("L", (8, 8), 40 * n).save(tmp_path / f"{n}.png")
    return tmp_path


def write(folder: Path, name: str, text: str | bytes) -> Path:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / name


def lines(captions: list[str], separator: str = "\t", end: str = "\n") -> str:
    return end.join(
        [
            f"filepath{separator}title",
            *(f"{n % 3}.png{separator}{text}" for n, text in enumerate(captions)),
            "",
        ]
    )


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("separator", ["\t", ";"])
def test_stray_quotes_swallow_no_rows(folder: Path, separator: str, end: str) -> None:
    pairs = CsvPairs(write(folder, "pairs.tsv", lines(CAPTIONS, separator, end)))
    assert len(pairs) == len(CAPTIONS) - 1  # the empty text in quotes is none
    assert list(pairs.captions) == [text for text in CAPTIONS if text != '""']
    assert [(skip.path, skip.reason) for skip in pairs.skipped] == [("7:0.png", "line 8 has no caption")]


@pytest.mark.parametrize("many", [9_000, 20_000])
@pytest.mark.parametrize("stray", [[3], [3, 8_000], [0, 1, 8_999]])
def test_long_tables_keep_every_row(folder: Path, many: int, stray: list[int]) -> None:
    captions = [f"a dog {n}" for n in range(many)]
    for n in stray:
        captions[n] = f'"{captions[n]}'
    pairs = CsvPairs(write(folder, "pairs.tsv", lines(captions)))
    assert list(pairs.captions) == captions
    assert pairs.skipped == []


def test_commas_in_bare_captions_are_told_and_not_cut(folder: Path) -> None:
    text = 'image,caption\n0.png,a girl in a pink dress, climbing stairs\n1.png,a cat\n2.png,"one, two"\n'
    pairs = CsvPairs(write(folder, "pairs.csv", text))
    assert list(pairs.captions) == ["a cat", "one, two"]
    assert [skip.reason for skip in pairs.skipped] == [
        "line 2 has 3 columns, the header 2; put texts that hold a ',' in quotes"
    ]
    with pytest.raises(ValueError, match=r"pairs\.csv: line 2 has 3 columns, the header 2"):
        CsvPairs(folder / "pairs.csv", on_error="raise")


def test_a_stray_mark_costs_no_other_row_its_quotes(folder: Path) -> None:
    text = 'image,caption\n0.png,"one, two"\n1.png,"a dog\n2.png,"three, four"\n'
    assert list(CsvPairs(write(folder, "pairs.csv", text)).captions) == ["one, two", '"a dog', "three, four"]


def test_quoted_texts_may_run_over_lines(folder: Path) -> None:
    text = 'image,caption\n0.png,"a dog,\non a ""sofa"""\n\n1.png,\n2.png,"a cat"\n'
    pairs = CsvPairs(write(folder, "pairs.csv", text))
    assert list(pairs.captions) == ['a dog,\non a "sofa"', "a cat"]
    assert [(skip.path, skip.reason) for skip in pairs.skipped] == [("2:1.png", "line 5 has no caption")]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("rows", "captions", "skipped"),
    [
        (
            ['0.png,"a red star', 'thing, two"', "1.png,a blue square"],
            ["a red star\nthing, two", "a blue square"],
            [],
        ),
        (
            ['gone.jpg,"a, red star', "", "thing, two", 'and, ""three"""', '1.png,"blue, square"'],
            ['a, red star\n\nthing, two\nand, "three"', "blue, square"],
            [],
        ),
        (
            ['0.png,"a red star', 'thing, two"', "1.png,a bare, comma", '2.png,"a dog'],
            ["a red star\nthing, two", '"a dog'],
            ["line 4 has 3 columns"],
        ),
    ],
)
def test_lines_of_a_quoted_text_are_no_rows(
    folder: Path, rows: list[str], captions: list[str], skipped: list[str], end: str
) -> None:
    """Even where each has the header's number of columns, and whatever is wrong with other rows."""
    pairs = CsvPairs(write(folder, "pairs.csv", end.join(["filepath,title", *rows, ""])))
    assert list(pairs.captions) == captions
    assert [skip.reason[:20] for skip in pairs.skipped] == skipped


def test_captions_over_lines_may_come_before_their_image(folder: Path) -> None:
    text = 'title,filepath\n"a, red star\nthing",0.png\n"a dog,1.png\na cat",2.png\n'
    pairs = CsvPairs(write(folder, "pairs.csv", text))
    assert [(pair.id, pair.caption) for pair in pairs] == [
        ("1:0.png", "a, red star\nthing"),
        ("2:1.png", '"a dog'),
        ("3:2.png", 'a cat"'),
    ]


@pytest.mark.parametrize("names", ["{}.png", "gone{}.JPEG", "{}"])
def test_a_quote_over_rows_swallows_none(folder: Path, names: str) -> None:
    """Rows are known by an image that is there, or by how its name ends; one with a bare comma between them too."""
    for n in range(3):
        (folder / str(n)).write_bytes((folder / f"{n}.png").read_bytes())
    first, second, third = (names.format(n) for n in range(3))
    text = f'filepath,title\n{first},"a dog\n{second},a, b\n{third},a cat"\n'
    pairs = CsvPairs(write(folder, "pairs.csv", text))
    assert list(pairs.captions) == ['"a dog', 'a cat"']
    assert [skip.reason[:20] for skip in pairs.skipped] == ["line 3 has 3 columns"]


def test_what_pandas_writes_is_read_back(folder: Path) -> None:
    pd = pytest.importorskip("pandas", reason="pandas is not installed")
    texts = ["a, b", 'say "hi"', '"', "two\nlines", "tab\there", "plain"]
    frame = pd.DataFrame({"filepath": [f"{n % 3}.png" for n in range(len(texts))], "title": texts})
    for name, separator in (("a.csv", ","), ("a.tsv", "\t")):
        frame.to_csv(folder / name, sep=separator, index=False)
        assert list(CsvPairs(folder / name).captions) == texts
        assert CsvPairs(folder / name).skipped == []


def test_marks_of_spreadsheets_are_no_part_of_the_first_column(folder: Path) -> None:
    pairs = CsvPairs(write(folder, "a.csv", b"\xef\xbb\xbf" + b'"filepath";"title"\r\n0.png;caf\xc3\xa9\r\n'))
    assert list(pairs.captions) == ["café"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("filepath,title\n0.png,a\n1.png,café\n".encode("latin-1"), "line 3: .*save it as UTF-8"),
        (lines(["a"]).encode("utf-16"), "it is UTF-16; save it as UTF-8"),
        (lines(["a"]).encode("utf-16-le"), "a NUL byte in line 1: it is UTF-16 or damaged"),
        (b"filepath,title\n0.png,a\n1.png,a\0b\n", "a NUL byte in line 3"),
        (b"filepath,title\n0.png\n1.png,a,b\n", "found none; 1: line 2 has too few columns, 1 of 2"),
    ],
)
def test_what_cannot_be_read_says_where(folder: Path, content: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CsvPairs(write(folder, "a.csv", content))


def test_a_column_of_classes_gives_labels_and_captions(folder: Path) -> None:
    table = write(folder, "a.csv", "image,label\n0.png,Teddy_Bear\n1.png,0\n2.png,dog\n")
    pairs = CsvPairs(table, class_names=["dog", "teddy bear"], templates=["a {}"])
    assert list(pairs.captions) == ["a teddy bear", "a dog", "a dog"]
    assert pairs.labels is not None
    assert pairs.labels.tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match="expected a column of captions"):
        CsvPairs(table, class_names=["dog", "teddy bear"])
    with pytest.raises(ValueError, match="expected a column of labels named 'kind'"):
        CsvPairs(table, label_column="kind", templates=["a {}"])


def test_paths_stay_below_a_root_and_lead_to_regular_files(folder: Path) -> None:
    inside = folder / "inside"
    inside.mkdir()
    Image.new("L", (8, 8), 200).save(inside / "own.png")
    (inside / "link.png").symlink_to(folder / "0.png")
    os.mkfifo(inside / "pipe.png")
    paths = [
        "own.png",
        "../0.png",
        str(folder / "0.png"),
        "link.png",
        "pipe.png",
        "/dev/zero",
        ".",
        "gone.png",
    ]
    table = write(inside, "a.csv", "image,caption\n" + "".join(f"{path},a dog\n" for path in paths))
    kept = CsvPairs(table, root=inside)
    assert [pair.id for pair in kept] == ["1:own.png"]
    reasons = [skip.reason for skip in kept.skipped]
    assert [f"lies outside {inside}" in why for why in reasons] == [
        True,
        True,
        True,
        False,
        True,
        False,
        False,
    ]
    assert (reasons[3], reasons[5]) == ("is a FIFO, no file", "is a folder, no file")
    assert [pair.id for pair in CsvPairs(table)] == [f"{n}:{paths[n - 1]}" for n in (1, 2, 3, 4)]


def test_a_table_is_a_regular_file(folder: Path) -> None:
    os.mkfifo(folder / "a.csv")
    with pytest.raises(FileNotFoundError, match=r"a\.csv is a FIFO, no file"):
        CsvPairs(folder / "a.csv")
    with pytest.raises(FileNotFoundError, match="is a folder, no file"):
        CsvPairs(folder)
