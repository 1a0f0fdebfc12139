"""The notebooks run from the first cell to the last, show something, and keep what they showed, as pictures and tables.

Cells are run as plain Python: no kernel is needed, and no shell or magic command may stand in them.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio
import pytest
from PIL import Image

from analyses.notebooks import KEPT
from decompclip.figures.theme import keep_pictures
from tests.report.test_browser import BROWSER

CALL = "keep_pictures()  # of figures, beside the interactive ones: what GitHub and nbconvert show\n"
NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.ipynb"))
every = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


# Tests run the code as it stands on fewer photographs and pairs: the code is looked at, not its numbers. Numbers are
# replaced that are no keyword's value, those after `[:` apart; and whole keywords.
FEWER = {
    "01": {"300": "110", "150": "40"},
    "02": {"200": "75", "280": "90", "60": "30", "[:24": "[:6"},
    "03": {"768": "128", "300": "200", "150": "30", "[:70": "[:12", "70": "12", "140": "24"},
    "04": {"240": "130", "[:120": "[:40"},
    "05": {"250": "200", "120": "40", "[:60": "[:20", "60": "20", "24": "8", "[:24": "[:8"},
    "07": {"100": "40", "250": "1_000"},
}


@pytest.fixture(autouse=True)
def renderers() -> Iterator[None]:
    """As they were: a notebook's first cell has pictures kept."""
    before = pio.renderers.default
    yield
    pio.renderers.default = before


def fewer(source: str, counts: dict[str, str]) -> str:
    """With each of these counts replaced."""
    return re.sub(r"\b\w+=\d+\b|(\[:)?(?<!=)\b[\d_]+\b", lambda found: counts.get(found[0], found[0]), source)


def cells(notebook: Path, kind: str = "code") -> list[dict[str, Any]]:
    return [
        cell
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == kind
    ]


def run(source: str, name: str, namespace: dict[str, Any]) -> object:
    """Run a cell; the value of its last line, which must be an expression: what the notebook shows."""
    tree = ast.parse(source, name)
    match tree.body:
        case [*body, ast.Expr(last)]:
            tree.body = body
        case _:
            raise AssertionError(f"expected a last line that shows something; {name} ends in a statement")
    exec(compile(tree, name, "exec"), namespace)
    return eval(compile(ast.Expression(last), name, "eval"), namespace)


def check(shown: object) -> None:
    """A figure with something in it, a widget, or a table or result with a view in HTML; anything else is a slip."""
    if isinstance(shown, go.Figure):
        assert shown.data and shown.to_json()
    elif hasattr(shown, "_repr_mimebundle_"):
        assert shown._repr_mimebundle_()  # pyright: ignore[reportAttributeAccessIssue]
    else:
        assert hasattr(shown, "_repr_html_"), f"expected a figure, table or result; received {shown!r}"
        assert shown._repr_html_()  # pyright: ignore[reportAttributeAccessIssue]


def imported(source: str) -> set[str]:
    """What a notebook imports of the package, apart from its public names: `module.NAME`, or a module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module != "decompclip":
            found |= {f"{node.module or ''}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} - {"decompclip"}
    return {name for name in found if name.split(".")[0] in ("decompclip", "analyses", "")}


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif(
    not Path(os.environ.get("DECOMPCLIP_DATA", "")).joinpath("tiny-imagenet").is_dir(),
    reason="DECOMPCLIP_DATA names no folder with tiny-imagenet",
)
@every
def test_notebook_runs(notebook: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("decompclip.audit.collect.KEPT", 12)  # pictures that an audit tries corruptions on
    namespace: dict[str, Any] = {"__name__": "__main__"}
    counts = FEWER.get(notebook.name[:2], {})
    for cell in cells(notebook):
        source = fewer("".join(cell["source"]), counts)
        check(run(source, f"{notebook.name}, cell {cell['id']}", namespace))


def test_without_the_photographs_a_notebook_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DECOMPCLIP_DATA", raising=False)
    for notebook in NOTEBOOKS:
        first, *_ = cells(notebook, "markdown")
        assert "`DECOMPCLIP_DATA`" in "".join(first["source"])
        assert "`python -m analyses.prepare_tiny_imagenet`" in "".join(first["source"])
        with pytest.raises(
            FileNotFoundError, match=r"Tiny ImageNet \(python -m analyses.prepare_tiny_imagenet"
        ):
            run("".join(cells(notebook)[0]["source"]), notebook.name, {})


@every
def test_notebook_keeps_what_its_cells_show(notebook: Path) -> None:
    """Every cell's own, without an error or a warning, in what GitHub shows: pictures, tables and text, and no script."""
    found = json.loads(notebook.read_text(encoding="utf-8"))
    assert (found["nbformat"], found["metadata"]["kernelspec"]["name"]) == (4, "python3")
    ids = [cell["id"] for cell in found["cells"]]
    assert len(set(ids)) == len(ids)
    assert found["cells"][0]["cell_type"] == "markdown"
    for number, cell in enumerate(cells(notebook), start=1):
        assert cell["execution_count"] == number
        assert cell["outputs"], cell["id"]
        for output in cell["outputs"]:
            assert output["output_type"] in ("display_data", "execute_result"), (cell["id"], output)
            assert set(output["data"]) <= set(KEPT)
            assert "<script" not in "".join(output["data"].get("text/html", ""))
    assert notebook.stat().st_size < 1_000_000


@every
def test_figures_of_a_notebook_are_pictures_on_white(notebook: Path) -> None:
    shown = [output["data"].get("image/png") for cell in cells(notebook) for output in cell["outputs"]]
    pictures = [Image.open(io.BytesIO(base64.b64decode(data))) for data in shown if data]
    assert pictures
    for picture in pictures:
        assert picture.format == "PNG" and picture.width >= 600
        assert picture.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)


def test_a_page_of_a_notebook_keeps_its_figures() -> None:
    exporter = pytest.importorskip("nbconvert").HTMLExporter()
    for notebook in NOTEBOOKS[:2]:
        page, _ = exporter.from_filename(str(notebook))
        stored = notebook.read_text(encoding="utf-8").count('"image/png": ')
        assert len(re.findall(r'<img[^>]+src="data:image/png;base64,', page)) == stored > 0


@every
def test_a_notebook_has_its_pictures_kept_before_it_shows_any(notebook: Path) -> None:
    assert CALL in cells(notebook)[0]["source"]


def test_pictures_stand_beside_interactive_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    pio.renderers.default = "plotly_mimetype"
    for _ in range(2):  # a cell may be run twice
        keep_pictures()
    assert pio.renderers.default == "plotly_mimetype+pictures"
    figure = go.Figure(go.Bar(y=[1, 2]))
    interactive = "application/vnd.plotly.v1+json"

    def broken(*_: object, **__: object) -> bytes:
        raise RuntimeError("Chrome is nowhere to be found")

    monkeypatch.setattr(go.Figure, "to_image", lambda *_, **__: b"a picture")
    assert figure._repr_mimebundle_().keys() == {interactive, "image/png"}
    monkeypatch.setattr(go.Figure, "to_image", broken)
    with pytest.warns(UserWarning, match="without pictures, which need kaleido and a Chrome; install Chrome"):
        assert figure._repr_mimebundle_().keys() == {interactive}


@pytest.mark.skipif(BROWSER is None, reason="needs a browser that draws figures: none is installed")
def test_nbconvert_keeps_the_figures_of_a_notebook_that_it_runs(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="needs the extra `notebooks`")
    pytest.importorskip("nbconvert", reason="needs the extra `notebooks`")
    import_it = "import plotly.graph_objects as go\nfrom decompclip.figures.theme import keep_pictures\n"
    cell = nbformat.v4.new_code_cell(f"{import_it}{CALL}go.Figure(go.Bar(y=[1, 2]))")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "one.ipynb")
    words = ["-m", "nbconvert", "--execute", "--to", "html", "one.ipynb"]
    root = str(NOTEBOOKS[0].parent.parent)
    ran = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    page = (tmp_path / "one.html").read_text(encoding="utf-8")
    assert len(re.findall(r'<img[^>]+src="data:image/png;base64,', page)) == 1


@every
def test_notebook_is_told_in_words(notebook: Path) -> None:
    """One title with its aim, a heading for each part, and code that belongs to one."""
    first, *others = ("".join(cell["source"]) for cell in cells(notebook, "markdown"))
    title, _, aim = first.partition("\n\n")
    assert title.startswith("# ") and aim
    headings = [text for text in others if text.startswith("## ")]
    assert len(headings) >= len(cells(notebook)) / 3
    assert not [text for text in others if text.startswith("# ")]


def test_notebooks_are_numbered_from_one() -> None:
    assert [path.name[:3] for path in NOTEBOOKS] == [f"{number:02}_" for number in range(1, 8)]


@pytest.mark.parametrize("source", ["None", "x = 3", "import math", "print(1)", "3", "go.Figure()"])
def test_a_cell_that_shows_nothing_is_found(source: str) -> None:
    with pytest.raises(AssertionError):
        check(run(source, "cell", {"go": go}))


@every
def test_notebook_takes_names_that_the_reference_has(notebook: Path) -> None:
    """What a user needs is public, the bases that parts of one's own derive from too; or named there with its module."""
    reference = (NOTEBOOKS[0].parent.parent / "docs" / "reference.md").read_text(encoding="utf-8")
    found = imported("\n".join("".join(cell["source"]) for cell in cells(notebook)))
    assert not [name for name in found if f"`{name.removeprefix('decompclip.')}`" not in reference]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import decompclip.decomposition.moments as m", "decompclip.decomposition.moments"),
        ("from decompclip.audit import ScanConfig", "decompclip.audit.ScanConfig"),
        ("import analyses", "analyses"),
    ],
)
def test_a_name_from_elsewhere_is_found(source: str, name: str) -> None:
    assert imported(f"import json\nimport decompclip\nfrom decompclip import load\n{source}") == {name}
