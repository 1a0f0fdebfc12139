"""One backdoored model with all that an analysis looks at: images, labels, trigger and terms."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decompclip.attacks.trigger import Trigger
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.maps import Convention
from decompclip.evaluation.evaluate import Encoder, classify
from decompclip.evaluation.metrics import AttackReport, attack_report, predict
from decompclip.models.clip import HookedCLIP

Part = Literal["fit", "clean", "triggered"]

BATCH = 64

LEAST_FIT = 200
"""Clean images that a detector learns from, however few are scored: STRIP lays some over others."""

FRESH = 2**40
"""Places of triggered images start here, so that what a trigger draws anew was in no training image."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A backdoored model of a family, before it is loaded.

    Attributes:
        name: of the model.
        attack: the trigger's name, as figures show it; members of one attack differ by their seed alone.
        trigger: what was put into its training images, and leads to `target`.
        seed: of the attack.
        weights: their SHA-256, for provenance.
    """

    name: str
    attack: str
    trigger: Trigger
    target: str
    seed: int = 0
    weights: str = ""

    @property
    def kind(self) -> str:
        """The trigger in two words, as docs/method.md, section 5 crosses them."""
        return f"{self.trigger.extent}, {self.trigger.structure}"


@dataclass(frozen=True, eq=False)
class Case:
    """A member, loaded, with the images of one run.

    Attributes:
        fit: clean images in [0, 1] that means, prototypes and thresholds come from; nothing is reported on them.
        clean: clean images that results are reported on, with their `labels`.
        classifier: of the family's classes.
    """

    member: Member
    model: HookedCLIP
    class_names: tuple[str, ...]
    classifier: Float[Tensor, "class d_embed"]
    fit: Float[Tensor, "image 3 h w"]
    clean: Float[Tensor, "image 3 h w"]
    labels: Int[Tensor, " image"]
    _seen: dict[tuple[Part, Convention], Decomposition] = field(default_factory=dict, repr=False)

    @property
    def target(self) -> int:
        return self.class_names.index(self.member.target)

    @property
    def others(self) -> Bool[Tensor, " image"]:
        """Which of `clean` are not of the target's class: attack success is counted on these with the trigger."""
        return self.labels != self.target

    @cached_property
    def triggered(self) -> Float[Tensor, "image 3 h w"]:
        """`clean` with the trigger, image by image."""
        return self.member.trigger(self.clean, FRESH + torch.arange(len(self.clean)))

    def images(self, part: Part) -> Float[Tensor, "image 3 h w"]:
        """In [0, 1].

        Raises:
            ValueError: no such part.
        """
        if part not in get_args(Part):
            raise ValueError(f"expected a part of {get_args(Part)}; received {part!r}")
        return getattr(self, part)

    def terms(self, part: Part, convention: Convention = "paper") -> Decomposition:
        """Terms of unit features, computed once.

        Raises:
            ValueError: no such part.
        """
        key = (part, convention)
        if key not in self._seen:
            self._seen[key] = self.decompose(self.images(part), convention)
        return self._seen[key]

    @torch.no_grad()
    def decompose(
        self, images: Float[Tensor, "image 3 h w"], convention: Convention = "paper"
    ) -> Decomposition:
        """Terms of the unit features of images in [0, 1]."""
        return Decomposition.cat(
            [
                self.model.decompose(self.model.normalize(x), convention=convention, normalize=True)
                for x in images.split(BATCH)
            ]
        )

    def answers(self, features: Float[Tensor, "image d_embed"]) -> Int[Tensor, " image"]:
        return predict(features, self.classifier.to(features))

    def report(self, clean: Int[Tensor, " image"], triggered: Int[Tensor, " image"]) -> AttackReport:
        """CACC, ASR and control of answers to `clean` and to `triggered`, target-class images excluded."""
        return attack_report(
            clean, self.labels, triggered, self.labels, self.target, n_classes=len(self.class_names)
        )

    def report_of(self, edit: Any = None, convention: Convention = "paper") -> dict[str, Any]:
        """The same for the terms as they are or after a direct edit, or for what encodes images, ready for JSON."""
        answers = []
        for part in ("clean", "triggered"):
            if isinstance(edit, Encoder):
                pixels = self.images(part).split(BATCH)
                answers.append(torch.cat([classify(edit, x, self.classifier) for x in pixels]))
            else:
                d = self.terms(part, convention)
                answers.append(self.answers((d if edit is None else edit(d)).features))
        return self.report(*answers).to_dict()
