"""The backdoors of bundled twins and of saved models: what triggers them, and what for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from decompclip.attacks.named import open_attack, remembered
from decompclip.attacks.trigger import Trigger
from decompclip.data.images import class_index
from decompclip.models.folders import saved_class_names
from decompclip.models.zoo import bundled, card


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

    Raises:
        UnknownModelError: no such bundled model.
        ValueError: a model without a backdoor, where bundled twins are listed; or one that remembers several.
    """
    if Path(name).is_dir() and str(name) not in bundled():
        attack, names = open_attack("own", remembered(name), model=str(name)), saved_class_names(Path(name))
    else:
        names = card(str(name))["class_names"]
        attack = open_attack(str(name))
    assert attack.target is not None  # cards and memories name it
    return Backdoor(attack.trigger, attack.target, class_index(attack.target, names))
