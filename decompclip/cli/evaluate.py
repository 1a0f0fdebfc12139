"""`decompclip evaluate`: clean accuracy and attack success, with intervals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from decompclip.cli import options
from decompclip.cli.console import first_process, imports, plain_errors, progress, say, skipped_files
from decompclip.display import printable_all
from decompclip.files import alone_in, check_folder, write_text


def evaluate(
    model: options.ModelOptions,
    images: Annotated[
        str,
        typer.Argument(
            help=f"Labelled images: {options.IMAGES}, cifar10 or tiny-imagenet (their test part)."
        ),
    ],
    trigger: Annotated[
        str | None,
        typer.Option(
            help=f"own: the one that a backdoored MODEL remembers. {options.TRIGGER}. Without one, accuracy alone."
        ),
    ] = None,
    target: options.Target = None,
    classes: options.Classes = None,
    templates: Annotated[
        Path | None,
        typer.Option(help="File with a prompt a line, {} for the class; by default the model's own."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write every number to this JSON file too.")] = None,
    as_json: options.AsJson = False,
    limit: options.Limit = 2000,
    on_error: options.OnError = options.Unreadable.skip,
    root: options.Root = None,
    batch_size: options.BatchSize = 64,
    seed: options.Seed = 0,
) -> None:
    """How well MODEL works, and how well a trigger fools it: zero-shot, with 95 % intervals.

    CACC is the accuracy on clean images. ASR is the share of images of other classes that the trigger turns into the
    target. Read it beside its control: the share of the same images that go there without a trigger. torchrun and
    accelerate launch spread the images over processes.
    """
    with plain_errors(shared=True) as held:
        if out is not None:
            if out.is_dir():
                raise IsADirectoryError(f"expected a JSON file to write with --out; {out} is a folder")
            check_folder(out.parent, "the JSON file")
        model.check()
        options.check_trigger(trigger, target)
        options.check_images(images)
        options.check_files(classes=classes, templates=templates)
        with imports(model.model):
            from decompclip.data.processes import Processes
            from decompclip.data.sources import open_labelled
            from decompclip.evaluation.evaluate import evaluate as run
            from decompclip.operators.inputs import load_texts

        attack = options.attack_on(model, trigger, target)
        names = options.known_classes(classes, model.model, images)
        label = options.target_index(attack, names)
        accelerator, device = held.enter_context(options.joined(model.device))
        group = Processes(accelerator)
        if out is not None and (not out.exists() or out.is_file()):
            group.in_first(lambda: held.enter_context(alone_in(out.parent, name=out.name)))
        clip = replace(model, device=device).load(guarded=True)
        source = open_labelled(
            images,
            clip.image_size,
            names,
            preprocess=clip.pixels,
            limit=limit,
            seed=seed,
            on_error=on_error.value,
            root=root,
        )
        prompts = None if templates is None else load_texts(templates)
        with progress() as track:
            classifier = clip.zero_shot_classifier(names, prompts, track=track)
        with progress() as track:
            found = run(
                clip,
                source,
                classifier,
                attack and attack.trigger,
                label,
                class_names=names,
                batch_size=batch_size,
                accelerator=accelerator,
                track=lambda batches: track(
                    batches, f"{model.model}: {images}", group.n_batches(source, batch_size)
                ),
            )
        skipped = group.skipped(source)
        if not first_process():
            return
        facts: dict[str, Any] = {
            "model": model.model,
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
        skipped_files(skipped)
