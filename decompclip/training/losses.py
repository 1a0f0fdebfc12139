"""Losses on batches of image-text pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from open_clip.loss import ClipLoss
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.nn import functional as F

from decompclip.training.recipes import LossName


@dataclass(frozen=True, eq=False)
class Seen:
    """What a penalty is told of a step, of this process's share of the batch.

    Attributes:
        net: the open_clip model in training.
        pixels: normalised; with `loss="cleanclip"` the second half are views of the first, here and below.
        image, text: the net's unit features, in fp32.
    """

    net: nn.Module
    pixels: Float[Tensor, "view 3 h w"]
    tokens: Int[Tensor, "view position"]
    image: Float[Tensor, "view d_embed"]
    text: Float[Tensor, "view d_embed"]


Penalty = Callable[[Seen], Tensor]
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
    groups: Int[Tensor, " batch"] | None = None,
    ss_weight: float = 1.0,
    processes: int = 1,
) -> Float[Tensor, ""]:
    """The loss of a whole batch, of which this process holds the share `image` and `text`.

    Each process computes the loss of all pairs. Backward through the gathering sums over the processes what belongs
    to a feature, and averaging over them (DistributedDataParallel) then gives the gradient of the whole batch.

    Args:
        name: `clip`, `grouped`, or `cleanclip`: CLIP's loss plus `ss_weight` times the mean of the losses
            between two views of the images and of the texts (Bansal et al. 2023, eq. 3); the second half of
            `image` and `text` is then the other view of the first.
        groups: of all pairs of the batch, for `grouped`.
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
        return grouped_clip_loss(image, text, scale, groups)
    return clip(image, text, scale)


def _info_nce(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE from each row of `a` to its own row of `b`."""
    return F.cross_entropy(scale * a @ b.T, torch.arange(len(a), device=a.device))


def _gather(x: Tensor, processes: int) -> Tensor:
    """The rows of all processes, in the order of their ranks; gradients flow back to each."""
    if processes == 1:
        return x
    return torch.cat(all_gather(x))
