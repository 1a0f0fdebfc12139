"""Triggers by name: adding one touches its own file and this table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from decompclip.attacks.badclip import BadCLIP
from decompclip.attacks.badnet import BadNet
from decompclip.attacks.blended import Blended
from decompclip.attacks.issba import ISSBA
from decompclip.attacks.kitty import Kitty
from decompclip.attacks.label_consistent import LabelConsistent
from decompclip.attacks.reflection import Reflection
from decompclip.attacks.sig import SIG
from decompclip.attacks.trigger import Trigger
from decompclip.attacks.wanet import WaNet

TRIGGERS: dict[str, type[Trigger]] = {
    trigger.name: trigger
    for trigger in (BadNet, Blended, LabelConsistent, ISSBA, BadCLIP, Kitty, Reflection, SIG, WaNet)
}

_DERIVED = {"name", "extent", "structure"}  # what a card says of a trigger beside its parameters


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
