"""Options that several commands share, and quick checks of them, before anything is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from enum import Enum
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from decompclip.cli.console import say
from decompclip.models.names import bundled, known_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    from decompclip.attacks.registry import Attack
    from decompclip.models.clip import HookedCLIP

MAX_SEED = 2**32 - 1  # the largest that scikit-learn takes

TRIGGERS = (
    "badclip",
    "badnet",
    "blended",
    "issba",
    "kitty",
    "label-consistent",
    "reflection",
    "sig",
    "wanet",
)
"""The names in `decompclip.attacks.registry.TRIGGERS`, which imports torch."""


class Unreadable(str, Enum):
    skip = "skip"
    stop = "raise"


class Convention(str, Enum):
    """As `decomposition.maps.Convention`, whose module imports torch."""

    centred = "centred"
    paper = "paper"


class Activations(str, Enum):
    auto = "auto"
    gelu = "gelu"
    quick_gelu = "quick_gelu"


def most(limit: str | int | None) -> int | None:
    """The value of --limit: a number, or None for `all`."""
    if limit is None or limit == "all":
        return None
    if str(limit) == "0":
        renamed("--limit 0", "--limit all")
        return None
    if not str(limit).isdecimal():
        raise typer.BadParameter(f"expected a number of images, or all; received {limit}")
    return int(limit)


Checkpoint = Annotated[Path | None, typer.Option(help="Local weights for MODEL; code in them is never run.")]
Pretrained = Annotated[str | None, typer.Option(help="open_clip's tag of weights for MODEL, as openai.")]
Prefix = Annotated[
    str | None,
    typer.Option(help="Which copy to take of a checkpoint that holds several, as teacher or model_ema."),
]
ImageSize = Annotated[
    int | None,
    typer.Option(min=1, help="Another image size for MODEL, in pixels: positions are interpolated."),
]
Activation = Annotated[
    Activations,
    typer.Option(help="Of the MLPs, where the checkpoint does not say; in `audit` also the reference's."),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default the first GPU, else the CPU.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images in a forward pass.")]
Limit = Annotated[
    int | None,
    typer.Option(parser=most, metavar="N|all", help="At most so many images of each set, drawn by --seed."),
]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of every random choice.")]
OnError = Annotated[Unreadable, typer.Option(help="What to do with unreadable images.")]
Root = Annotated[
    Path | None, typer.Option(help="Leave out image files outside this folder; links are followed.")
]
Classes = Annotated[
    Path | None,
    typer.Option(help="File with one class a line; bundled and saved models and data sets know theirs."),
]
Target = Annotated[
    str | None, typer.Option(help="The class that the attacker wants; by default the trigger's own.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print every number, as JSON.")]
OldImages = Annotated[int | None, typer.Option("--images", hidden=True, min=40)]

FILES = "a table (.csv, .tsv), parquet files, WebDataset shards, imagenet:PATH, caltech101:PATH, pets:PATH"
IMAGES = f"a folder with a sub-folder a class, {FILES}, or shapes (shapes:5000)"
PAIRS = (
    "a table (.csv, .tsv), parquet files, WebDataset shards (as `decompclip poison` writes them), a folder with a sub-folder "
    "of images a class, imagenet:PATH, caltech101:PATH, pets:PATH, shapes (shapes:5000), cifar10 or tiny-imagenet (cifar10:5000)"
)
_KIND = "A kind (badnet, blended, label-consistent, issba, kitty, reflection, sig, wanet): with"
_FILE = (
    "Or a bundled twin (shapes-badnet); a JSON file (a trigger, a card, poisons.json) or the JSON itself; a folder that "
    "poison, finetune or apply-trigger wrote"
)
NEW_TRIGGER = f"{_KIND} the attack's defaults. {_FILE}"
"""What `poison` takes for a trigger: no model is there to remember one."""
TRIGGER = f"{_KIND} the parameters that a backdoored MODEL remembers, else the attack's defaults. {_FILE}"
"""What a command takes for a trigger; BadCLIP's has a patch, and so is given by a card."""


@dataclass(frozen=True)
class ModelOptions:
    """MODEL, and the options that say how to read it; `grouped` gives them to a command."""

    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="open_clip's name (ViT-B-32, ...), a bundled model (shapes, ...), or the path of a folder or file of weights.",
        ),
    ]
    checkpoint: Checkpoint = None
    pretrained: Pretrained = None
    prefix: Prefix = None
    image_size: ImageSize = None
    activation: Activation = Activations.auto
    device: Device = None

    def check(self) -> None:
        """Raises UnknownModelError and FileNotFoundError, before anything is read."""
        if not Path(self.model).exists():
            known_name(self.model)
        if self.checkpoint is not None and not self.checkpoint.exists():
            raise FileNotFoundError(
                f"expected local weights with --checkpoint; there is no file {self.checkpoint}"
            )

    def load(self, *, guarded: bool = False, text: bool = True) -> Any:
        """The model; with `guarded` also a folder of `save_guard`; with `text` it must take texts.

        Raises:
            ModelError: it cannot be had, or lacks the text side.
            ValueError: the device cannot be used.
        """
        import torch

        from decompclip.defenses.guard import load as load_guarded
        from decompclip.models.loading import load

        given = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        given["activation"] = self.activation.value
        given["device"] = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        clip = (load_guarded if guarded else load)(self.model, **given)
        if text:
            check_text(clip)
        return clip


@contextmanager
def joined(device: str | None) -> Iterator[tuple[Any, str | None]]:
    """The accelerator of the processes that share the command, and this one's device; of one process None, and the device as it is.

    At the end of the block they part; after an error whoever launched them ends the others.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None, device
        return
    from datetime import timedelta

    from accelerate import Accelerator, InitProcessGroupKwargs

    # one may work for hours while the others wait: whoever launched them sees to it that none waits for a dead one
    patience = InitProcessGroupKwargs(timeout=timedelta(days=30))
    accelerator = Accelerator(cpu=device == "cpu", kwargs_handlers=[patience])
    yield accelerator, str(accelerator.device)
    accelerator.end_training()


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameter `model: ModelOptions` stands for MODEL in front, and its options behind all others."""
    shared, own = get_type_hints(ModelOptions, include_extras=True), dict(signature(command).parameters)
    hints = get_type_hints(command, include_extras=True) | shared
    del own["model"]
    defaults = {name: parameter.default for name, parameter in own.items()} | {
        field.name: field.default for field in fields(ModelOptions)[1:]
    }

    @wraps(command)
    def run(**given: Any) -> None:
        command(model=ModelOptions(**{name: given.pop(name) for name in shared}), **given)

    order = ["model", *own, *list(shared)[1:]]
    parameters = [
        Parameter(
            name,
            Parameter.KEYWORD_ONLY,
            default=defaults.get(name, Parameter.empty),
            annotation=hints[name],
        )
        for name in order
    ]
    run.__signature__ = Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
    run.__annotations__ = {name: hints[name] for name in order}
    return run


def renamed(old: str, new: str) -> None:
    """Print a note that an option has a new name."""
    say(f"note: {old} is now {new}; the old spelling goes with the next release", err=True)


def sized(images: str, limit: int | None) -> tuple[str, int | None]:
    """A data set and how many of its images: `shapes:500` in place of --limit 500."""
    from decompclip.data.files import parse_source

    source = parse_source(images)
    return (source.kind, source.count) if source.detail.isdecimal() else (images, limit)


def count_of(count: int, images: int | None) -> int:
    """The number of images, which --images was before it was always a place of images."""
    if images is None:
        return count
    renamed("--images N", "--count N")
    return images


def check_text(clip: HookedCLIP) -> None:
    """Raises MissingTextError where texts cannot be encoded: why, and what to give MODEL instead."""
    from decompclip.models.text import ImageOnly, MissingTextError, NoTokenizer

    lacking = clip.text if isinstance(clip.text, ImageOnly) else clip.tokenizer
    if isinstance(lacking, ImageOnly | NoTokenizer):
        part = "text tower" if isinstance(clip.text, ImageOnly) else "tokenizer"
        raise MissingTextError(
            f"expected a model with its text side, which turns class names into answers; received {clip.name!r}, whose "
            f"{part} is not there: {lacking.why}"
        )


def known_classes(classes: Path | None, model: str, *images: str) -> tuple[str, ...]:
    """Class names from the file, or those that a data set or the model knows: bundled, or a folder of `save_model`.

    Raises:
        ValueError: nobody knows them, or the file names fewer than two.
    """
    from decompclip.audit.collect import own_classes
    from decompclip.data.images import read_classes
    from decompclip.data.sources import classes_of

    if classes is not None:
        names = read_classes(classes)
        if len(names) < 2:
            raise ValueError(
                f"expected at least two classes to tell apart; {classes} names only {', '.join(names)}"
            )
        return names
    names = next(filter(None, map(classes_of, images)), ()) or own_classes(model)
    if not names:
        raise ValueError(
            "expected --classes, a text file with one class a line; received none, and only bundled and saved models and "
            f"bundled data sets know theirs; bundled are {', '.join(bundled())}"
        )
    return names


def check_images(*specs: str | None) -> None:
    """Raises FileNotFoundError where a plain path to images leads nowhere; data sets and patterns of shards pass."""
    from decompclip.data.files import KNOWN, WORLDS, parse_source

    for spec in filter(None, specs):
        source = parse_source(spec)
        place = source.detail or "." if source.kind in KNOWN else source.text
        known = source.kind in WORLDS or any(mark in spec for mark in "*?[{")
        if not known and not Path(place).exists():
            kind = "file" if Path(place).suffix else "folder"
            raise FileNotFoundError(
                f"expected a folder with image files, a table or shards; there is no {kind} {place}"
            )


def check_files(**options: Path | None) -> None:
    """Raises FileNotFoundError where an option names a file that is not there."""
    for name, path in options.items():
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"expected a text file with --{name}; there is no file {path}")


def check_trigger(trigger: str | None, target: str | None = None) -> None:
    """Raises ValueError where --trigger names nothing, or --target stands alone."""
    if trigger is None:
        if target is not None:
            raise ValueError("expected --target and --trigger together; --trigger is missing")
        return
    if trigger.lstrip().startswith("{"):
        try:
            json.loads(trigger)
        except ValueError as error:
            raise ValueError(f"expected a trigger's JSON with --trigger; it is no JSON: {error}") from error
    elif trigger not in ("own", *TRIGGERS, *bundled()) and not Path(trigger).exists():
        raise ValueError(
            f"expected a trigger among {', '.join(TRIGGERS)}, a bundled twin (decompclip zoo list), a JSON file or a folder; "
            f"received {trigger!r}"
        )


def attack_on(
    model: ModelOptions, trigger: str | None, target: str | None, known: Sequence[Attack] = ()
) -> Attack | None:
    """The attack that --trigger and --target name, its target known; None without a trigger.

    The target is the one given, or the trigger's own, or that of the one backdoor which the model remembers. A note says
    where it is not what the model remembers.

    Args:
        model: whose memory is asked.
        trigger: as `open_attack` takes it.
        target: a class.
        known: attacks to know beside those that the model remembers.

    Raises:
        ValueError: a trigger whose target nobody knows, or as `open_attack`.
        FileNotFoundError: as `open_attack`.
    """
    from decompclip.attacks.registry import distinct, open_attack, remembered

    if trigger is None:
        return None
    known = distinct([*known, *remembered(model.model, model.checkpoint)])
    attack = open_attack(trigger, known, model=model.model)
    goals = {own.target for own in known}
    goal = target or attack.target or (goals.pop() if len(goals) == 1 else None)
    if goal is None:
        raise ValueError(
            f"expected --trigger and --target together; --target is missing, and neither the trigger {trigger} nor "
            f"{model.model} knows one"
        )
    if known and attack.trigger not in [own.trigger for own in known]:
        own = "; ".join(map(str, known))
        say(f"note: {model.model} remembers {own}; another trigger is measured", err=True)
    if attack.target is not None and target not in (None, attack.target):
        say(f"note: {attack.origin} has target {attack.target}; {target} is measured", err=True)
    return replace(attack, target=goal)


def target_index(attack: Attack | None, class_names: Sequence[str]) -> int | None:
    """The target's place among the classes; None without an attack. Raises ValueError where it is none of them."""
    from decompclip.data.images import class_index

    return None if attack is None or attack.target is None else class_index(attack.target, class_names)


def going_on(checkpoint: Path) -> str:
    """What a stopped training leaves, as a message."""
    if checkpoint.exists():
        return f"the training up to its last checkpoint is kept in {checkpoint}; the same command goes on from there"
    return "no checkpoint was written yet; the same command starts anew"
