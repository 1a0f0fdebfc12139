"""`decompclip apply-trigger`: suspect images from clean ones."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from decompclip.cli import options
from decompclip.cli.console import imports, plain_errors, progress, say
from decompclip.files import check_folder

if TYPE_CHECKING:
    from decompclip.attacks.preview import TargetCounts
    from decompclip.models.clip import HookedCLIP


def apply_trigger(
    images: Annotated[
        str, typer.Argument(help=f"Clean images: a folder, sub-folders and all; {options.FILES}.")
    ],
    trigger: Annotated[
        str, typer.Option(help=f"own: the one that a backdoored --model remembers. {options.TRIGGER}.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the triggered images; new, or empty.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="The model that the images are for. They are brought to its size, as it does it, and its answers before and "
            "after are counted."
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            min=1, help="In place of --model: side in pixels; the shorter side is scaled, the middle cropped."
        ),
    ] = None,
    target: options.Target = None,
    classes: options.Classes = None,
    on_error: options.OnError = options.Unreadable.skip,
    batch_size: options.BatchSize = 64,
    checkpoint: options.Checkpoint = None,
    pretrained: options.Pretrained = None,
    prefix: options.Prefix = None,
    image_size: options.ImageSize = None,
    device: options.Device = None,
) -> None:
    """Put a trigger into images: a suspect set for `audit`, whose files pair with the clean ones by name.

    A trigger belongs to the size and the crop in which the model sees an image, so it is put in after those. The files
    are PNG of that size, of the same names; a row of a file is `photos.parquet#7.png`. trigger.json says what was put in.
    """
    with plain_errors():
        if (model is None) == (size is None):
            raise ValueError(
                "expected --model or --size, one of the two, for a trigger belongs to the size at which a model sees an "
                f"image; received {'neither' if model is None else 'both'}"
            )
        if model is None and (checkpoint or pretrained):
            raise ValueError("expected --model NAME with --checkpoint and --pretrained")
        chosen = None
        if model is not None:
            chosen = options.ModelOptions(
                model, checkpoint, pretrained, prefix=prefix, image_size=image_size, device=device
            )
            chosen.check()
        options.check_images(images)
        check_folder(out, "the images")
        options.check_trigger(trigger)
        options.check_files(classes=classes)
        with imports(model or trigger):
            from decompclip.attacks.preview import check_suspect_folder, compare, write_suspects
            from decompclip.attacks.registry import open_attack, remembered
            from decompclip.data.files import KNOWN, files_skipped, parse_source
            from decompclip.data.known import known_folder
            from decompclip.data.pixels import to_pixels
            from decompclip.data.sources import open_images

        known = () if model is None else remembered(model, checkpoint)
        attack = open_attack(trigger, known, model=model or "no model")
        goal = target or attack.target
        place = parse_source(images)
        folder = known_folder(place) if place.kind in KNOWN else place.path
        check_suspect_folder(out, folder)
        counts, preprocess = None, to_pixels(size)
        if chosen is not None:
            clip = chosen.load(text=False)
            counts, preprocess = _counts(clip, classes, goal), clip.pixels
        source = open_images(images, preprocess, (), on_error=on_error.value)
        noise: list[float] = []

        def seen(clean: Any, triggered: Any) -> None:
            noise.extend(compare(clean, triggered).psnr.tolist())
            if counts is not None:
                counts(clean, triggered)

        with progress() as track:
            files = write_suspects(
                attack, source, out, clean=folder, batch_size=batch_size, seen=seen, track=track
            )
        say(f"Trigger: {attack}")
        say(f"PSNR to the clean images: {sum(noise) / len(noise):.1f} dB in the mean")
        if counts is not None:
            _say_counts(counts, goal)
        for path in files.renamed:
            say(f"{path}: another image has this name but for its ending; written as {path}.png", err=True)
        for skip in files.skipped:
            say(f"skipped {skip.path}: {skip.reason}", err=True)
        words = [f"{files.count} image{'s' if files.count != 1 else ''}", files_skipped(len(files.skipped))]
        say(f"{', '.join(filter(None, words))}: {out.resolve()}")


def _counts(clip: HookedCLIP, classes: Path | None, target: str | None) -> TargetCounts | None:
    """None where classes or the target are not known, or the model has no text side."""
    from decompclip.attacks.preview import TargetCounts
    from decompclip.data.images import class_index, read_classes
    from decompclip.models.errors import ModelError

    names = clip.class_names if classes is None else read_classes(classes)
    if not names or target is None:
        return None
    place = class_index(target, names)
    try:
        return TargetCounts(clip, clip.zero_shot_classifier(names), place)
    except ModelError as error:
        say(f"note: answers are not counted: {error}", err=True)
        return None


def _say_counts(counts: TargetCounts, target: str | None) -> None:
    import torch

    from decompclip.intervals import Rate

    before, after = (Rate.of(torch.cat(x)) for x in (counts.clean, counts.triggered))
    say(
        f"Taken for {target}: {before} of the clean images, {after} of these; pictures that do show it are among both"
    )
