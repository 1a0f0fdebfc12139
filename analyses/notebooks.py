"""The notebooks with their outputs: each runs in a kernel and a folder of its own; figures are kept as pictures, which GitHub shows.

Command:   DECOMPCLIP_DATA=... python -m analyses.notebooks [examples/01_explore_heads.ipynb ...]
Run time:  about five minutes on one core for all of them.
Needs:     the extra `notebooks`, kaleido and a Chrome; Tiny ImageNet (`python -m analyses.prepare_tiny_imagenet`).

Whoever opens a notebook in Jupyter and runs it gets interactive figures; their pictures, which `keep_pictures` in a first cell asks for, are what is kept here.
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decompclip.data.files import open_rgb
from decompclip.files import write_text

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
KEPT = ("image/png", "text/html", "text/plain")
"""Of what a cell shows, the first two at most; a widget's state and plotly's JSON need a kernel, or 5 MB of script."""


def execute(path: Path) -> None:
    """Run a notebook from the first cell to the last, and write what its cells show into it.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
        RuntimeError: a cell warned.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook: Any = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(
            notebook, timeout=1_800, record_timing=False, store_widget_state=False, resources=resources
        ).execute()
    notebook.metadata.pop("widgets", None)
    for number, cell in enumerate((c for c in notebook.cells if c.cell_type == "code"), start=1):
        cell.execution_count = number
        for output in cell.outputs:
            if output.get("name") == "stderr":
                raise RuntimeError(f"expected no warning; {path.name}, cell {cell.id} says: {output.text}")
            if "execution_count" in output:
                output.execution_count = number
            if "data" in output:
                output.data = {kind: output.data[kind] for kind in KEPT if kind in output.data}
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = opaque(output.data["image/png"])
    write_text(path, nbformat.writes(notebook, indent=1) + "\n")


def opaque(picture: str) -> str:
    """A PNG in base64 without its transparency, which nothing here has: a quarter less."""
    out = io.BytesIO()
    open_rgb(io.BytesIO(base64.b64decode(picture))).save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m analyses.notebooks", description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path, help="by default all of examples/")
    for path in parser.parse_args(argv).notebooks or sorted(EXAMPLES.glob("*.ipynb")):
        execute(path)
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
