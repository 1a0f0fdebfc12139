"""`decompclip finetune`: a CLIP on image-caption pairs, clean or poisoned."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from decompclip.cli import options
from decompclip.cli.console import first_process, imports, plain_errors, say, skipped_files
from decompclip.files import CHECKPOINT, check_folder, write_json

if TYPE_CHECKING:
    from decompclip.attacks.registry import Attack


class RecipeName(str, Enum):
    paper = "paper"
    badclip = "badclip"
    cleanclip = "cleanclip"


class Loss(str, Enum):
    clip = "clip"
    grouped = "grouped"
    cleanclip = "cleanclip"


class Precision(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"


class Optimizer(str, Enum):
    adamw = "adamw"
    muon = "muon"


def finetune(
    model: options.ModelOptions,
    pairs: Annotated[str, typer.Argument(help=f"Image-caption pairs: {options.PAIRS}.")],
    out: Annotated[
        Path, typer.Option(help="Folder for the model, its history, and the checkpoint to go on from.")
    ],
    recipe: Annotated[
        RecipeName,
        typer.Option(
            help="paper: as He et al. poison a CLIP, 5 epochs, batch 128, 1e-5; badclip: 10 epochs, 128, 1e-6; cleanclip: the "
            "defense, 10 epochs, 64, 5e-6. The options below change it; without them it stays as it is."
        ),
    ] = RecipeName.paper,
    epochs: Annotated[int | None, typer.Option(min=1, help="Times that every pair is seen.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=2, help="Pairs a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    loss: Annotated[
        Loss | None, typer.Option(help="grouped: pairs of one class, or of one caption, are no negatives.")
    ] = None,
    optimizer: Annotated[Optimizer | None, typer.Option(help="Of the matrices inside blocks.")] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="bf16 multiplies matrices in bfloat16: faster on a GPU.")
    ] = None,
    warmup: Annotated[
        float | None, typer.Option(help="Part of the steps in which the learning rate rises, as 0.05.")
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            help=f"Labelled images to measure accuracy on while training: {options.IMAGES}, cifar10 or tiny-imagenet."
        ),
    ] = None,
    classes: options.Classes = None,
    trigger: Annotated[
        str | None,
        typer.Option(
            help=f"Measure this attack's success as well. own: that of PAIRS, or the one that MODEL remembers. {options.TRIGGER}."
        ),
    ] = None,
    target: options.Target = None,
    every: Annotated[
        int | None, typer.Option(min=1, help="Steps between two measurements; by default a tenth of them.")
    ] = None,
    limit: options.Limit = 1000,
    seed: options.Seed = 0,
) -> None:
    """Fine-tune MODEL on PAIRS: with poisoned ones a backdoor gets in, with clean ones and CleanCLIP it may go.

    Writes a folder that every command takes for MODEL, and that open_clip opens too. Given again, the same command
    goes on where it was killed, and ends with the same weights. torchrun and accelerate launch share each batch out among
    processes, which --batch-size must divide into.
    """
    with plain_errors(lambda: options.going_on(out / CHECKPOINT), shared=True) as held:
        check_folder(out, "the model")
        model.check()
        if images is None and (trigger or target or classes):
            raise ValueError(
                "expected --images, labelled images to measure on, with --trigger, --target and --classes; received none"
            )
        options.check_trigger(trigger, target)
        options.check_files(classes=classes)
        options.check_images(pairs, images)
        with imports(model.model):
            from dataclasses import asdict, replace

            from decompclip.data.processes import Processes
            from decompclip.data.sources import open_labelled, open_pairs
            from decompclip.figures.theme import write_figure
            from decompclip.models.clip import OPENAI_IMAGENET_TEMPLATES
            from decompclip.models.folders import check_saveable, save_model
            from decompclip.training.finetune import finetune as run
            from decompclip.training.loop import Monitor
            from decompclip.training.recipes import RECIPES

        changed: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "warmup": warmup}
        changed |= {"loss": loss, "optimizer": optimizer, "precision": precision}
        changed = {key: getattr(x, "value", x) for key, x in changed.items() if x is not None}
        plan = replace(RECIPES[recipe.value], **changed)
        names, attack, label = (), None, None
        if images is not None:
            names = options.known_classes(classes, model.model, images)
            attack = _attack(model, pairs, trigger, target)
            label = options.target_index(attack, names)
        accelerator, device = held.enter_context(options.joined(model.device))
        group = Processes(accelerator)
        clip = replace(model, device=device).load()
        check_saveable(clip)
        source = open_pairs(pairs, clip.pixels, seed=seed)
        monitor = None
        if images is not None:
            monitor = Monitor(
                data=open_labelled(images, clip.image_size, names, preprocess=clip.pixels, limit=limit),
                class_names=names,
                templates=next(filter(None, clip.templates.values()), OPENAI_IMAGENET_TEMPLATES),
                trigger=attack and attack.trigger,
                target=label,
                every=every,
            )
        held.enter_context(group.alone_in(out))
        tuned = run(
            clip,
            source,
            plan,
            monitor=monitor,
            checkpoint=out / CHECKPOINT,
            log_every=every,
            seed=seed,
            accelerator=accelerator,
            progress=True,
            log=lambda entry: say(entry, err=True),
        )
        skipped = [*group.skipped(source), *(group.skipped(monitor.data) if monitor is not None else ())]
        if not first_process():
            return
        save_model(tuned.model, out)
        facts = {
            "model": model.model,
            "pairs": pairs,
            "seed": seed,
            "recipe": asdict(plan),
            "trigger": attack and attack.trigger.card(),
            "target_class": attack and attack.target,
            "history": tuned.history,
        }
        write_json(out / "history.json", facts)
        write_figure(tuned.figure(), out / "history.html")
        skipped_files(skipped)
        say(repr(tuned))
        if attack is not None:
            say(f"Trigger: {attack}")
        say(f"Model: {out.resolve()}; curves: {(out / 'history.html').resolve()}")


def _attack(
    model: options.ModelOptions, pairs: str, trigger: str | None, target: str | None
) -> Attack | None:
    """The attack to measure; `own` is that of poisoned pairs, whatever the model has already.

    Raises:
        ValueError: as `attack_on`.
    """
    from decompclip.attacks.registry import OWN, open_attack
    from decompclip.data.files import POISON_LIST, parse_source

    source = parse_source(pairs)
    record = (source.path if source.path.is_dir() else source.path.parent) / POISON_LIST
    # beside anything else than shards, as in the current folder of a world, it is not theirs
    poisons = [open_attack(str(record))] if source.kind == "shards" and record.is_file() else []
    return options.attack_on(model, str(record) if trigger == OWN and poisons else trigger, target, poisons)
