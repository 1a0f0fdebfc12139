"""What the package amounts to: `make house`, or `python -m tests.house`; `--way` lists the files on an image's way."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import Tensor

import decompclip
from decompclip import HookedCLIP, MeanAblate, Moments, evaluate, mlps
from decompclip.data.shapes import Shapes, ShapesSource
from decompclip.evaluation.evaluate import DecomposedImages
from tests.test_architecture import ROOT, circles, import_graph, modules


def counted() -> dict[str, int]:
    """Files and lines of the package, circles of imports (late ones and those for types too), and public names."""
    files = modules().values()
    found = circles(import_graph())
    rooms = [{module.split(".")[1] for module in circle} for circle in found]
    said = "".join(p.read_text(encoding="utf-8") for p in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    names = decompclip.__all__
    return {
        "files": len(files),
        "lines": sum((ROOT / file).read_text(encoding="utf-8").count("\n") for file in files),
        "circles between rooms": sum(len(room) > 1 for room in rooms),
        "circles inside a room": sum(len(room) == 1 for room in rooms),
        "public names": len(names),
        "public names in no document": sum(name not in said for name in names),
        "files on an image's way": len(way()),
    }


def way() -> list[str]:
    """The files whose code runs from images to a figure: decompose, edit, evaluate, result, figure.

    The way is gone twice, and what imports run is left out with the first time.
    """
    shapes = Shapes(24, seed=0)
    for _ in range(2):
        model = decompclip.load("shapes")
        classifier = model.zero_shot_classifier()
        batch = next(iter(ShapesSource(shapes, model.normalize).batches(24)))
        with _files_run() as found:
            _go(model, batch.images, batch.labels, classifier)
    return sorted(found)


def _go(model: HookedCLIP, images: Tensor, labels: Any, classifier: Tensor) -> None:
    edit = MeanAblate(mlps[-5:], Moments.fit(model, [images]))
    data = DecomposedImages(model.decompose(images), labels)
    evaluate(edit, data, classifier).figure()


@contextmanager
def _files_run() -> Iterator[set[str]]:
    """Notes the package's files of which a function runs inside."""
    found: set[str] = set()
    package = str(ROOT / "decompclip") + "/"

    def see(frame: FrameType, event: str, _: object) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(package) and frame.f_code.co_name != "<module>":
            found.add(name.removeprefix(f"{ROOT}/"))

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        yield found
    finally:
        sys.setprofile(before)


if __name__ == "__main__":
    if "--way" in sys.argv[1:]:
        print("\n".join(way()))
    else:
        for name, number in counted().items():
            print(f"{number:7,}  {name}")
