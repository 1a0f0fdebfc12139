"""PAR's perturbation: away from the poisoned model's features, up to a threshold.

Source: Singh, Croce and Hein, "Perturb and Recover: Fine-tuning for Effective Backdoor Removal from CLIP"
(arXiv 2412.00727), whose loss is CLIP's on clean pairs minus half of each tower's squared distance to the features of
the model that it starts from. What a text and an image of a backdoor have in common is moved, and CLIP's loss has the
useful part back.

The authors' code drops a distance from the loss once its mean over the batch is above the threshold; so does this, with
the threshold in its place, which has the same gradient and no jump. Left open by the sources that we read: whether the
logit scale is trained (their code uses its value alone, here it is trained, as everywhere), and how views of images are
made (theirs are augmented; here the pairs are as they come).

Defenses that fine-tune the whole model on clean image-text pairs: one shape for all of them.

    tuned = CleanCLIP().apply(model, clean_pairs)
    tuned.model, tuned.history

Each leaves the model that it is given as it is, and its result is a `HookedCLIP` on which every repair and detector
works as before: the paper's plug-and-play rows (He et al. 2025, table 1) are `DecompRep` fitted on `tuned.model`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from decompclip.models.clip import HookedCLIP
from decompclip.training.finetune import FineTuned, PairSource, finetune
from decompclip.training.losses import Seen, features_of
from decompclip.training.recipes import FineTuning, recipe_named

FURTHEST = 4.0
"""Squared distance of two unit vectors that point opposite ways."""


@dataclass(frozen=True, eq=False)
class Push:
    """A penalty for `finetune`: minus the distance from a frozen model's features, up to a threshold.

    Made by `Push.from_model`.

    Attributes:
        frozen: the open_clip model to move away from.
        threshold: mean squared distance of unit features, of images and of texts, beyond which nothing is gained.
        weight: of each of the two distances.

    Raises:
        ValueError: a threshold that no distance reaches, or a weight that is not above 0.
    """

    frozen: nn.Module = field(repr=False)
    threshold: float = 2.15
    weight: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= FURTHEST:
            raise ValueError(
                f"expected a threshold in (0, {FURTHEST:g}], for unit features are no further apart; received "
                f"{self.threshold}"
            )
        if not self.weight > 0:
            raise ValueError(f"expected a weight above 0; received {self.weight}")

    @staticmethod
    def from_model(model: HookedCLIP, *, threshold: float = 2.15, weight: float = 0.5) -> Push:
        """Away from `model` as it is now.

        Raises:
            MissingTextError: the model has no text tower.
        """
        frozen = model.to_open_clip().float().to(model.device)
        return Push(frozen.eval().requires_grad_(False), threshold, weight)

    def __call__(self, seen: Seen) -> Float[Tensor, ""]:
        with torch.no_grad():
            image, text, _ = features_of(self.frozen.to(seen.pixels.device)(seen.pixels, seen.tokens))
        far = [
            (now - then).square().sum(1).mean().clamp(max=self.threshold)
            for now, then in ((seen.image, image), (seen.text, text))
        ]
        return -self.weight * (far[0] + far[1])


CLEAN_RECIPE = FineTuning(epochs=10, batch_size=64, lr=5e-6)
"""CleanCLIP's without its self-supervised loss."""

PAR_RECIPE = FineTuning(epochs=10, batch_size=256, lr=3e-5, weight_decay=1e-4, betas=(0.9, 0.98))
"""PAR's, on 250,000 clean pairs, as the defaults of the authors' code have it, but for the schedule: theirs starts at
3e-5, falls to 3e-6 by half of the steps and then as a cosine; here it is one cosine from 3e-5."""


@runtime_checkable
class TuningDefense(Protocol):
    """A defense that fine-tunes."""

    @property
    def recipe(self) -> FineTuning | str: ...

    def apply(self, model: HookedCLIP, pairs: PairSource, **options: Any) -> FineTuned:
        """A fine-tuned copy of `model`.

        Args:
            pairs: clean ones.
            options: of `finetune`: `monitor`, `checkpoint`, `seed`, `length`, `synonyms`, ...

        Raises:
            As `finetune`.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class CleanFineTuning:
    """CLIP's own loss on clean pairs, and nothing more: the control of the two others.

    Attributes:
        recipe: how, or the name of one of `RECIPES`.

    Raises:
        ValueError: an unknown recipe, or one of CleanCLIP's loss.
    """

    recipe: FineTuning | str = CLEAN_RECIPE

    def __post_init__(self) -> None:
        _check_loss(self, ("clip", "grouped"))

    def apply(self, model: HookedCLIP, pairs: PairSource, **options: Any) -> FineTuned:
        """See `TuningDefense.apply`."""
        return finetune(model, pairs, self.recipe, **options)


@dataclass(frozen=True, kw_only=True)
class CleanCLIP:
    """CLIP's loss plus the loss between two views of each image and of each text (Bansal et al. 2023; docs/method.md, section 5).

    A backdoor ties a trigger to a caption; agreement within each modality alone loosens that tie.

    Attributes:
        recipe: how, or the name of one of `RECIPES`; its loss is "cleanclip".

    Raises:
        ValueError: an unknown recipe, or one of another loss.
    """

    recipe: FineTuning | str = "cleanclip"

    def __post_init__(self) -> None:
        _check_loss(self, ("cleanclip",))

    def apply(self, model: HookedCLIP, pairs: PairSource, **options: Any) -> FineTuned:
        """See `TuningDefense.apply`."""
        return finetune(model, pairs, self.recipe, **options)


@dataclass(frozen=True, kw_only=True)
class PAR:
    """Perturb and recover (Singh et al. 2024): away from the features at the start, while CLIP's loss is kept low.

    Attributes:
        recipe: how, or the name of one of `RECIPES`.
        threshold, weight: as `Push`.

    Raises:
        ValueError: an unknown recipe, or one of CleanCLIP's loss.
    """

    recipe: FineTuning | str = PAR_RECIPE
    threshold: float = 2.15
    weight: float = 0.5

    def __post_init__(self) -> None:
        _check_loss(self, ("clip", "grouped"))

    def apply(self, model: HookedCLIP, pairs: PairSource, **options: Any) -> FineTuned:
        """See `TuningDefense.apply`; raises ValueError also for a threshold or a weight out of range."""
        push = Push.from_model(model, threshold=self.threshold, weight=self.weight)
        return finetune(model, pairs, self.recipe, penalty=push, **options)


TUNING_DEFENSES: dict[str, type[TuningDefense]] = {
    "clean": CleanFineTuning,
    "cleanclip": CleanCLIP,
    "par": PAR,
}
"""By name."""


def tuning_defense(name: str, **options: Any) -> TuningDefense:
    """The defense of a name, with options.

    Raises:
        ValueError: a name that is not in `TUNING_DEFENSES`.
    """
    if name not in TUNING_DEFENSES:
        raise ValueError(f"expected a defense named one of {', '.join(TUNING_DEFENSES)}; received {name!r}")
    return TUNING_DEFENSES[name](**options)


def _check_loss(defense: TuningDefense, losses: tuple[str, ...]) -> None:
    recipe = recipe_named(defense.recipe) if isinstance(defense.recipe, str) else defense.recipe
    if recipe.loss not in losses:
        raise ValueError(
            f"expected a recipe of the loss {' or '.join(losses)} for {type(defense).__name__}; received one of "
            f"{recipe.loss!r}"
        )
