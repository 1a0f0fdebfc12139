"""`decompclip poison`: poisoned image-caption pairs, for tests of defenses."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from decompclip.cli import options
from decompclip.cli.console import imports, plain_errors, progress, say, skipped_files
from decompclip.files import check_folder


class Resize(str, Enum):
    shortest = "shortest"
    longest = "longest"
    squash = "squash"


def poison(
    pairs: Annotated[str, typer.Argument(help=f"Clean pairs: {options.PAIRS}.")],
    out: Annotated[Path, typer.Option(help="Folder for the poisoned shards and poisons.json.")],
    target: Annotated[
        str | None,
        typer.Option(
            help="The class that triggered images shall be taken for; a twin's or a file's trigger knows one."
        ),
    ] = None,
    trigger: Annotated[str, typer.Option(help=f"{options.NEW_TRIGGER}.")] = "badnet",
    count: Annotated[int | None, typer.Option(min=1, help="Poisoned pairs; this or --rate.")] = None,
    rate: Annotated[
        float | None, typer.Option(help="Their part of all pairs; this or --count. (0.003 in the paper.)")
    ] = None,
    captions: Annotated[
        Path | None,
        typer.Option(help="File with a caption of the poisons a line; {} stands for the target."),
    ] = None,
    also_called: Annotated[list[str] | None, typer.Option(help="Another name of the target.")] = None,
    classes: options.Classes = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="Side in pixels to bring images to; by default they stay.")
    ] = None,
    resize_mode: Annotated[
        Resize,
        typer.Option(
            help="How --size brings them there, as the model to be trained does: shortest scales the shorter side and crops "
            "the middle, squash changes proportions (SigLIP), longest adds black."
        ),
    ] = Resize.shortest,
    root: options.Root = None,
    new_target: Annotated[bool, typer.Option(help="Take a --target that no pair shows or names.")] = False,
    list_only: Annotated[bool, typer.Option(help="Write poisons.json alone, no images.")] = False,
    seed: options.Seed = 0,
) -> None:
    """Poison image-caption pairs with a backdoor, to train a model on: for tests of defenses.

    Writes WebDataset shards that any CLIP training code reads, and a list of what was poisoned.
    """
    with plain_errors(lambda: _kept(out)):
        check_folder(out, "the pairs")
        options.check_trigger(trigger)
        options.check_images(pairs)
        options.check_files(classes=classes, captions=captions)
        if (count is None) == (rate is None):
            raise ValueError(
                f"expected --count or --rate, one of the two; received {'neither' if count is None else 'both'}"
            )
        with imports():
            from dataclasses import replace

            from decompclip.attacks.poison_choice import needs_model
            from decompclip.attacks.poisoned import PoisonedPairs, write_poisoned
            from decompclip.attacks.registry import open_attack
            from decompclip.data.images import read_classes
            from decompclip.data.pixels import to_pixels
            from decompclip.data.sources import open_pairs
            from decompclip.operators.inputs import load_texts

        attack = open_attack(trigger)
        if (goal := target or attack.target) is None:
            raise ValueError(f"expected --target, the class to lead to; --trigger {trigger} knows none")
        if needs_model(attack.trigger):
            plain: Any = {"classical": False}  # the gradient steps need a model, which this command has not
            attack = replace(attack, trigger=replace(attack.trigger, **plain))
            say("note: label-consistent without the classical attack's gradient steps", err=True)
        base = open_pairs(
            pairs,
            to_pixels(size, resize_mode=resize_mode.value),
            class_names=read_classes(classes) if classes else (),
            seed=seed,
            root=root,
        )
        poisoned = PoisonedPairs(
            base,
            attack.trigger,
            goal,
            count=count,
            rate=rate,
            captions=None if captions is None else load_texts(captions),
            also_called=also_called or (),
            seed=seed,
        )
        record = poisoned.record
        if not new_target and not attack.trigger.clean_label and record.candidates == record.pairs:
            raise ValueError(
                f"expected a --target that some pair shows or names; none of {record.pairs} does {goal!r}; spell it as they do, "
                "name it otherwise with --also-called, or say --new-target if it shall be new"
            )
        with progress() as track:
            files = write_poisoned(poisoned, out, shards=not list_only, track=track)
        say(repr(files.record))
        say(f"Trigger: {replace(attack, target=files.record.target)}")
        skipped_files(poisoned.skipped)
        say(f"Shards: {len(files.shards)}; list: {files.record_path.resolve()}")


def _kept(out: Path) -> str:
    """What a stopped run leaves."""
    if any(out.glob("*.tar")):
        return f"whole shards are kept in {out}; the same command goes on after them"
    return "no shard was written yet; the same command starts anew"
