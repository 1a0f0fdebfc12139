"""Triggers by name: adding one touches its own file and this table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from decompclip.attacks.badnet import BadNet
from decompclip.attacks.blended import Blended
from decompclip.attacks.trigger import Trigger

TRIGGERS: dict[str, type[Trigger]] = {trigger.name: trigger for trigger in (BadNet, Blended)}


def from_card(card: Mapping[str, Any]) -> Trigger:
    """The trigger that a `Trigger.card()` describes.

    Raises:
        ValueError: an unknown name, or parameters that this trigger does not have.
    """
    name = card.get("name")
    if name not in TRIGGERS:
        raise ValueError(f"expected a trigger among {sorted(TRIGGERS)}; received {name!r}")
    parameters = {key: value for key, value in card.items() if key not in {"name", "extent"}}
    try:
        return TRIGGERS[name](**parameters)
    except TypeError as error:
        raise ValueError(f"the card of trigger {name!r} has unknown parameters: {error}") from error
