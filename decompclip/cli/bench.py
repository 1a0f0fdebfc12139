"""`decompclip bench`: detectors and repairs on the models of the zoo."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from decompclip.cli import options
from decompclip.cli.console import first_process, imports, plain_errors, say
from decompclip.files import check_folder
from decompclip.models.names import bundled

DETECTORS = (
    "STRIP", "SCALE-UP", "TeCo", "BDetCLIP", "k-distance", "SLOF", "LID", "DAO", "Mahalanobis", "Mahalanobis by class",
    "Decomp-Det (paper)", "Decomp-Det (cosine, quantile)", "agnostic", "token",
)  # fmt: skip
"""Names in `decompclip.defenses.detectors.DETECTORS`, which imports torch."""

REPAIRS = (
    "none", "Decomp-Rep (paper, right hint)", "Decomp-Rep (paper, wrong hint)", "Decomp-Rep (cosine, quantile)",
    "random heads", "fixed heads", "last 5 MLPs", "agnostic",
)  # fmt: skip
"""Names in `decompclip.bench.plan.REPAIRS`."""

DETECTORS_HELP = f'By default all: {", ".join(DETECTORS)}. "fast" leaves out STRIP and TeCo; "" is none.'
REPAIRS_HELP = f'By default all: {", ".join(REPAIRS)}. "none" leaves images as they are; "" is none at all.'
MOST_SEEDS = 100
SLOW = ("STRIP", "TeCo")


def bench(
    out: Annotated[
        Path, typer.Option(help="Folder for leaderboard.html, leaderboard.json and a file for each run.")
    ],
    models: Annotated[
        str | None,
        typer.Option(
            help="Bundled models, with commas between; by default shapes and all of its twins. Those of cifar10 and photos need "
            "the photographs in the folder that DECOMPCLIP_DATA names."
        ),
    ] = None,
    detectors: Annotated[
        str | None,
        typer.Option(help=DETECTORS_HELP),
    ] = None,
    repairs: Annotated[
        str | None,
        typer.Option(help=REPAIRS_HELP),
    ] = None,
    count: Annotated[
        int,
        typer.Option(
            min=40,
            help="Images to fit on, to measure on, and for the control: so many of each; some detectors need more.",
        ),
    ] = 1_000,
    images: options.OldImages = None,
    slow: Annotated[int, typer.Option(min=40, help="The same, for STRIP (128 or more) and TeCo.")] = 200,
    draws: Annotated[
        int,
        typer.Option(
            min=2,
            help="Sets of clean images that each repair is fitted on; the spread between them is in its intervals.",
        ),
    ] = 5,
    seed: Annotated[
        list[int] | None,
        typer.Option(
            min=0,
            max=MOST_SEEDS - 1,
            help="Of the images; give it several times for several runs.  [default: 0]",
        ),
    ] = None,
) -> None:
    """Measure detectors and repairs on the models of the zoo: one page, and a JSON with every number.

    They are fitted on clean images, and measured on others, with 95 % intervals and a control without a trigger. A
    killed command goes on where it was; a model, or an option, that changed is measured again. torchrun and accelerate launch
    spread the models over processes that share the folder.
    """
    with plain_errors(
        lambda: f"runs that are done are kept in {out}; the same command goes on after them", shared=True
    ) as held:
        check_folder(out, "the leaderboard")
        fast = tuple(name for name in DETECTORS if name not in SLOW)
        chosen: dict[str, Any] = {
            "models": _names("model", models, bundled()),
            "detectors": fast if detectors == "fast" else _names("detector", detectors, DETECTORS),
            "repairs": _names("repair", repairs, REPAIRS),
            "images": options.count_of(count, images),
            "slow_images": slow,
            "draws": draws,
            "seeds": tuple(seed or (0,)),
        }
        with imports("bench"):
            from decompclip.bench.page import leaderboard, write_board
            from decompclip.bench.plan import Plan, default_models
            from decompclip.bench.run import run

        if models is None:
            chosen["models"] = default_models()
        plan = Plan(**chosen)
        plan.check_enough()
        # our own prompts hold words that the small vocabularies of bundled models do not
        warnings.filterwarnings("ignore", "words unknown to this model's vocabulary", UserWarning)
        accelerator, _ = held.enter_context(options.joined("cpu"))
        runs = run(plan, out, accelerator=accelerator, log=lambda line: say(line, err=True, everywhere=True))
        if not first_process():
            return
        board = leaderboard(runs)
        page = write_board(board, out)
        for line in _lines(board):
            say(line)
        say(f"Leaderboard: {page.resolve()}")


def _names(kind: str, given: str | None, known: Sequence[str]) -> tuple[str, ...]:
    """All known ones, or those given, split at commas that stand in no brackets: "Decomp-Det (cosine, quantile)" is one.

    Raises:
        ValueError: an unknown name.
    """
    if given is None:
        return tuple(known)
    names = tuple(name.strip() for name in re.split(r",(?![^()]*\))", given) if name.strip())
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"expected a {kind} among {', '.join(known)}; received {unknown[0]!r}")
    return names


def _lines(board: dict[str, Any]) -> list[str]:
    """The means over attacks, one line a defense."""
    lines = []
    for part, metrics in (("detectors", ("auroc", "fpr", "control")), ("repairs", ("cacc", "asr"))):
        for name, cells in board[part].items():
            values = [
                f"{metric.upper() if metric != 'control' else metric} {100 * found['value']:.1f} %"
                for metric in metrics
                if (found := cells[metric]["mean"])
            ]
            if values:
                lines.append(f"{name}: {', '.join(values)}")
    return lines
