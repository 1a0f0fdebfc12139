"""Fine-tuning recipes as data (docs/method.md, section 5), and the losses that they name.

Losses are of batches of image-text pairs; CleanCLIP's self-supervised loss takes second views of images and texts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from open_clip.loss import ClipLoss
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.nn import functional as F

from decompclip.api import check_choice
from decompclip.data.pairs import ALL
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
            check_choice(name, getattr(self, name), choices)
        # A batch of one pair has no negative: its loss is zero whatever the weights.
        for name, least in (("epochs", 1), ("batch_size", 2)):
            given = getattr(self, name)
            if not isinstance(given, Integral) or given < least:
                raise ValueError(
                    f"expected {name} to be a whole number, at least {least}; received {given!r}"
                )
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


@dataclass(frozen=True, eq=False)
class TrainingStep:
    """What a penalty sees of a step: this process's share of the batch.

    Attributes:
        net: the open_clip model in training.
        images: normalised; with `loss="cleanclip"` the second half are views of the first, here and below.
        tokens: of the texts.
        image, text: the net's unit features, in fp32.
    """

    net: nn.Module
    images: Float[Tensor, "view 3 h w"]
    tokens: Int[Tensor, "view position"]
    image: Float[Tensor, "view d_embed"]
    text: Float[Tensor, "view d_embed"]


Penalty = Callable[[TrainingStep], Tensor]
"""Something to add to the loss; a mean over what it is given, since gradients are averaged over processes."""


def features_of(found: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Image and text features and the scale, of what an open_clip model gives; in fp32."""
    if isinstance(found, dict):
        found = [found[key] for key in ("image_features", "text_features", "logit_scale")]
    image, text, scale = (x.float() for x in found[:3])
    return image, text, scale


def grouped_clip_loss(
    image: Float[Tensor, "batch d_embed"],
    text: Float[Tensor, "batch d_embed"],
    scale: Float[Tensor, ""],
    groups: Int[Tensor, " batch"],
) -> Float[Tensor, ""]:
    """The CLIP loss where pairs of one group are no negatives of each other.

    The target of a row is uniform over its group (supervised contrastive loss, Khosla et al. 2020, eq. 2; its
    image-text form is UniCL, Yang et al. 2022). With a group for each pair it is open_clip's `ClipLoss`.

    Args:
        image, text: unit features, pair by pair.
        scale: the logit scale, exponentiated.
        groups: for instance the class that a caption names.

    Raises:
        ValueError: not one text and one group for each image.
    """
    if not len(image) == len(text) == len(groups):
        raise ValueError(
            f"expected a text and a group for each image; received {len(image)} images, {len(text)} texts, "
            f"{len(groups)} groups; pass the features of one batch of pairs"
        )
    same = (groups[:, None] == groups[None, :]).to(image.dtype)
    target = same / same.sum(dim=1, keepdim=True)  # symmetric groups: the same target for both directions
    logits = scale * image @ text.T
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def pair_loss(
    name: LossName,
    image: Float[Tensor, "view d_embed"],
    text: Float[Tensor, "view d_embed"],
    scale: Float[Tensor, ""],
    *,
    groups: Int[Tensor, " view"] | None = None,
    ss_weight: float = 1.0,
    processes: int = 1,
) -> Float[Tensor, ""]:
    """The loss of a whole batch, of which this process holds the share `image` and `text`.

    Each process computes the loss of all pairs. Backward through the gathering sums over the processes what belongs
    to a feature, and averaging over them (DistributedDataParallel) then gives the gradient of the whole batch.

    Args:
        image, text, scale: as `grouped_clip_loss`.
        name: `clip`, `grouped`, or `cleanclip`: CLIP's loss plus `ss_weight` times the mean of the losses
            between two views of the images and of the texts (Bansal et al. 2023, eq. 3); the second half of
            `image` and `text` is then the other view of the first.
        groups: of these pairs, for `grouped`.
        ss_weight: as above.
        processes: how many share the batch.
    """
    clip = ClipLoss()
    if name == "cleanclip":
        (image, image_view), (text, text_view) = (
            tuple(_gather(half.contiguous(), processes) for half in x.chunk(2)) for x in (image, text)
        )
        same = _info_nce(image, image_view, scale) + _info_nce(text, text_view, scale)
        return clip(image, text, scale) + ss_weight * same / 2
    image, text = _gather(image, processes), _gather(text, processes)
    if name == "grouped":
        if groups is None:
            raise ValueError("expected the groups of the pairs; received none; pass groups=")
        return grouped_clip_loss(image, text, scale, _gather(groups, processes))
    return clip(image, text, scale)


def _info_nce(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE from each row of `a` to its own row of `b`."""
    return F.cross_entropy(scale * a @ b.T, torch.arange(len(a), device=a.device))


def _gather(x: Tensor, processes: int) -> Tensor:
    """The rows of all processes, in the order of their ranks; gradients flow back to each."""
    if processes == 1:
        return x
    return torch.cat(all_gather(x))


SHIFT = 0.125
"""Largest shift of a view, as a share of the image's side."""

JITTER = 0.3
"""Largest change of contrast and of each channel's gain."""

EDIT = 0.1
"""Share of a text's words that each of the text edits touches, at least one."""


def image_view(
    images: Float[Tensor, "batch 3 h w"], *, seed: int, of: int | None = None, rows: slice = ALL
) -> Float[Tensor, "batch 3 h w"]:
    """Flip half, shift with reflected borders, zoom a little, change contrast and colour.

    A small local trigger is moved and recoloured by this, hence tied less to its caption.

    Args:
        images: in [0, 1].
        seed: of the draws.
        of: images of the batch that these are the `rows` of, and have the draws of; None for all of it.
        rows: see `of`.
    """
    g = torch.Generator().manual_seed(seed)
    n, device = len(images), images.device
    draw = torch.rand(of or n, 8, generator=g)[rows]
    signed = 2 * draw - 1
    theta = torch.zeros(n, 2, 3)
    zoom = 1 - SHIFT * draw[:, 0]
    theta[:, 0, 0], theta[:, 1, 1] = torch.where(draw[:, 1] < 0.5, -zoom, zoom), zoom
    theta[:, :, 2] = SHIFT * signed[:, 2:4]
    grid = F.affine_grid(theta.to(device, images.dtype), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    gain = (1 + JITTER * signed[:, 4:7]).to(device, images.dtype)[:, :, None, None]
    contrast = (1 + JITTER * signed[:, 7]).to(device, images.dtype)[:, None, None, None]
    mean = moved.mean(dim=(1, 2, 3), keepdim=True)
    return ((moved - mean) * contrast + mean * gain).clamp(0, 1)


def text_view(text: str, *, seed: int, synonyms: Mapping[str, Sequence[str]] | None = None) -> str:
    """One of the four easy data augmentations (Wei and Zou 2019), drawn at random: synonym replacement, insertion of
    a synonym, swap, deletion.

    Args:
        text: of words apart by blanks.
        seed: of the draw.
        synonyms: other words for a word, in lower case; without any for the text, its two first edits swap or
            delete instead.
    """
    g = np.random.default_rng(seed)
    words = text.split()
    known = [place for place, word in enumerate(words) if (synonyms or {}).get(word.lower())]
    times = max(1, round(EDIT * len(words)))
    kind = int(g.integers(4))
    if kind < 2 and not known:
        kind += 2
    for _ in range(times):
        if kind < 2 and synonyms is not None:
            place = known[int(g.integers(len(known)))]
            others = synonyms.get(words[place].lower(), [words[place]])
            other = str(others[int(g.integers(len(others)))])
            if kind == 0:
                words[place] = other
            else:
                words.insert(int(g.integers(len(words) + 1)), other)
                known = [i for i, word in enumerate(words) if synonyms.get(word.lower())]
        elif len(words) > 1 and kind == 2:
            a, b = (int(x) for x in g.choice(len(words), 2, replace=False))
            words[a], words[b] = words[b], words[a]
        elif len(words) > 1:
            del words[int(g.integers(len(words)))]
    return " ".join(words)


def text_views(
    texts: Sequence[str],
    *,
    seed: int,
    synonyms: Mapping[str, Sequence[str]] | None = None,
    of: int | None = None,
    rows: slice = ALL,
) -> list[str]:
    """`text_view` of each of `texts`, with draws of its own; `of` and `rows` as `image_view`."""
    seeds = np.random.SeedSequence(seed).generate_state(max(1, of or len(texts)))[rows]
    return [text_view(text, seed=int(s), synonyms=synonyms) for text, s in zip(texts, seeds, strict=False)]
