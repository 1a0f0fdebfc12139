"""Options that several commands share."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from decompclip.attacks.trigger import Trigger

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
BatchSize = Annotated[int, typer.Option(min=1, help="Images a forward pass.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default the first GPU, else the CPU.")]

ATTACKS = "badnet, blended, label-consistent, issba, kitty, reflection, sig, wanet"
"""What a command takes for a trigger's name; BadCLIP's has a patch, and so is given by its card."""


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


def open_trigger(spec: str) -> Trigger:
    """An attack by its name, with its defaults, or by the file of its card.

    Raises:
        ValueError: an unknown name, or a file that is no card.
        FileNotFoundError: there is no such file.
    """
    import json

    from decompclip.attacks.registry import from_card

    card: dict[str, Any] = {"name": spec}
    if spec.endswith(".json"):
        try:
            card = json.loads(Path(spec).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"expected a trigger's card, as Trigger.card() gives it; {spec} is no JSON: {error}"
            ) from error
    if spec == "label-consistent":
        card["classical"] = False  # the classical attack asks a model, which no command gives it
    return from_card(card)
