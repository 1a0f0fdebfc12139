"""`decompclip evaluate`: clean accuracy and attack success, with intervals. Heavy imports wait inside."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from decompclip.cli.console import imports, plain_errors, progress, say
from decompclip.cli.options import (
    MAX_SEED,
    TRIGGER,
    Activation,
    BatchSize,
    Checkpoint,
    Device,
    ImageSize,
    Model,
    OnError,
    Prefix,
    Pretrained,
    Root,
    attack_on,
    check_folder,
    usable_device,
)
from decompclip.files import alone_in, write_text
from decompclip.printable import printable_all


def evaluate(
    model: Model,
    images: Annotated[
        str,
        typer.Argument(
            help="Labelled images: a folder with a sub-folder a class, a table (.csv, .tsv), WebDataset shards (a folder that "
            "`decompclip poison` wrote), shapes, shapes:5000, or cifar10 (its test part)."
        ),
    ],
    trigger: Annotated[
        str | None,
        typer.Option(
            help=f"own: the one that a backdoored MODEL remembers; {TRIGGER}. Without one, accuracy alone."
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="The class that the attacker wants; by default the trigger's own, or MODEL's."),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(help="File with one class a line; bundled models and data sets know theirs."),
    ] = None,
    templates: Annotated[
        Path | None,
        typer.Option(help="File with a prompt a line, {} for the class; by default the model's own."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write every number to this JSON file too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every number, as JSON.")] = False,
    checkpoint: Checkpoint = None,
    prefix: Prefix = None,
    image_size: ImageSize = None,
    pretrained: Pretrained = None,
    activation: Annotated[
        Activation, typer.Option(help="Of the MLPs, where the checkpoint does not say.")
    ] = Activation.auto,
    limit: Annotated[
        int,
        typer.Option(
            min=0,
            help="Most images of a folder or of cifar10, 0 for all; of shapes, where shapes:N does not say.",
        ),
    ] = 2000,
    on_error: Annotated[OnError, typer.Option(help="What to do with unreadable images.")] = OnError.skip,
    root: Root = None,
    batch_size: BatchSize = 64,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of which images are taken.")] = 0,
    device: Device = None,
) -> None:
    """How well MODEL works, and how well a trigger fools it: zero-shot, with 95 % intervals.

    CACC is the accuracy on clean images. ASR is the share of images of other classes that the trigger turns into the
    target, to be read beside its control: the share of the same images that go there without a trigger.
    """
    with plain_errors() as held:
        import json

        if out is not None:
            if out.is_dir():
                raise IsADirectoryError(f"expected a JSON file to write with --out; {out} is a folder")
            check_folder(out.parent, "the JSON file")
            if not out.exists() or out.is_file():
                held.enter_context(alone_in(out.parent, name=out.name))
        attack = attack_on(model, checkpoint, trigger, target)
        say(f"{model}: loading", err=True)  # seconds pass before anything else is seen
        with imports():
            from decompclip.cli.diagnosis import check_text
            from decompclip.data.files import files_skipped
            from decompclip.data.images import class_index
            from decompclip.data.sources import open_labelled
            from decompclip.data.texts import load_texts
            from decompclip.defenses.guard import load
            from decompclip.evaluation.evaluate import evaluate as run

        names = known_classes(classes, model, images)
        label = None if attack is None or attack.target is None else class_index(attack.target, names)
        weights = {
            "pretrained": pretrained,
            "checkpoint": checkpoint,
            "prefix": prefix,
            "image_size": image_size,
            "activation": activation.value,
        }
        clip: Any = load(model, **weights, device=usable_device(device))
        check_text(clip)
        prompts = None if templates is None else load_texts(templates)
        source = open_labelled(
            images,
            clip.image_size,
            names,
            preprocess=clip.pixels,
            limit=limit or None,
            seed=seed,
            on_error=on_error.value,
            root=root,
        )
        with progress() as track:
            classifier = clip.zero_shot_classifier(names, prompts, track=track)
        applied = attack and attack.trigger
        with progress() as track:
            found = run(
                clip,
                source,
                classifier,
                applied,
                label,
                class_names=names,
                batch_size=batch_size,
                track=lambda batches: track(batches, f"{model}: {images}", -(-len(source) // batch_size)),
            )
        facts = {
            "model": model,
            "provenance": clip.provenance,
            "images": images,
            "seed": seed,
            "trigger": attack and attack.trigger.card(),
            "trigger_origin": attack and attack.origin,
            "target_class": attack and attack.target,
        } | found.to_dict()
        text = json.dumps(printable_all(facts), indent=1, ensure_ascii=False)
        if out is not None:
            write_text(out, text + "\n")
        if as_json:
            say(text, lines=True)
            return
        frame = found.to_frame()
        rates = [name for name in frame.columns if name not in ("class", "images")]
        frame[rates] = 100 * frame[rates]
        say(frame.to_string(index=False, float_format="{:.1f}".format, na_rep=""), lines=True)
        say(str(found))
        if attack is not None:
            say(f"Trigger: {attack}")
        if skipped := len(getattr(source, "skipped", ())):
            say(files_skipped(skipped), err=True)


def known_classes(classes: Path | None, model: str, images: str) -> tuple[str, ...]:
    """From the file, or those that the data set or the model knows, a bundled one or a folder that `save_model` wrote.

    Raises:
        ValueError: nobody knows them.
    """
    from decompclip.audit.collect import own_classes
    from decompclip.data.images import read_classes
    from decompclip.data.sources import classes_of

    if classes is not None:
        return read_classes(classes)
    names = classes_of(images) or own_classes(model)
    if not names:
        raise ValueError(
            "expected --classes, a text file with one class a line; only bundled and saved models know theirs"
        )
    return names
