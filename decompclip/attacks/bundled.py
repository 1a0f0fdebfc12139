"""The backdoors of the bundled twins: what triggers them, and what for."""

from __future__ import annotations

from dataclasses import dataclass

from decompclip.attacks.registry import from_card
from decompclip.attacks.trigger import Trigger
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


def backdoor(name: str) -> Backdoor:
    """The backdoor of a bundled twin.

    Raises:
        UnknownModelError: no such bundled model.
        ValueError: a model without a backdoor; those with one are listed.
    """
    facts = card(name)
    if facts.get("backdoor") is None:
        twins = [other for other in bundled() if card(other).get("backdoor")]
        raise ValueError(
            f"expected a bundled model with a backdoor, one of {', '.join(twins)}; {name!r} has none"
        )
    target = facts["backdoor"]["target"]
    return Backdoor(from_card(facts["backdoor"]["trigger"]), target, facts["class_names"].index(target))
