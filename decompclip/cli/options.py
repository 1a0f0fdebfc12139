"""Options that several commands share."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from decompclip.cli.console import say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from decompclip.attacks.registry import Attack


MAX_SEED = 2**32 - 1  # the largest that scikit-learn takes


class OnError(str, Enum):
    skip = "skip"
    stop = "raise"


class Activation(str, Enum):
    auto = "auto"
    gelu = "gelu"
    quick_gelu = "quick_gelu"


Model = Annotated[
    str,
    typer.Argument(
        help="open_clip's name (ViT-B-32, ...), a bundled model (shapes, ...), or the path of a folder or file of weights."
    ),
]
Checkpoint = Annotated[Path | None, typer.Option(help="Local weights for MODEL; code in them is never run.")]
Pretrained = Annotated[str | None, typer.Option(help="open_clip's tag of weights for MODEL, as openai.")]
Root = Annotated[
    Path | None,
    typer.Option(
        help="Folder that the image files of folders and tables must lie in, links followed; else left out."
    ),
]
Prefix = Annotated[
    str | None,
    typer.Option(help="Which copy to take of a checkpoint that holds several, as teacher or model_ema."),
]
ImageSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Side in pixels of MODEL's images, where it shall be another than the name's: positions are interpolated.",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images a forward pass.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default the first GPU, else the CPU.")]

TRIGGER = (
    "badnet, blended, label-consistent, issba, kitty, reflection, sig, wanet: with the parameters that a backdoored MODEL "
    "remembers of it, else the attack's defaults; a bundled twin, as shapes-badnet; a JSON file (a trigger's, a model's "
    "card, poisons.json) or the JSON itself; a folder that poison or finetune wrote"
)
"""What a command takes for a trigger; BadCLIP's has a patch, and so is given by a card."""


def usable_device(device: str | None) -> str:
    """The one asked for, if it can be used; else the first GPU or the CPU."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device!r} cannot be used here: {reason}; take cpu") from error
    return device


def going_on(checkpoint: Path) -> str:
    """What a stopped training leaves."""
    if checkpoint.exists():
        return f"the training up to its last checkpoint is kept in {checkpoint}; the same command goes on from there"
    return "no checkpoint was written yet; the same command starts anew"


def check_folder(out: Path, what: str) -> None:
    """Said before the work, not after it.

    Raises:
        OSError: `out` is a file, or cannot be made or written to.
    """
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"expected a folder to write {what} to with --out; {out} is a file")
    above = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise PermissionError(
            f"expected a folder to write {what} to with --out; {above} cannot be written to"
        )


def check_there(spec: str | None) -> None:
    """Said before seconds of imports: whether a plain path to images leads anywhere. Words of bundled data sets and patterns
    of shards are not looked at.

    Raises:
        FileNotFoundError: it does not.
    """
    from decompclip.data.files import WORLDS, parse_source

    if spec is None or parse_source(spec).kind in WORLDS or any(mark in spec for mark in "*?[{"):
        return
    if not Path(spec).exists():
        kind = "file" if Path(spec).suffix else "folder"
        raise FileNotFoundError(
            f"expected a folder with image files, a table or shards; there is no {kind} {spec}"
        )


def attack_on(
    model: str, checkpoint: Path | None, trigger: str | None, target: str | None, known: Sequence[Attack] = ()
) -> Attack | None:
    """The attack that --trigger and --target name, its target known; None where neither is given.

    The target is the one given, or the trigger's own, or that of the one backdoor which the model remembers. What is
    measured is said on stderr where it is not what the model remembers.

    Args:
        known: attacks to know beside those that the model remembers.

    Raises:
        ValueError: a target without a trigger, a trigger whose target nobody knows, or as `open_attack`.
        FileNotFoundError: as `open_attack`.
    """
    from dataclasses import replace

    from decompclip.attacks.registry import distinct, open_attack, remembered

    if trigger is None:
        if target is not None:
            raise ValueError("expected --target and --trigger together; --trigger is missing")
        return None
    known = distinct([*known, *remembered(model, checkpoint)])
    attack = open_attack(trigger, known, model=model)
    goals = {own.target for own in known}
    goal = target or attack.target or (goals.pop() if len(goals) == 1 else None)
    if goal is None:
        raise ValueError(
            f"expected --trigger and --target together; --target is missing, and neither the trigger {trigger} nor "
            f"{model} knows one"
        )
    if known and attack.trigger not in [own.trigger for own in known]:
        own = "; ".join(map(str, known))
        say(f"note: {model} remembers {own}; another trigger is measured", err=True)
    if attack.target is not None and target not in (None, attack.target):
        say(f"note: {attack.origin} has target {attack.target}; {target} is measured", err=True)
    return replace(attack, target=goal)
