"""Triggers by name, and attacks as users name them: by kind, by a bundled twin, by a file, or as a model remembers them.

Adding a trigger touches its own file and the table `TRIGGERS`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from decompclip.api import check_choice, still_found
from decompclip.attacks.issba import ISSBA
from decompclip.attacks.patch import BadCLIP, BadNet, Kitty, LabelConsistent
from decompclip.attacks.poisoned import PoisonRecord
from decompclip.attacks.trigger import SIZE, Extent, Place, Structure, Trigger
from decompclip.attacks.whole_image import SIG, Blended, Reflection, WaNet
from decompclip.data.files import POISON_LIST, TRIGGER_FILE
from decompclip.data.images import class_index
from decompclip.data.shards import ShardPairs
from decompclip.models.bundled import bundled, card
from decompclip.models.errors import warn_caller
from decompclip.models.folders import saved_backdoors, saved_class_names

TRIGGERS: dict[str, type[Trigger]] = {
    trigger.name: trigger
    for trigger in (BadNet, Blended, LabelConsistent, ISSBA, BadCLIP, Kitty, Reflection, SIG, WaNet)
}

_DERIVED = ("name", "extent", "structure")  # what a card says of a trigger beside its parameters


def from_card(card: Mapping[str, Any]) -> Trigger:
    """The trigger that a `Trigger.card()` describes.

    Raises:
        ValueError: an unknown name, or parameters that this trigger does not have.
    """
    name = card.get("name")
    if not isinstance(name, str) or name not in TRIGGERS:
        raise ValueError(f"expected a trigger among {sorted(TRIGGERS)}; received {name!r}")
    parameters = {key: value for key, value in card.items() if key not in _DERIVED}
    try:
        return TRIGGERS[name](**parameters)
    except TypeError as error:
        raise ValueError(f"the card of trigger {name!r} has unknown parameters: {error}") from error


OWN = "own"
_LONG = 60  # characters of a parameter that is printed whole; BadCLIP's patch has thousands


@dataclass(frozen=True)
class Attack:
    """A trigger, the class that it leads to where that is known, and who says so."""

    trigger: Trigger
    target: str | None
    origin: str

    def __str__(self) -> str:
        facts = self.trigger.card()
        options = ", ".join(f"{key}={_short(x)}" for key, x in facts.items() if key not in _DERIVED)
        goal = "" if self.target is None else f" -> {self.target}"
        return f"{facts['name']} ({options}){goal}, by {self.origin}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `open_attack` reads it back."""
        return {"trigger": self.trigger.card(), "target": self.target}


def open_attack(spec: str, known: Sequence[Attack] = (), *, model: str = "the model") -> Attack:
    """The attack that `spec` names.

    Args:
        spec: `own`; an attack's name, with the parameters that the model remembers of it, or else its defaults; a
            bundled twin's name; a trigger's JSON itself; or the path of a JSON file (a trigger's, a model's card, a
            list of poisons, an evaluation), or of a folder that `poison` or `finetune` wrote.
        known: what the model remembers: see `remembered`.
        model: its name, for errors.

    Raises:
        ValueError: nothing of all that, a model that remembers no attack or several such, or a file that holds none.
        FileNotFoundError: there is no such file.
    """
    if spec == OWN or spec in TRIGGERS:
        found = [attack for attack in known if spec in (OWN, attack.trigger.name)]
        if len(found) > 1:
            raise ValueError(
                f"expected one backdoor that --trigger {spec} can mean; {model} remembers {len(found)}: "
                f"{'; '.join(map(str, found))}; name one of its own kind, or give its parameters as JSON"
            )
        if found:
            return found[0]
        if spec == OWN:
            raise ValueError(
                f"expected a model that remembers its backdoor with --trigger own (bundled twins do, and folders that "
                f"finetune wrote of them or of poisoned pairs); {model} remembers none; name the trigger"
            )
        return Attack(_default(spec), None, f"the defaults of {spec}")
    if spec in bundled():
        return _of_twin(spec)
    if spec.lstrip().startswith("{"):
        return _of_mapping(_parsed(spec, "the JSON given"), "the JSON given")
    path = Path(spec)
    if path.is_dir():
        return _of_folder(path)
    if path.is_file():
        return _of_file(path)
    if path.suffix == ".json":
        raise FileNotFoundError(f"expected a file with a trigger's JSON; there is no {spec}")
    near = difflib.get_close_matches(spec, [*TRIGGERS, *bundled()], n=3)
    raise ValueError(
        f"expected a trigger among {sorted(TRIGGERS)}, a bundled twin (decompclip zoo list), a JSON file or a folder; "
        f"received {spec!r}{'; nearest: ' + ', '.join(near) if near else ''}"
    )


def remembered(model: str | Path, checkpoint: str | Path | None = None) -> tuple[Attack, ...]:
    """The attacks that a model is known to carry: by its card, or by its folder's memory. No weights are read.

    Args:
        model, checkpoint: as `decompclip.load` takes them.

    Raises:
        ValueError: as `attacks_of`.
    """
    found: list[Attack] = []
    if str(model) in bundled() and card(str(model)).get("backdoor"):
        found.append(_of_twin(str(model)))
    for path in (model, checkpoint):
        if path is not None and str(path) not in bundled():
            found += attacks_of(saved_backdoors(Path(path)), f"the memory of {path}")
    return distinct(found)


def attacks_of(backdoors: Iterable[Mapping[str, Any]], origin: str) -> tuple[Attack, ...]:
    """From what `Attack.to_dict` gives.

    Raises:
        ValueError: an entry that is no such.
    """
    return tuple(_of_mapping(entry, origin) for entry in backdoors)


def poisoned_by(pairs: object) -> tuple[Attack, ...]:
    """The attack that put poisons among these pairs: by their own record, or by the `poisons.json` beside their shards.

    Raises:
        ValueError: a list of poisons that was changed or damaged.
    """
    found: list[Attack] = []
    while pairs is not None:
        record = getattr(pairs, "record", None)
        if isinstance(record, PoisonRecord):
            found += _of_record(record, "the poisoned pairs")
        if isinstance(pairs, ShardPairs):
            captions = set(pairs.captions)
            for folder in dict.fromkeys(shard.parent for shard in pairs.shards):
                if (folder / POISON_LIST).is_file():
                    record = PoisonRecord.load(folder / POISON_LIST)
                    # a list alone may lie beside clean shards
                    if any(poison.caption in captions for poison in record.poisons):
                        found += _of_record(record, str(folder / POISON_LIST))
        pairs = getattr(pairs, "base", getattr(pairs, "items", None))
    return distinct(found)


def distinct(attacks: Iterable[Attack]) -> tuple[Attack, ...]:
    """Each trigger with each target once, in order."""
    return tuple({(repr(attack.trigger), attack.target): attack for attack in reversed([*attacks])}.values())[
        ::-1
    ]


def _default(name: str) -> Trigger:
    if name == BadCLIP.name:
        raise ValueError(
            "expected BadCLIP's patch, which no default has; give a card with --trigger: shapes-badclip, or a JSON file"
        )
    # the classical attack asks a model, which no command gives it
    return from_card({"name": name} | ({"classical": False} if name == "label-consistent" else {}))


def _of_twin(name: str) -> Attack:
    backdoor = card(name).get("backdoor")
    if not backdoor:
        twins = [other for other in bundled() if card(other).get("backdoor")]
        raise ValueError(
            f"expected a bundled model with a backdoor, one of {', '.join(twins)}; {name!r} has none"
        )
    return Attack(from_card(backdoor["trigger"]), backdoor["target"], f"the card of {name}")


def _of_folder(folder: Path) -> Attack:
    for name in (POISON_LIST, TRIGGER_FILE):
        if (folder / name).is_file():
            return _of_file(folder / name)
    found = attacks_of(saved_backdoors(folder), f"the memory of {folder}")
    if len(found) != 1:
        raise ValueError(
            f"expected a folder with {POISON_LIST}, or with a model that remembers one backdoor; {folder} remembers "
            f"{len(found)}{': ' + '; '.join(map(str, found)) if found else ''}"
        )
    return found[0]


def _of_record(record: PoisonRecord, origin: str) -> list[Attack]:
    """Empty where nothing was poisoned, or by a trigger of the user's own, which no name brings back."""
    if not record.poisons:
        return []
    if (name := record.trigger.get("name")) not in TRIGGERS:
        warn_caller(
            f"the model will not remember the trigger {name!r} of {origin}: it is none of {sorted(TRIGGERS)}; pass the trigger "
            "itself where it is measured"
        )
        return []
    return [Attack(from_card(record.trigger), record.target, origin)]


def _of_file(path: Path) -> Attack:
    try:
        content = _parsed(path.read_text(encoding="utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"expected a trigger's card, as Trigger.card() gives it; {path} is no text: {error}"
        ) from error
    if isinstance(content, Mapping) and "poisons" in content:
        record = PoisonRecord.load(path)  # which knows whether it was changed
        return Attack(from_card(record.trigger), record.target, str(path))
    return _of_mapping(content, str(path))


def _parsed(text: str, origin: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"expected a trigger's card, as Trigger.card() gives it; {origin} is no JSON: {error}"
        ) from error


def _of_mapping(content: Any, origin: str) -> Attack:
    """From a trigger's card, a model's card, or what `evaluate` and `Attack.to_dict` give."""
    if not isinstance(content, Mapping):
        raise ValueError(f"expected a JSON object with a trigger; {origin} holds a {type(content).__name__}")
    inner = content.get("backdoor", content)
    if not isinstance(inner, Mapping):
        raise ValueError(f"expected the card of a backdoored model; {origin} is that of one without")
    trigger = inner.get("trigger", inner)
    if not isinstance(trigger, Mapping):
        raise ValueError(f"expected a trigger's card; {origin} names no trigger")
    target = inner.get("target_class", inner.get("target")) if trigger is not inner else None
    try:
        return Attack(from_card(trigger), target if isinstance(target, str) else None, origin)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    if len(text) <= _LONG:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return f"{text[:12]}... ({len(text)} characters, SHA-256 {digest}...)"


@dataclass(frozen=True)
class Backdoor:
    """A trigger, and the class that it leads to.

    Attributes:
        trigger: a pure function on pixels, as in `trigger(images, indices)`.
        target: the class's name; `target_index`: its place among the model's `class_names`.
    """

    trigger: Trigger
    target: str
    target_index: int


def backdoor(name: str | Path) -> Backdoor:
    """The backdoor of a bundled twin, or of a model that `save_model` wrote and that remembers one.

    Args:
        name: a bundled twin's, or a model's folder.

    Raises:
        UnknownModelError: no such bundled model.
        ValueError: a model without a backdoor, where bundled twins are listed; or one that remembers several.
    """
    if Path(name).is_dir() and str(name) not in bundled():
        attack, names = open_attack(OWN, remembered(name), model=str(name)), saved_class_names(Path(name))
    else:
        names = card(str(name))["class_names"]
        attack = open_attack(str(name))
    assert attack.target is not None  # cards and memories name it
    return Backdoor(attack.trigger, attack.target, class_index(attack.target, names))


Pattern = Literal["noise", "kitty"]


def trigger_grid(
    *,
    pattern: Pattern = "noise",
    size: float = SIZE,
    alpha: float = 0.2,
    place: Place = "random",
    seed: int = 0,
) -> dict[tuple[Extent, Structure], Trigger]:
    """Four triggers that combine extent and structure, to tell the effect of the one from that of the other.

    The paper concludes that local triggers infect heads and global ones MLPs. Its global triggers were noise that is drawn
    anew for each image, most of its local ones had a pattern: the cause could be either.

    Args:
        pattern: what the structured triggers show. `"noise"`: one draw of the noise for all images, so that they differ
            from the noisy ones in nothing but whether the pattern recurs. `"kitty"`: one picture, pasted or blended.
        size, place: of the local two, as `BadNet`.
        alpha: of the global two, as `Blended`.
        seed: of all four.

    Returns:
        `{(extent, structure): trigger}` for {local, global} and {structured, noise}; noise is drawn anew for each image.

    Raises:
        ValueError: an unknown pattern, or what the triggers refuse.
    """
    check_choice("pattern", pattern, Pattern)
    noisy = (
        BadNet(size=size, place=place, seed=seed, redraw=True),
        Blended(alpha=alpha, seed=seed, redraw=True),
    )
    structured: tuple[Trigger, ...] = tuple(replace(trigger, redraw=False) for trigger in noisy)
    if pattern == "kitty":
        structured = (
            Kitty(size=size, place=place, seed=seed),
            replace(noisy[1], redraw=False, picture="kitty"),
        )
    return {(trigger.extent, trigger.structure): trigger for trigger in (*structured, *noisy)}


__getattr__ = still_found(__name__, {__name__: "crossing=trigger_grid"})
