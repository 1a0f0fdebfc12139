"""The house rules, checked over the syntax trees of `decompclip/` and `analyses/`.

Who may import whom counts every import: late ones, inside functions, and those under `if TYPE_CHECKING:` too. Third
parties under `if TYPE_CHECKING:` are free: they cost nothing at run time.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeGuard

import pytest

from tests.mutants import EQUIVALENT, ROOMS

ROOT = Path(__file__).resolve().parent.parent
BELOW = "tower decomposition models data"
MEASURED = f"{BELOW} operators evaluation"

# Room: the rooms that it may import besides itself, whenever and however: inside functions and for types alone too.
MAY_IMPORT = {
    "tower": "",
    "decomposition": "tower",
    "models": "tower decomposition",
    "data": "models",
    "operators": f"{BELOW} figures",  # default images and texts; results draw themselves
    "evaluation": "decomposition models data figures",
    "attacks": "models data figures",
    "training": "models data attacks evaluation figures",
    "defenses": f"{MEASURED} training",
    "figures": "",
    "zoo": "models data attacks evaluation training",
    "audit": f"{MEASURED} attacks defenses figures public",
    "diagnosis": "tower models data evaluation figures public",
    "bench": f"{MEASURED} attacks defenses zoo figures public",
    "report": f"{MEASURED} audit figures public",
    "explorer": f"{BELOW} operators figures",
    "cli": f"{MEASURED} attacks training defenses zoo audit diagnosis bench figures report public",
    "__main__": "cli",
    "__init__": f"{MEASURED} attacks training defenses audit diagnosis report explorer",
    "analyses": f"{MEASURED} attacks training defenses zoo audit diagnosis bench figures explorer public",
}

# Of no room: what every room may import.
COMMON = {"api", "display", "files", "intervals"}

# Third party: the only rooms that may import it.
THIRD_PARTY = {
    "transformer_lens": "tower decomposition models",
    "open_clip": "tower models data training attacks analyses",
    "open_clip_train": "models data training attacks",
    "plotly": "figures report",
    **dict.fromkeys(("pickle", "_pickle", "dill", "cloudpickle", "shelve"), ""),
}
HARMLESS = {"decompclip.__version__", "pickle.UnpicklingError"}  # a string; an exception to catch

# Own generators, passed on, are the only source of randomness. What torch draws under `fork_rng` leaves
# no trace: modules that take no generator are initialised so.
RANDOM_MODULES = {"random", "numpy.random", "torch.random"}
SEEDED = {"Random", "Generator", "default_rng", "SeedSequence", "PCG64", "Philox", "fork_rng"}
GLOBAL_STATE = {"torch.manual_seed", "torch.seed", "torch.set_rng_state", "torch.cuda.manual_seed_all"}
TORCH_DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "rand_like"}

LONG = 450
"""Above this many lines a file is asked what it is really about; a warning, no wall: walls make artificial splits."""


@dataclass(frozen=True)
class Import:
    line: int
    target: str
    typing: bool  # under `if TYPE_CHECKING:`


def room_of(path: PurePosixPath) -> str:
    return path.parts[0] if path.parts[0] == "analyses" else path.with_suffix("").parts[1]


def is_type_checking(node: ast.AST) -> TypeGuard[ast.If]:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def walk(node: ast.AST, typing: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every node, and whether it stands under `if TYPE_CHECKING:`."""
    yield node, typing
    for child in ast.iter_child_nodes(node):
        only = is_type_checking(node) and isinstance(node, ast.If) and child in node.body
        yield from walk(child, typing or only)


def imports(path: PurePosixPath, tree: ast.AST) -> Iterator[Import]:
    for node, typing in walk(tree):
        match node:
            case ast.Import(names=names):
                targets = [alias.name for alias in names]
            case ast.ImportFrom(module=module, names=names, level=level):
                package = path.parent.parts[: len(path.parent.parts) + 1 - level] if level else ()
                source = ".".join([*package, *([module] if module else [])])
                targets = [f"{source}.{alias.name}" for alias in names]
            case ast.Call(func=ast.Name("import_module" | "__import__"), args=[ast.Constant(str(name)), *_]):
                targets = [name]
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(str(name)), *_]):
                targets = [name]
            case _:
                continue
        yield from (Import(node.lineno, target, typing) for target in targets)


def import_breach(path: PurePosixPath, found: Import) -> str | None:
    """The rule that an import breaks."""
    room, (package, *rest) = room_of(path), found.target.split(".")
    if found.target in HARMLESS:
        return None
    if package in THIRD_PARTY:
        allowed = THIRD_PARTY[package]
        return (
            None
            if found.typing or room in allowed.split()
            else f"{package} belongs to {allowed or 'no room'}"
        )
    if package not in {"decompclip", "analyses"}:
        return None
    if rest and rest[0] in COMMON:
        return None
    if room in COMMON:
        return "a module that every room may import imports none of them"
    if room not in MAY_IMPORT:
        return f"{room} has no row in MAY_IMPORT"
    target = "analyses" if package == "analyses" else rest[0] if rest and rest[0] in MAY_IMPORT else "public"
    if target in {room, *MAY_IMPORT[room].split()}:
        return None
    return f"{room} may import {MAY_IMPORT[room] or 'no other room'}; not {target}"


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str, bool]]:
    """Calls of imported names with their full name (`np.random.rand` is `numpy.random.rand`), and whether
    they stand under `with torch.random.fork_rng()`."""
    full: dict[str, str] = {}
    forked: set[ast.AST] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                full |= {a.asname: a.name for a in names if a.asname}
                full |= {root: root for a in names if not a.asname for root in [a.name.split(".")[0]]}
            case ast.ImportFrom(module=str(module), names=names, level=0):
                full |= {a.asname or a.name: f"{module}.{a.name}" for a in names}
            case ast.With(items=items) if any("fork_rng(" in ast.unparse(item) for item in items):
                forked |= set(ast.walk(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, *rest = ast.unparse(node.func).split(".")
            if first in full:
                yield node, ".".join([full[first], *rest]), node in forked


def call_breach(call: ast.Call, name: str, forked: bool) -> str | None:
    """The rule that a call breaks."""
    options = {k.arg: ast.unparse(k.value) for k in call.keywords}
    module, _, function = name.rpartition(".")
    restored = forked and name.startswith("torch.")
    if name in GLOBAL_STATE or (module in RANDOM_MODULES and function not in SEEDED):
        return None if restored else "touches global random state: take a generator as an argument"
    if module == "torch" and function in TORCH_DRAWS and "generator" not in options:
        return None if restored else "draws from the global random state: pass generator="
    if name == "torch.load" and options.get("weights_only") != "True":
        return "may run a stranger's code: pass weights_only=True"
    if options.get("allow_pickle") == "True" or name in {"pandas.read_pickle", "joblib.load"}:
        return "may run a stranger's code: read safetensors or plain arrays"
    return None


def breaches(path: PurePosixPath, tree: ast.AST) -> list[str]:
    """Every broken rule of one file, each as `file:line: what: rule`."""
    found = [(i.line, f"imports {i.target}", import_breach(path, i)) for i in imports(path, tree)]
    if path.parts[0] == "decompclip":
        found += [(c.lineno, f"calls {name}", call_breach(c, name, fork)) for c, name, fork in calls(tree)]
    return [f"{path}:{line}: {what}: {rule}" for line, what, rule in found if rule]


FILES = sorted(
    file.relative_to(ROOT) for room in ("decompclip", "analyses") for file in (ROOT / room).rglob("*.py")
)


@functools.cache
def parsed(file: Path) -> ast.Module:
    """Each file is parsed once for all tests."""
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def test_files_are_found() -> None:
    assert any(room_of(PurePosixPath(file)) == "models" for file in FILES)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_file_keeps_the_rules(file: Path) -> None:
    found = breaches(PurePosixPath(file), parsed(file))
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_long_file_is_asked_what_it_is_about(file: Path) -> None:
    lines = (ROOT / file).read_text(encoding="utf-8").count("\n")
    if lines > LONG:
        warnings.warn(f"{file} has {lines} lines, more than {LONG}: is it about one thing?", stacklevel=1)


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("models/a.py", "from decompclip.defenses import bake", ":1: imports decompclip.defenses.bake: "),
        ("models/a.py", "from ..operators import mmd", "not operators"),
        ("models/a.py", "from decompclip import load", "not public"),
        (
            "decomposition/a.py",
            "def f():\n    import decompclip.defenses",
            ":2: imports decompclip.defenses: ",
        ),
        ("decomposition/a.py", "import decompclip.figures", "not figures"),
        (
            "decomposition/a.py",
            "import importlib\nimportlib.import_module('decompclip.operators.mmd')",
            ":2: ",
        ),
        ("models/a.py", "if TYPE_CHECKING:\n    from decompclip.operators import mmd", ":2: "),
        ("files.py", "import decompclip.models", "imports none of them"),
        ("tower/a.py", "import decompclip.models", "tower may import no other room"),
        ("operators/a.py", "import decompclip.report", "not report"),
        ("report.py", "import analyses.fig2", "not analyses"),
        ("rooms/a.py", "import decompclip.models", "rooms has no row in MAY_IMPORT"),
        ("operators/a.py", "import transformer_lens.utils", "transformer_lens belongs to tower"),
        ("operators/a.py", "from open_clip import create_model", "open_clip belongs to tower models data"),
        ("operators/a.py", "def f():\n    import plotly.express", "plotly belongs to figures report"),
        ("models/a.py", "import pickle", "pickle belongs to no room"),
        ("models/a.py", "import torch as t\nt.manual_seed(0)", ":2: calls torch.manual_seed: touches global"),
        ("models/a.py", "import numpy as np\nnp.random.rand(3)", "calls numpy.random.rand: touches global"),
        ("models/a.py", "from random import shuffle\nshuffle([])", "calls random.shuffle: touches global"),
        ("models/a.py", "import torch\ntorch.randn(3)", "pass generator="),
        (
            "models/a.py",
            "import random\nwith torch.random.fork_rng():\n    random.seed(0)",
            ":3: calls random.seed",
        ),
        ("models/a.py", "import torch\ntorch.load('a')", "pass weights_only=True"),
        ("models/a.py", "import torch\ntorch.load('a', weights_only=False)", "pass weights_only=True"),
        ("models/a.py", "import numpy\nnumpy.load('a', allow_pickle=True)", "may run a stranger's code"),
    ],
)
def test_a_breach_is_caught(file: str, source: str, message: str) -> None:
    (found,) = breaches(PurePosixPath("decompclip", file), ast.parse(source))
    assert found.startswith(f"decompclip/{file}:")
    assert message in found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("models/a.py", "if TYPE_CHECKING:\n    import plotly"),
        ("models/a.py", "def decompose():\n    from decompclip.decomposition import decomposition"),
        ("operators/a.py", "def figure():\n    from decompclip.figures import heat_map"),
        ("operators/a.py", "from .mmd import mmd\nfrom decompclip.decomposition import moments"),
        ("decomposition/a.py", "from decompclip import __version__"),
        ("evaluation/a.py", "from decompclip.files import write_json"),
        ("models/a.py", "from pickle import UnpicklingError"),
        ("data/a.py", "import numpy as np\nnp.random.default_rng(0).random(3)"),
        ("models/a.py", "import torch\nwith torch.random.fork_rng():\n    torch.manual_seed(0)"),
        ("data/a.py", "import torch\ntorch.randn(3, generator=g)\ntorch.load(f, weights_only=True)"),
    ],
)
def test_what_is_allowed_passes(file: str, source: str) -> None:
    assert breaches(PurePosixPath("decompclip", file), ast.parse(source)) == []


def test_no_left_over_file_is_tracked() -> None:
    """What merges and editors leave beside a file, and links: to an environment, say, on one machine."""
    listed = subprocess.run(
        ["git", "ls-files", "--stage"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.splitlines()
    tracked = {line.partition("\t")[2]: line.split()[0] for line in listed}
    assert not [name for name in tracked if name.endswith((".orig", ".rej", ".bak", ".tmp", "~"))]
    assert not [name for name, mode in tracked.items() if mode == "120000"]


def test_one_place_opens_pictures() -> None:
    """Pillow opens some forty kinds of files, EPS through Ghostscript among them; `open_image` keeps to a list."""
    openers = [
        str(file)
        for file in FILES
        for _, name, _ in calls(parsed(file))
        if name in {"PIL.Image.open", "PIL.Image.Image.open", "torchvision.io.read_image"}
    ]
    assert openers == ["decompclip/data/files.py"]


def modules() -> dict[str, Path]:
    """Every module of the package, by its dotted name."""
    return {
        ".".join(part for part in file.with_suffix("").parts if part != "__init__"): file
        for file in FILES
        if file.parts[0] == "decompclip"
    }


@functools.cache
def import_graph() -> dict[str, set[str]]:
    """Which module imports which, late and for types alone counted; but for the list of public names."""
    known = modules()
    graph: dict[str, set[str]] = {}
    for name, file in known.items():
        found = set()
        for wanted in imports(PurePosixPath(file), parsed(file)):
            target = wanted.target
            while target and target not in known:
                target = target.rpartition(".")[0]
            found.add(target)
        graph[name] = found - {name, "decompclip", ""}
    return graph


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of more than one node, each of which can be reached from each other."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for other in graph.get(todo.pop(), set()) - seen:
                seen.add(other)
                todo.append(other)
        reach[start] = seen
    found = {frozenset(b for b in reach[a] if a in reach.get(b, ())) for a in graph if a in reach[a]}
    return [set(circle) for circle in found if len(circle) > 1]


def test_no_circle_goes_through_two_rooms() -> None:
    def room(module: str) -> str:
        return module.split(".")[1] if "." in module else module

    between: dict[str, set[str]] = {}
    for module, targets in import_graph().items():
        between.setdefault(room(module), set()).update({room(t) for t in targets} - {room(module)})
    assert circles(between) == []


def test_a_room_has_at_most_two_circles_of_two() -> None:
    found = circles(import_graph())
    assert all(len(circle) == 2 for circle in found), found
    rooms = [min(circle).split(".")[1] for circle in found]
    assert all(rooms.count(room) <= 2 for room in rooms), found


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [{"a", "b", "c"}]
    assert circles({"a": {"b"}, "b": set()}) == []


def test_no_two_classes_share_a_name() -> None:
    found: dict[str, set[str]] = {}
    for name, file in modules().items():
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, set()).add(name)
    assert {name: places for name, places in found.items() if len(places) > 1} == {}


def test_what_mutants_are_made_of_is_there() -> None:
    for room in ROOMS.values():
        assert all(list(ROOT.glob(pattern)) for pattern in (*room.sources, *room.tests)), room
    for path, before, _ in EQUIVALENT:
        assert before in (ROOT / path).read_text(encoding="utf-8"), path
