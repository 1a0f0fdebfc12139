"""Fine-tuning recipes as data (docs/method.md, section 5)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

from decompclip.training.loop import OptimizerName, Recipe

LossName = Literal["clip", "grouped", "cleanclip"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """How to fine-tune a CLIP on image-text pairs: everything but the model and the pairs.

    Attributes:
        epochs: times that every pair is seen, but for those that fill no batch.
        batch_size: pairs a step.
        lr: the highest learning rate.
        warmup: share of the steps in which the learning rate rises from zero; it then falls as a cosine.
        weight_decay: of all but biases, norms and the logit scale.
        betas: of AdamW.
        max_grad_norm: gradients are scaled down to this norm; None leaves them.
        logit_scale_max: the logarithm of the factor from similarity to logit is kept in 0..this.
        loss: `clip`; `grouped`, where pairs of one class (or, where classes are not known, of one caption) are no
            negatives of each other; `cleanclip`, which adds `ss_weight` times the loss between two views of each
            image and of each text.
        precision: `bf16` multiplies matrices in bfloat16 and keeps weights and losses in fp32. (fp16 would need a
            loss scale, one more state to resume.)
        optimizer, adamw_ratio: as `Recipe`.

    Raises:
        ValueError: an option out of its range.
    """

    epochs: int
    batch_size: int = 128
    lr: float = 1e-5
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: float = 0.05
    max_grad_norm: float | None = None
    logit_scale_max: float = 4.6052
    loss: LossName = "clip"
    ss_weight: float = 1.0
    precision: Precision = "fp32"
    optimizer: OptimizerName = "adamw"
    adamw_ratio: float = 1.0

    def __post_init__(self) -> None:
        known = {"loss": LossName, "precision": Precision, "optimizer": OptimizerName}
        for name, choices in known.items():
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"expected {name} to be one of {', '.join(get_args(choices))}; received {getattr(self, name)!r}"
                )
        # A batch of one pair has no negative: its loss is zero whatever the weights.
        for name, least in (("epochs", 1), ("batch_size", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"expected {name} of at least {least}; received {getattr(self, name)}")
        if not (self.lr > 0 and 0 <= self.warmup < 1):
            raise ValueError(
                f"expected a learning rate above 0 and a warm-up in [0, 1); received {self.lr} and {self.warmup}"
            )

    def over(self, pairs: int) -> Recipe:
        """The training loop's recipe over a data set of so many pairs.

        Raises:
            ValueError: the pairs do not fill one batch.
        """
        if pairs < self.batch_size:
            raise ValueError(
                f"expected at least one batch of {self.batch_size} pairs; received {pairs} pairs; give more, or a "
                "recipe with a smaller batch_size"
            )
        shared = {
            field.name: getattr(self, field.name) for field in fields(Recipe) if field.name != "samples"
        }
        return Recipe(samples=self.epochs * (pairs - pairs % self.batch_size), **shared)


RECIPES = {
    "paper": FineTuning(epochs=5, batch_size=128, lr=1e-5),
    "badclip": FineTuning(epochs=10, batch_size=128, lr=1e-6),
    "cleanclip": FineTuning(epochs=10, batch_size=64, lr=5e-6, loss="cleanclip"),
}
"""By name: He et al. (2025), on 500,000 pairs of which 1,500 are poisoned; the same for BadCLIP's patch (Liang et
al. 2024); and CleanCLIP's defense (Bansal et al. 2023), on 10,000 clean pairs, at 5e-6 or 3e-6."""


def recipe_named(name: str) -> FineTuning:
    """Raises ValueError for a name that is not in `RECIPES`."""
    if name not in RECIPES:
        raise ValueError(f"expected a recipe named one of {', '.join(RECIPES)}; received {name!r}")
    return RECIPES[name]
