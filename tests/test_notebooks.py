"""The notebooks run from the first cell to the last, show something, and are stored without output.

Cells are run as plain Python: no kernel is needed, and no shell or magic command may stand in them.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.ipynb"))
every = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


def cells(notebook: Path, kind: str = "code") -> list[dict[str, Any]]:
    return [
        cell
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == kind
    ]


def run(source: str, name: str, namespace: dict[str, Any]) -> object:
    """Run a cell; the value of its last line where that is an expression, as a notebook would show it."""
    tree = ast.parse(source, name)
    value: ast.expr = ast.Constant(None, lineno=1, col_offset=0)
    match tree.body:
        case [*body, ast.Expr(last)]:
            tree.body, value = body, last
    exec(compile(tree, name, "exec"), namespace)
    return eval(compile(ast.Expression(value), name, "eval"), namespace)


@every
def test_notebook_runs(notebook: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells(notebook):
        shown = run("".join(cell["source"]), f"{notebook.name}, cell {cell['id']}", namespace)
        if isinstance(shown, go.Figure):
            assert shown.data and shown.to_json()
        elif shown is not None:
            assert shown._repr_html_()  # type: ignore[attr-defined] - tables and results are HTML in a notebook


@every
def test_notebook_is_stored_clean(notebook: Path) -> None:
    found = json.loads(notebook.read_text(encoding="utf-8"))
    assert (found["nbformat"], found["metadata"]["kernelspec"]["name"]) == (4, "python3")
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells(notebook))
    ids = [cell["id"] for cell in found["cells"]]
    assert len(set(ids)) == len(ids)
    assert found["cells"][0]["cell_type"] == "markdown"


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS
