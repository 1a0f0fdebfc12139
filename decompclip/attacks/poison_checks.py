"""Options of poisoning, completed by their defaults and checked."""

from __future__ import annotations

from collections.abc import Sequence

from decompclip.attacks.label_consistent import LabelConsistent
from decompclip.attacks.poison_choice import Rule
from decompclip.attacks.trigger import Logits, Trigger
from decompclip.attacks.wanet import WaNet
from decompclip.data.pairs import Pairs
from decompclip.data.streams import PairStream

WANET_COVERS = 2.0
"""Cover images for each poison, in WaNet's source."""


def poison_texts(
    trigger: Trigger, captions: Sequence[str] | None, rule: Rule, own: Sequence[str]
) -> tuple[str, ...]:
    """What poisons' captions are drawn from: those given, the source's `own` templates, or open_clip's for ImageNet.

    Raises:
        ValueError: captions without a slot {} or the target, none, a single string, or some for an attack that
            keeps the images' own.
    """
    if isinstance(captions, str):
        raise ValueError(f"expected a list of captions; received the single string {captions!r}")
    if trigger.clean_label:
        if captions is not None:
            raise ValueError(
                f"expected no captions, for {trigger.name} keeps those of the images; received {len(captions)}"
            )
        return ()
    if captions is None:
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        return tuple(own) or tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
    silent = [text for text in captions if "{}" not in text and not rule.names(text)]
    if silent or not captions:
        raise ValueError(
            f"expected captions with a slot {{}} or the target {rule.target!r} in them; received "
            f"{repr(silent[0]) if silent else 'none'}; other names of the target go to also_called"
        )
    return tuple(captions)


def cover_share(trigger: Trigger, covers: float | None) -> float:
    """Cover images for each poison.

    Raises:
        ValueError: a negative number, covers for another attack than WaNet, or a trigger that is the cover itself.
    """
    if not isinstance(trigger, WaNet):
        if covers:
            raise ValueError(f"expected covers for WaNet alone; received {covers:g} for {trigger.name}")
        return 0.0
    if trigger.cover:
        raise ValueError(
            "expected the trigger itself, WaNet(cover=False); received cover=True; the cover images follow from covers="
        )
    if covers is not None and covers < 0:
        raise ValueError(f"expected covers that are not negative; received {covers:g}")
    return WANET_COVERS if covers is None else covers


def check_amount(count: int | None, rate: float | None) -> None:
    """Raises ValueError unless one of the two is given, and can be."""
    if (count is None) == (rate is None):
        raise ValueError(f"expected one of count and rate; received count={count} and rate={rate}")
    if count is not None and count < 0:
        raise ValueError(f"expected a count that is not negative; received {count}")
    if rate is not None and not 0 <= rate <= 1:
        raise ValueError(f"expected a rate in [0, 1]; received {rate:g}")


def needs_model(trigger: Trigger) -> bool:
    """Whether the attack asks the clean model about every image that it poisons."""
    return isinstance(trigger, LabelConsistent) and trigger.classical


def check_classical(base: Pairs | PairStream, logits: Logits | None) -> None:
    """Raises ValueError unless the classical Label-Consistent attack has what its gradient steps need."""
    if logits is None or not base.class_names or isinstance(base, PairStream):
        raise ValueError(
            "expected logits, class_names and pairs that are read by place, for the classical attack's gradient "
            f"steps; received {'no ' if logits is None else ''}logits, {len(base.class_names)} classes and "
            f"{type(base).__name__}; give them, or take LabelConsistent(classical=False)"
        )
