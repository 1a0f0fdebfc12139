"""Defenses that fine-tune the whole model on clean image-text pairs: one shape for all of them.

    tuned = CleanCLIP().apply(model, clean_pairs)
    tuned.model, tuned.history

Each leaves the model that it is given as it is, and gives a `HookedCLIP` on which every repair and detector works: the
paper's plug-and-play rows (He et al. 2025, table 1) are `DecompRep` fitted on `tuned.model`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from decompclip.defenses.inversion import InvertedTrigger
from decompclip.models.clip import HookedCLIP
from decompclip.training.finetune import FineTuned, PairSource, finetune
from decompclip.training.recipes import FineTuning, TrainingStep, features_of, recipe_named

FURTHEST = 4.0
"""Squared distance of two unit vectors that point opposite ways."""


@dataclass(frozen=True, eq=False)
class Push:
    """A penalty for `finetune`: minus the distance from a frozen model's features, up to a threshold.

    Source: Singh, Croce and Hein, "Perturb and Recover: Fine-tuning for Effective Backdoor Removal from CLIP"
    (arXiv 2412.00727). What a text and an image of a backdoor have in common is moved, and CLIP's loss has the useful
    part back. The authors' code drops a distance from the loss once its mean over the batch is above the threshold; here
    the threshold takes its place, which has the same gradient and no jump. Left open by the sources that we read:
    whether the logit scale is trained (theirs is not; ours is, as everywhere), and how views of images are made (theirs
    are augmented; ours are the pairs as they come).

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
    def from_model(model: HookedCLIP, **options: float) -> Push:
        """Away from `model` as it is now.

        Raises:
            MissingTextError: the model has no text tower.
        """
        frozen = model.to_open_clip().float().to(model.device)
        return Push(frozen.eval().requires_grad_(False), **options)

    def __call__(self, seen: TrainingStep) -> Float[Tensor, ""]:
        with torch.no_grad():
            image, text, _ = features_of(self.frozen.to(seen.images.device)(seen.images, seen.tokens))
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


@dataclass(frozen=True, kw_only=True)
class TuningDefense:
    """A defense that fine-tunes.

    Attributes:
        recipe: how, or the name of one of `RECIPES`; its loss is one of `losses`.

    Raises:
        ValueError: an unknown recipe, or one of another loss.
    """

    recipe: FineTuning | str
    losses: ClassVar[tuple[str, ...]] = ("clip", "grouped")

    def __post_init__(self) -> None:
        recipe = recipe_named(self.recipe) if isinstance(self.recipe, str) else self.recipe
        if recipe.loss not in self.losses:
            raise ValueError(
                f"expected a recipe of the loss {' or '.join(self.losses)} for {type(self).__name__}; received one of "
                f"{recipe.loss!r}"
            )

    def apply(self, model: HookedCLIP, pairs: PairSource, **options: Any) -> FineTuned:
        """A fine-tuned copy of `model`.

        Args:
            model: left as it is.
            pairs: clean ones.
            options: of `finetune`: `monitor`, `checkpoint`, `seed`, `length`, `synonyms`, ...

        Raises:
            As `finetune`.
        """
        return finetune(model, pairs, self.recipe, **options)


@dataclass(frozen=True, kw_only=True)
class CleanFineTuning(TuningDefense):
    """CLIP's own loss on clean pairs, and nothing more: the control of the others. See `TuningDefense`."""

    recipe: FineTuning | str = CLEAN_RECIPE


@dataclass(frozen=True, kw_only=True)
class CleanCLIP(TuningDefense):
    """CLIP's loss plus the loss between two views of each image and of each text (Bansal et al. 2023; docs/method.md, section 5).

    A backdoor ties a trigger to a caption; agreement within each modality alone loosens that tie. See `TuningDefense`.
    """

    recipe: FineTuning | str = "cleanclip"
    losses: ClassVar[tuple[str, ...]] = ("cleanclip",)


@dataclass(frozen=True, kw_only=True)
class PAR(TuningDefense):
    """Perturb and recover (Singh et al. 2024): away from the features at the start, while CLIP's loss is kept low.

    Attributes:
        recipe: as `TuningDefense`.
        threshold: as `Push`.
        weight: as `Push`.
    """

    recipe: FineTuning | str = PAR_RECIPE
    threshold: float = 2.15
    weight: float = 0.5

    def apply(self, model: HookedCLIP, pairs: PairSource, **options: Any) -> FineTuned:
        """See `TuningDefense.apply`; raises ValueError also for a threshold or a weight out of range.

        Args:
            model: to repair.
            pairs: clean.
            **options: as `TuningDefense.apply`.
        """
        push = Push.from_model(model, threshold=self.threshold, weight=self.weight)
        return super().apply(model, pairs, penalty=push, **options)


@dataclass(frozen=True, eq=False)
class Unlearn:
    """A penalty for `finetune`: how far features of images, as they are and with triggers, are from a frozen model's of the former.

    InverTune (Sun et al. 2025) holds the activations of the layers that a trigger moves most; here it is what they sum to.

    Attributes:
        frozen: the model as it was.
        triggers: of n, each is put on every n-th image.
        weight: of both mean squared distances of unit features.

    Raises:
        ValueError: no trigger, or a weight that is not above 0.
    """

    frozen: HookedCLIP = field(repr=False)
    triggers: tuple[InvertedTrigger, ...]
    weight: float

    def __post_init__(self) -> None:
        if not (self.triggers and self.weight > 0):
            raise ValueError(
                f"expected triggers to unlearn, of `invert_trigger`, and a weight above 0; received {len(self.triggers)} and {self.weight}"
            )

    def __repr__(self) -> str:
        patterns = ", ".join(trigger.digest for trigger in self.triggers)  # a run goes on with the same ones
        return f"Unlearn(weight={self.weight}, patterns of sha256 {patterns})"

    def __call__(self, seen: TrainingStep) -> Float[Tensor, ""]:
        net, frozen, n = cast(Any, seen.net), self.frozen, len(self.triggers)
        hit = frozen.denormalize(seen.images).clamp(0, 1)
        for place, trigger in enumerate(self.triggers):
            hit[place::n] = trigger(hit[place::n])
        with torch.no_grad():
            then = frozen.encode_image(seen.images.to(frozen.device), normalize=True).to(seen.image)
        triggered = net.encode_image(frozen.normalize(hit), normalize=True).float()
        far = [(now - then).square().sum(1).mean() for now in (seen.image, triggered)]
        return self.weight * (far[0] + far[1])


INVERSION_RECIPE = FineTuning(epochs=2, batch_size=32, lr=5e-4, weight_decay=0.0)
"""Few steps at a high rate: the images hold the features where they were."""


@dataclass(frozen=True, kw_only=True)
class InversionTuning(TuningDefense):
    """Against inverted triggers: images with one shall have the features of those without. See `TuningDefense`.

    Attributes:
        recipe: as `TuningDefense`.
        triggers: of `invert_trigger`, for the classes suspected.
        weight: of `Unlearn`, beside CLIP's loss.
    """

    recipe: FineTuning | str = INVERSION_RECIPE
    triggers: tuple[InvertedTrigger, ...]
    weight: float = 10.0

    def apply(self, model: HookedCLIP, pairs: PairSource, **options: Any) -> FineTuned:
        """See `TuningDefense.apply`; raises as `Unlearn` too.

        Args:
            model: to repair.
            pairs: clean.
            **options: as `TuningDefense.apply`.
        """
        return super().apply(model, pairs, penalty=Unlearn(model, self.triggers, self.weight), **options)


TUNING_DEFENSES: dict[str, type[TuningDefense]] = {
    "clean": CleanFineTuning,
    "cleanclip": CleanCLIP,
    "par": PAR,
}
"""By name, those that need no more than pairs."""
