"""The notebooks run from the first cell to the last, show something, and are stored without output.

Cells are run as plain Python: no kernel is needed, and no shell or magic command may stand in them.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.ipynb"))
every = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


# Tests run the code as it stands on fewer images, pairs and steps: the code is looked at, not its numbers. Numbers are
# replaced that are no keyword's value, those after `[:` apart; and whole keywords.
FEWER = {
    "01": {"600": "360", "100": "60"},
    "02": {"600": "200", "400": "48", "300": "120", "[:200": "[:100", "[:100": "[:30", "[:24": "[:6"},
    "03": {
        "4_096": "512",
        "2_048": "256",
        "500": "150",
        "400": "160",
        "240": "100",
        "120": "50",
        "[:120": "[:50",
    },
    "04": {"360": "150", "steps=8": "steps=2", "images=12": "images=4", "held_out=100": "held_out=40"},
    "05": {
        "3_072": "384",
        "400": "130",
        "300": "120",
        "240": "100",
        "220": "80",
        "150": "40",
        "110": "40",
        "[:110": "[:40",
    },
}


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
@pytest.mark.usefixtures("few_kept")
@every
def test_notebook_runs(notebook: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    counts = FEWER.get(notebook.name[:2], {})
    for cell in cells(notebook):
        source = fewer("".join(cell["source"]), counts)
        check(run(source, f"{notebook.name}, cell {cell['id']}", namespace))


@every
def test_notebook_is_stored_clean(notebook: Path) -> None:
    found = json.loads(notebook.read_text(encoding="utf-8"))
    assert (found["nbformat"], found["metadata"]["kernelspec"]["name"]) == (4, "python3")
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells(notebook))
    ids = [cell["id"] for cell in found["cells"]]
    assert len(set(ids)) == len(ids)
    assert found["cells"][0]["cell_type"] == "markdown"


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
    assert [path.name[:3] for path in NOTEBOOKS] == [f"{number:02}_" for number in range(1, 7)]


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
