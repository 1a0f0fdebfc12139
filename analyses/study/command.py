"""The command line of one analysis: measure or reread, say what was found, draw."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

import torch

from analyses.study.case import Member
from analyses.study.drawing import draw
from analyses.study.family import Family, open_family
from analyses.study.results import RESULTS, MissingResult, is_current, place, read, save
from decompclip.files import alone_in, write_json

FAMILY = "photos"
"""Of the commands, unless another is asked for: the largest of the bundled ones."""


class Analysis(Protocol):
    """What a module of `analyses/` defines: one figure or table of the paper, or one question of ours.

    Attributes:
        TITLE: a line for the index.
        Config: a frozen dataclass of all that a result depends on beside the models; each field is an option.
    """

    __name__: str
    __doc__: str | None
    TITLE: str
    Config: type[Any]

    def run(self, config: Any, family: Family, members: tuple[Member, ...]) -> dict[str, Any]:
        """Measure; everything in the result goes through JSON."""
        ...

    def plot(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Plotly figures by a short name, from a record alone."""
        ...

    def table(self, record: Mapping[str, Any]) -> str:
        """Markdown; empty where the figure says it all."""
        ...

    def finding(self, record: Mapping[str, Any]) -> str:
        """What was found, with its uncertainty, and what would change the answer."""
        ...


def name_of(analysis: Analysis) -> str:
    """`figure1`, also for a module that is run as a script."""
    spec = getattr(analysis, "__spec__", None)
    return (spec.name if spec else analysis.__name__).rpartition(".")[2]


def produce(
    analysis: Analysis,
    family: Family,
    config: Any,
    members: tuple[Member, ...],
    *,
    folder: Path = RESULTS,
    fresh: bool = False,
) -> dict[str, Any]:
    """The record: the one that is there if it is of these models and this configuration, else a new one.

    Raises:
        ValueError, FileNotFoundError: what the analysis needs is not in this family.
        FolderInUse: another process measures it.
    """
    name = name_of(analysis)
    try:
        record = read(name, family.name, folder=folder)
        if not fresh and is_current(record, config, members):
            return record
    except MissingResult:
        pass
    path = place(name, family.name, folder)
    with alone_in(path.parent, name=path.name):
        begin = time.perf_counter()
        found = analysis.run(config, family, members)
        return save(name, family, config, members, found, seconds=time.perf_counter() - begin, folder=folder)


def outcome(
    prog: str, work: Callable[[], object], errors: tuple[type[Exception], ...] = (ValueError, OSError)
) -> int:
    """The exit code of a command; errors that say what to do come without a traceback."""
    try:
        work()
    except errors as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    return 0


def main(analysis: ModuleType, argv: Sequence[str] | None = None) -> int:
    """`python -m analyses.NAME`; errors that say what to do come without a traceback."""
    module = cast(Analysis, analysis)
    parser = argparse.ArgumentParser(
        prog=f"python -m analyses.{name_of(module)}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model-family", default=FAMILY, help="photos, shapes, cifar10, or a JSON file")
    parser.add_argument("--models", default="", help="names or attacks, with commas between; default: all")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
    parser.add_argument("--redraw", action="store_true", help="draw what was measured before")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there already")
    parser.add_argument(
        "--formats", default="png", help="of figures: html, png, svg, pdf, with commas between; '' draws none"
    )
    for field in fields(module.Config):
        add_option(parser, field.name, field.default).default = argparse.SUPPRESS  # given, or not there
    parser.epilog = "Options of the measurement that are not given are those of the result that is there, else the analysis's own."
    options = parser.parse_args(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

    def work() -> None:
        family = open_family(options.model_family)
        given = {f.name: getattr(options, f.name) for f in fields(module.Config) if hasattr(options, f.name)}
        config = module.Config(**(measured_with(module, family, options.out) | given))
        if options.redraw:
            record = read(name_of(module), family.name, folder=options.out)
        else:
            members = family.select(tuple(filter(None, options.models.split(","))))
            record = produce(module, family, config, members, folder=options.out, fresh=options.fresh)
        show(module, record)
        for path in draw(module, record, options.out, tuple(filter(None, options.formats.split(",")))):
            print(path)

    return outcome(parser.prog, work, (ValueError, OSError, RuntimeError))


def measured_with(analysis: Any, family: Family, folder: Path = RESULTS) -> dict[str, Any]:
    """Fields of the configuration of the result that is there; none without a result."""
    try:
        config = read(name_of(analysis), family.name, folder=folder)["config"]
    except MissingResult:
        return {}
    known = {field.name: field.default for field in fields(analysis.Config)}
    return {
        name: tuple(value) if isinstance(known[name], tuple) else value
        for name, value in config.items()
        if name in known
    }


def add_option(parser: argparse.ArgumentParser, name: str, default: Any) -> argparse.Action:
    """Of a field; a tuple takes several values."""
    option = f"--{name.replace('_', '-')}"
    if isinstance(default, bool):
        return parser.add_argument(option, action=argparse.BooleanOptionalAction, default=default)
    if isinstance(default, tuple):
        kind = type(default[0]) if default else str
        return parser.add_argument(
            option, type=lambda text: tuple(map(kind, text.split(","))), default=default
        )
    return parser.add_argument(option, type=type(default), default=default)


def show(analysis: Analysis, record: Mapping[str, Any]) -> None:
    print(f"{analysis.TITLE}: {record['family']['title']}\n")
    if text := analysis.table(record):
        print(text + "\n")
    print(analysis.finding(record))


def benchmark(module: ModuleType) -> None:
    """The command line of a benchmark: a module with `Config`, `run(config)` and `table(result)`."""
    parser = argparse.ArgumentParser(
        description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result to this file too")
    for field in fields(module.Config):
        add_option(parser, field.name, field.default)
    given = vars(parser.parse_args())
    path = given.pop("json")
    result = module.run(module.Config(**given))
    print(module.table(result))
    if path:
        write_json(path, result)
