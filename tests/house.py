"""What the package amounts to: `make house`, or `python -m tests.house`."""

from __future__ import annotations

import decompclip
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
    }


if __name__ == "__main__":
    for name, number in counted().items():
        print(f"{number:7,}  {name}")
