"""`decompclip finetune`: a CLIP on image-caption pairs, clean or poisoned. Heavy imports wait inside."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from decompclip.cli.console import imports, plain_errors, say
from decompclip.cli.options import (
    MAX_SEED,
    TRIGGER,
    Activation,
    Checkpoint,
    Device,
    ImageSize,
    Model,
    Prefix,
    Pretrained,
    attack_on,
    check_folder,
    going_on,
    usable_device,
)
from decompclip.files import alone_in, write_text

if TYPE_CHECKING:
    from decompclip.attacks.registry import Attack
    from decompclip.models.clip import HookedCLIP
    from decompclip.training.loop import Monitor


class Named(str, Enum):
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
    model: Model,
    pairs: Annotated[
        str,
        typer.Argument(
            help="Image-caption pairs: WebDataset shards (a folder that `decompclip poison` wrote), a table (.csv, .tsv), "
            "shapes, shapes:5000, cifar10, or a folder with a sub-folder of images a class."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for the model, its history, and the checkpoint to go on from.")
    ],
    recipe: Annotated[
        Named,
        typer.Option(
            help="paper: as He et al. poison a CLIP, 5 epochs, batch 128, 1e-5; badclip: 10 epochs, 128, 1e-6; cleanclip: the "
            "defense, 10 epochs, 64, 5e-6. The options below change it; without them it stays as it is."
        ),
    ] = Named.paper,
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
            help="Labelled images to measure accuracy on while training: a folder, shapes, cifar10."
        ),
    ] = None,
    classes: Annotated[Path | None, typer.Option(help="File with their classes, one a line.")] = None,
    trigger: Annotated[
        str | None,
        typer.Option(
            help=f"Measure this attack's success as well. own: that of PAIRS, or the one that MODEL remembers; {TRIGGER}."
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="The class that the attacker wants; by default the trigger's own.")
    ] = None,
    every: Annotated[
        int | None, typer.Option(min=1, help="Steps between two measurements; by default a tenth of them.")
    ] = None,
    limit: Annotated[
        int, typer.Option(min=1, help="Most images to measure on, where shapes:N does not say.")
    ] = 1000,
    checkpoint: Checkpoint = None,
    prefix: Prefix = None,
    image_size: ImageSize = None,
    pretrained: Pretrained = None,
    activation: Annotated[
        Activation, typer.Option(help="Of the MLPs, where the checkpoint does not say.")
    ] = Activation.auto,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Of the order of the pairs, and of views.")
    ] = 0,
    device: Device = None,
) -> None:
    """Fine-tune MODEL on PAIRS: with poisoned ones a backdoor gets in, with clean ones and CleanCLIP it may go.

    Writes a folder that every command takes for MODEL, and that open_clip opens too. Given again, the same command
    goes on where it was killed, and ends with the same weights.
    """
    with plain_errors(lambda: going_on(out / "checkpoint.pt")) as held:
        say(f"{model}: loading", err=True)  # seconds pass before anything else is seen
        with imports():
            import json
            from dataclasses import asdict, replace

            from decompclip.cli.diagnosis import check_text
            from decompclip.data.files import files_skipped
            from decompclip.data.sources import open_pairs
            from decompclip.figures.theme import write_figure
            from decompclip.models.folders import check_saveable, save_model
            from decompclip.models.loading import load
            from decompclip.training.finetune import finetune as run
            from decompclip.training.recipes import RECIPES

        changed: dict[str, Any] = {
            "epochs": epochs,
            "batch_size": batch_size,
            "lr": lr,
            "loss": loss and loss.value,
            "optimizer": optimizer and optimizer.value,
            "precision": precision and precision.value,
            "warmup": warmup,
        }
        plan = replace(RECIPES[recipe.value], **{k: x for k, x in changed.items() if x is not None})
        check_folder(out, "the model")
        asked = None
        if images is not None:
            asked = _asked(model, checkpoint, pairs, images, classes, trigger, target)
        elif trigger or target:
            raise ValueError(
                "expected --images, labelled images to measure on, with --trigger and --target; received none"
            )
        weights = {
            "pretrained": pretrained,
            "checkpoint": checkpoint,
            "prefix": prefix,
            "image_size": image_size,
            "activation": activation.value,
        }
        clip = load(model, **weights, device=usable_device(device))
        check_text(clip)
        check_saveable(clip)
        source = open_pairs(pairs, clip.pixels, seed=seed)
        watch, attack = None, asked and asked[1]
        if images is not None and asked is not None:
            watch = _monitor(clip, images, *asked, every, limit)
        held.enter_context(alone_in(out))
        tuned = run(
            clip,
            source,
            plan,
            monitor=watch,
            checkpoint=out / "checkpoint.pt",
            log_every=every,
            seed=seed,
            progress=True,
            log=lambda entry: say(entry, err=True),
        )
        save_model(tuned.model, out)
        facts = {
            "model": model,
            "pairs": pairs,
            "seed": seed,
            "recipe": asdict(plan),
            "trigger": attack and attack.trigger.card(),
            "target_class": attack and attack.target,
            "history": tuned.history,
        }
        write_text(out / "history.json", json.dumps(facts, indent=1) + "\n")
        write_figure(tuned.figure(), out / "history.html")
        if skipped := len(source.skipped):
            say(files_skipped(skipped), err=True)
        say(repr(tuned))
        if attack is not None:
            say(f"Trigger: {attack}")
        say(f"Model: {out.resolve()}; curves: {(out / 'history.html').resolve()}")


def _asked(
    model: str,
    checkpoint: Path | None,
    pairs: str,
    images: str,
    classes: Path | None,
    trigger: str | None,
    target: str | None,
) -> tuple[tuple[str, ...], Attack | None, int | None]:
    """Class names, attack and the target's index: found before the seconds of loading.

    Raises:
        ValueError: a target without a trigger, a trigger whose target nobody knows, an unknown one, or unknown classes.
    """
    from decompclip.attacks.registry import OWN, open_attack
    from decompclip.cli.evaluate import known_classes
    from decompclip.data.files import POISON_LIST
    from decompclip.data.images import class_index

    names = known_classes(classes, model, images)
    folder = Path(pairs) if Path(pairs).is_dir() else Path(pairs).parent
    poisons = [open_attack(str(folder / POISON_LIST))] if (folder / POISON_LIST).is_file() else []
    if trigger == OWN and poisons:
        trigger = str(folder / POISON_LIST)  # what is being put in, whatever the model has already
    attack = attack_on(model, checkpoint, trigger, target, poisons)
    if attack is None or attack.target is None:
        return names, None, None
    return names, attack, class_index(attack.target, names)


def _monitor(
    clip: HookedCLIP,
    images: str,
    names: tuple[str, ...],
    attack: Attack | None,
    target: int | None,
    every: int | None,
    limit: int,
) -> Monitor:
    """What is measured on the way."""
    from decompclip.data.sources import open_labelled
    from decompclip.models.clip import OPENAI_IMAGENET_TEMPLATES
    from decompclip.training.loop import Monitor

    return Monitor(
        data=open_labelled(images, clip.image_size, names, preprocess=clip.pixels, limit=limit),
        class_names=names,
        templates=next((x for x in clip.templates.values() if x), OPENAI_IMAGENET_TEMPLATES),
        trigger=attack and attack.trigger,
        target=target,
        every=every,
    )
