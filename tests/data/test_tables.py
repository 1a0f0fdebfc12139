"""Tables as people have them: with and without quoting, from spreadsheets, with paths that lead elsewhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from decompclip.data.tables import CsvPairs, CuePairs

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


# Classes and cues


ROWS = [  # a picture, its class, its cue, its split
    ("a/0.png", 0, 0, 0),
    ("a/1.png", 1, 1, 1),
    ("a/2.png", 0, 1, 2),
    ("b/3.png", 1, 0, 2),
    ("b/4.png", 1, 1, 2),
]


def pictures(folder: Path) -> None:
    for number, (path, *_) in enumerate(ROWS):
        (folder / path).parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (6, 6), (40 * number, 0, 0)).save(folder / path)


def waterbirds(folder: Path, *, drop: str = "", y: str = "") -> Path:
    pictures(folder)
    names = ["img_id", "img_filename", "y", "split", "place", "place_filename"]
    lines = [
        [str(n), path, y or str(c), str(s), str(p), f"/x/{n}.jpg"] for n, (path, c, p, s) in enumerate(ROWS)
    ]
    kept = [i for i, name in enumerate(names) if name != drop]
    text = "\n".join(",".join(row[i] for i in kept) for row in [names, *lines])
    (folder / "metadata.csv").write_text(text + "\n", encoding="utf-8")
    return folder


def celeba(folder: Path, form: str, *, value: str = "-1", partition: bool = True) -> Path:
    pictures(folder / "img_align_celeba")
    sign = {0: value, 1: "1"}
    rows = [[path, "-1", sign[c], sign[p]] for path, c, p, _ in ROWS]
    parts = [[path, str(s)] for path, _, _, s in ROWS]
    names = ["Bald", "Blond_Hair", "Male"]
    if form == "txt":
        text = "\n".join([str(len(ROWS)), " ".join(names), *("  ".join(row) for row in rows)])
        split = "\n".join(" ".join(row) for row in parts)
    else:
        text = "\n".join(",".join(row) for row in [["image_id", *names], *rows])
        split = "\n".join(",".join(row) for row in [["image_id", "partition"], *parts])
    (folder / f"list_attr_celeba.{form}").write_text(text, encoding="utf-8")
    if partition:
        (folder / f"list_eval_partition.{form}").write_text(split, encoding="utf-8")
    return folder


def check_test_split(pairs: CuePairs) -> None:
    assert list(pairs.ids) == ["a/2.png", "b/3.png", "b/4.png"]
    assert pairs.labels.tolist() == [0, 1, 1] and pairs.cues.tolist() == [1, 0, 1]
    (batch,) = pairs.batches()
    assert batch.indices is not None and batch.indices.tolist() == [0, 1, 2]
    assert batch.images[:, 0, 0, 0].mul(255).round().tolist() == [80, 120, 160]
    assert pairs.captions[1] == f"a photo of a {pairs.class_names[1]}"


def test_waterbirds_has_classes_cues_and_splits(tmp_path: Path) -> None:
    folder = waterbirds(tmp_path)
    check_test_split(pairs := CuePairs.waterbirds(folder, "test"))
    assert pairs.class_names == ("landbird", "waterbird")
    assert pairs.cue_names == ("land background", "water background")
    assert list(CuePairs.waterbirds(folder, "validation").ids) == ["a/1.png"]
    (folder / "b/3.png").write_bytes(b"no picture")
    (batch,) = pairs.batches()
    assert batch.indices is not None and batch.indices.tolist() == [0, 2] and len(pairs.skipped) == 1


@pytest.mark.parametrize("form", ["txt", "csv"])
def test_celeba_has_classes_cues_and_splits(tmp_path: Path, form: str) -> None:
    check_test_split(pairs := CuePairs.celeba(celeba(tmp_path, form), "test"))
    assert pairs.cue_names == ("woman", "man")
    table = tmp_path / f"list_attr_celeba.{form}"
    table.write_text(table.read_text().removeprefix(f"{len(ROWS)}\n"))  # the count is for the reader alone
    check_test_split(CuePairs.celeba(tmp_path, "test"))
    table.write_text(table.read_text().replace("Bald", "image_id  Bald" if form == "txt" else "Bald", 1))
    check_test_split(CuePairs.celeba(tmp_path, "test"))
    names: Any = {"class_names": ("person with hair", "bald person"), "cue_names": ("dark", "blond")}
    other = CuePairs.celeba(tmp_path, "test", label="Bald", cue="Blond_Hair", **names)
    assert other.labels.tolist() == [0, 0, 0] and other.cues.tolist() == [0, 1, 1]
    assert other.class_names == names["class_names"] and other.cue_names == names["cue_names"]


@pytest.mark.parametrize("text", ["", "\n \n", "5\n"])
def test_empty_tables_are_said_to_be_empty(tmp_path: Path, text: str) -> None:
    (waterbirds(tmp_path / "w") / "metadata.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"metadata\.csv; it is an empty table"):
        CuePairs.waterbirds(tmp_path / "w", "test")
    for form in ("txt", "csv"):
        for name in ("list_attr_celeba", "list_eval_partition"):
            folder = celeba(tmp_path / form / name, form)
            (folder / f"{name}.{form}").write_text(text, encoding="utf-8")
            with pytest.raises(ValueError, match=rf"{name}\.{form}; it is an empty table"):
                CuePairs.celeba(folder, "test")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            ("b.png", -1, 0),
            "class of each .* 2 class_names.* received -1 of b.png; name every class \\(dog, cat\\)",
        ),
        (("b.png", 2, 0), "received 2 of b.png"),
        (("b.png", 0, -1), "cue of each .* 3 cue_names.* received -1 of b.png"),
        (("b.png", 0, 3), "received 3 of b.png"),
    ],
)
def test_classes_and_cues_have_names(tmp_path: Path, row: tuple[str, int, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CuePairs(tmp_path, [("a.png", 1, 2), row], ("x", "y", "z"), class_names=["dog", "cat"])
    with pytest.raises(ValueError, match="none is named"):
        CuePairs(tmp_path, [("a.png", 0, 0)], ("x",))


@pytest.mark.parametrize(
    "header",
    [
        "img_filename,y,split,place",
        '"img_filename", "y", "split", "place"',
        "img_filename;y;split;place",
        "img_filename\ty \tsplit\tplace",
    ],
)
def test_tables_may_have_blanks_quotes_and_other_separators(tmp_path: Path, header: str) -> None:
    folder = waterbirds(tmp_path)
    row = (
        header.replace("img_filename", "b/3.png")
        .replace("y", "1")
        .replace("split", "2")
        .replace("place", "0")
    )
    (folder / "metadata.csv").write_text(f"{header}\r\n{row}\r\n", encoding="utf-8-sig")
    pairs = CuePairs.waterbirds(folder, "test")
    assert (list(pairs.ids), pairs.labels.tolist(), pairs.cues.tolist()) == (["b/3.png"], [1], [0])


def test_a_list_that_was_cut_off_is_told(tmp_path: Path) -> None:
    (celeba(tmp_path, "txt") / "list_attr_celeba.txt").write_text(
        "5\nBlond_Hair Male\na/0.png 1 1\n", encoding="utf-8"
    )
    with pytest.raises(
        ValueError, match=r"expected 5 rows in .*list_attr_celeba\.txt, .* it has 1; fetch it again"
    ):
        CuePairs.celeba(tmp_path, "test")


def test_tables_of_another_form_are_refused(tmp_path: Path) -> None:
    for drop in ("img_filename", "y", "split", "place"):
        with pytest.raises(ValueError, match=f"it has no {drop}, but img_id"):
            CuePairs.waterbirds(waterbirds(tmp_path / drop, drop=drop), "test")
    with pytest.raises(ValueError, match=r"0 or 1 in column y .*'7'"):
        CuePairs.waterbirds(waterbirds(tmp_path / "y", y="7"), "test")
    with pytest.raises(ValueError, match="'train', 'validation', 'test'"):
        CuePairs.waterbirds(tmp_path / "y", "val")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="'train', 'validation', 'test'"):  # before the table is looked for
        CuePairs.celeba(tmp_path / "gone", "val")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="expected two class_names; received 1: bird"):
        CuePairs.waterbirds(waterbirds(tmp_path / "names"), "test", class_names=["bird"])
    with pytest.raises(FileNotFoundError, match="metadata"):
        CuePairs.waterbirds(tmp_path, "test")
    only = waterbirds(tmp_path / "one")
    (only / "metadata.csv").write_text("img_filename,y,split,place\na/0.png,0,0,0\n", encoding="utf-8")
    with pytest.raises(ValueError, match="photographs of the test split"):
        CuePairs.waterbirds(only, "test")
    (only / "metadata.csv").write_text("img_filename,y,split,place\na/0.png,0,0\n", encoding="utf-8")
    with pytest.raises(ValueError, match="4 columns in row 1"):
        CuePairs.waterbirds(only, "test")
    with pytest.raises(ValueError, match=r"-1 or 1 in column Blond_Hair .*'0'"):
        CuePairs.celeba(celeba(tmp_path / "c", "csv", value="0"), "test")
    with pytest.raises(ValueError, match="it has no Moustache"):
        CuePairs.celeba(tmp_path / "c", "test", cue="Moustache", class_names=("a", "b"), cue_names=("c", "d"))
    with pytest.raises(ValueError, match="class_names and cue_names of Bald and Male"):
        CuePairs.celeba(tmp_path / "c", "test", label="Bald")
    given: list[tuple[Any, str]] = [
        ({"class_names": ("a", "b")}, "cue_names"),
        ({"cue_names": ("a", "b")}, "class_names"),
    ]
    for names, missing in given:
        with pytest.raises(ValueError, match=f"received no {missing}$"):
            CuePairs.celeba(tmp_path / "c", "test", label="Bald", **names)
    with pytest.raises(ValueError, match="expected two cue_names; received 3"):
        CuePairs.celeba(celeba(tmp_path / "three", "csv"), "test", cue_names=("a", "b", "c"))
    with pytest.raises(FileNotFoundError, match="list_eval_partition"):
        CuePairs.celeba(celeba(tmp_path / "d", "txt", partition=False), "test")
    (tmp_path / "d/list_eval_partition.txt").write_text("a/0.png 0\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"of a/1\.png"):
        CuePairs.celeba(tmp_path / "d", "test")
    with pytest.raises(FileNotFoundError, match="img_align_celeba"):
        (tmp_path / "d/img_align_celeba").rename(tmp_path / "d/faces")
        CuePairs.celeba(tmp_path / "d", "test")
