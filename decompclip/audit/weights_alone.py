"""What weights alone say of a model beside its reference, for the report: parts, words, classes. No verdict stands on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from decompclip.audit.components import short
from decompclip.models.clip import HookedCLIP
from decompclip.models.text import MissingTextError
from decompclip.operators.checkpoints import CLASSES, compare_checkpoints

SHOWN = 10
"""Parts and classes of a report: the first."""

SAID = ("change", "share", "texts")
"""Of a part."""


@dataclass(frozen=True)
class WeightsAlone:
    """The first of `compare_checkpoints`' answers, in the order of their size.

    Attributes:
        reference: the model that this one is held against.
        classes: `rank`, `class`, `score`, `image` and `text` of those along which both towers changed most; none where fewer
            than three are known.
        lead: the highest score over the second; None without classes.
        parts: `part`, `change` of its map, `share` of that along its first direction, and `texts` for this direction.
        median_change: over all heads and MLPs.
        text_change: of the text tower's weights.
        left_out: why the two cannot be compared; empty where they were.
    """

    reference: str
    classes: tuple[dict[str, Any], ...] = ()
    lead: float | None = None
    parts: tuple[dict[str, Any], ...] = ()
    median_change: float = 0.0
    text_change: float = 0.0
    left_out: str = ""

    @property
    def in_short(self) -> str:
        """What came out, in two sentences."""
        if self.left_out:
            return f"Not compared: {self.left_out}."
        most = self.parts[0]
        text = f"{most['part']} changed most, by {100 * most['change']:.0f} % (half of all heads and MLPs by {100 * self.median_change:.0f} % or less); the "
        text += f"text tower by {100 * self.text_change:.0f} %."
        if self.lead is None:
            return f"{text} Classes are not ranked: fewer than {CLASSES} are known."
        if self.lead <= 1:
            return f"{text} No class stands first."
        first, second = (entry["class"] for entry in self.classes[:2])
        return f"{text} Both towers changed most along “{first}”, {self.lead:.2f} times as much as along “{second}”."


def weights_alone(
    model: HookedCLIP, reference: HookedCLIP, class_names: Sequence[str], *, name: str | None = None
) -> WeightsAlone:
    """Compare two models by their weights; one that cannot be compared is no error of an audit.

    Args:
        model: the one that is audited.
        reference: the one that it is said to come from.
        class_names: to rank.
        name: of the reference, by default its own.
    """
    name = name or reference.name
    names = tuple(class_names) if len(class_names) >= CLASSES else ()
    try:
        found = compare_checkpoints(model, reference, class_names=names)
    except (ValueError, MissingTextError) as error:
        return WeightsAlone(name, left_out=str(error))
    classes = found.classes
    most = found.top(SHOWN)
    parts = zip(most.parts, most.to_frame().to_dict("records"), strict=True)
    return WeightsAlone(
        name,
        classes=() if classes is None else tuple(classes.top(SHOWN).to_frame().to_dict("records")),
        lead=None if classes is None else classes.lead,
        parts=tuple({"part": short(part), **{key: row[key] for key in SAID}} for part, row in parts),
        median_change=found.change.median().item(),
        text_change=found.text_change,
    )


CONCLUDES = (
    "It can say where to look: parts, words, and a class. The attacker's class came first of 200 in 18 of 18 bundled backdoored models of photographs, on which nothing was chosen; "
    "and in 22 of 22 of simpler images, on which the score was chosen. Those of one world come from one model and lead to one class: they are fewer tests than models.",
    "It cannot tell a backdoor from an honest fine-tuning: some class is always first. In 7 clean fine-tunings that saw an eighth of the images of their recipe's backdoored model (of photographs, "
    "a hundredth) the first class led by 1.00 to 1.20; in backdoored ones by 1.05 to 4.37. A lead may grow with the length of a training, and clean ones of the same length were not trained: "
    "no verdict rests on a lead. Compare with clean fine-tunings of the model's own recipe and length.",
    "Words alone are no sign: the attacker's class is among those of the parts that changed most in clean fine-tunings too.",
    "It cannot clear a model: where heads look, which neurons fire, biases, and what later layers make of a change are left out, and an attacker who knows the score can change other classes as well.",
    "It says nothing of a model that was not fine-tuned from the reference: heads and neurons have no common order then.",
)
"""What weights alone can and cannot conclude; the numbers are those of `python -m analyses.weights_alone`."""
