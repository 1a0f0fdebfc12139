"""`decompclip bench`: detectors and repairs on the models of the zoo. Heavy imports wait inside."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from decompclip.cli.console import imports, plain_errors, say
from decompclip.cli.options import check_folder
from decompclip.files import alone_in

if TYPE_CHECKING:
    from decompclip.bench.plan import Plan


FAST = "fast"


def bench(
    out: Annotated[
        Path, typer.Option(help="Folder for leaderboard.html, leaderboard.json and a file for each run.")
    ],
    models: Annotated[
        str | None,
        typer.Option(
            help="Bundled models, with commas between; by default shapes and all of its twins. cifar10's need the "
            "photographs in the folder that DECOMPCLIP_DATA names."
        ),
    ] = None,
    detectors: Annotated[
        str | None,
        typer.Option(
            help='Names, with commas between; by default all; "fast" leaves out STRIP and TeCo; "" is none.'
        ),
    ] = None,
    repairs: Annotated[
        str | None,
        typer.Option(
            help='Names, with commas between; by default all; "none" leaves images as they are; "" is none at all.'
        ),
    ] = None,
    images: Annotated[
        int,
        typer.Option(
            help="To fit on, to measure on, and for the control: so many of each, 40 or more; some detectors need more."
        ),
    ] = 1_000,
    slow: Annotated[int, typer.Option(help="The same, for STRIP (128 or more) and TeCo.")] = 200,
    draws: Annotated[
        int,
        typer.Option(
            help="How many sets of clean images each repair is fitted on, 2 or more; the spread between them is in its intervals."
        ),
    ] = 5,
    seed: Annotated[
        list[int] | None,
        typer.Option(help="Of the images; give it several times for several runs.  [default: 0]"),
    ] = None,
) -> None:
    """Measure detectors and repairs on the models of the zoo: one page, and a JSON with every number.

    They are fitted on clean images, and measured on others, with 95 % intervals and a control without a trigger. A
    killed command goes on where it was; a model, or an option, that changed is measured again.
    """
    with plain_errors(
        lambda: f"runs that are done are kept in {out}; the same command goes on after them"
    ) as held:
        check_folder(out, "the leaderboard")
        say("bench: loading", err=True)  # seconds pass before anything else is seen
        with imports():
            from decompclip.bench.page import leaderboard, write_board
            from decompclip.bench.run import run

        sizes = {"images": images, "slow_images": slow, "draws": draws}
        plan = _plan(models, detectors, repairs, **sizes, seeds=tuple(seed or (0,)))
        plan.check_enough()
        # our own prompts hold words that the small vocabularies of bundled models do not
        warnings.filterwarnings("ignore", "words unknown to this model's vocabulary", UserWarning)
        held.enter_context(alone_in(out))
        runs = run(plan, out, log=lambda line: say(line, err=True))
        board = leaderboard(runs)
        page = write_board(board, out)
        for line in _lines(board):
            say(line)
        say(f"Leaderboard: {page.resolve()}")


def _plan(models: str | None, detectors: str | None, repairs: str | None, **options: Any) -> Plan:
    """Raises ValueError as `Plan`."""
    from decompclip.bench.plan import REPAIRS, SLOW, Plan, default_models
    from decompclip.defenses.detectors import DETECTORS

    fast = tuple(name for name in DETECTORS if name not in SLOW)
    return Plan(
        models=default_models() if models is None else _names(models),
        detectors=tuple(DETECTORS) if detectors is None else fast if detectors == FAST else _names(detectors),
        repairs=tuple(REPAIRS) if repairs is None else _names(repairs),
        **options,
    )


def _names(given: str) -> tuple[str, ...]:
    """Split at commas that stand in no brackets: "Decomp-Det (cosine, quantile)" is one name."""
    return tuple(name.strip() for name in re.split(r",(?![^()]*\))", given) if name.strip())


def _lines(board: dict[str, Any]) -> list[str]:
    """The means over attacks, one line a defense."""
    lines = []
    for part, metrics in (("detectors", ("auroc", "fpr", "control")), ("repairs", ("cacc", "asr"))):
        for name, cells in board[part].items():
            said = [
                f"{metric.upper() if metric != 'control' else metric} {100 * found['value']:.1f} %"
                for metric in metrics
                if (found := cells[metric]["mean"])
            ]
            if said:
                lines.append(f"{name}: {', '.join(said)}")
    return lines
