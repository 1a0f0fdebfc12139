"""Pictures with maps over them: what the most and the least affected heads attend to and contribute."""

from __future__ import annotations

from functools import reduce
from operator import or_

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from decompclip.audit.collect import ImageSet, Split
from decompclip.audit.components import Shift
from decompclip.audit.result import Examples, HeadMaps
from decompclip.audit.verdict import Target
from decompclip.decomposition.components import heads
from decompclip.evaluation.evaluate import classify
from decompclip.models.clip import HookedCLIP
from decompclip.operators.attention import pictures_of

PER_END = 2
"""Heads shown from either end of the order."""


@torch.no_grad()
def examples(
    model: HookedCLIP,
    split: Split,
    shift: Shift,
    classifier: Float[Tensor, "class d_embed"],
    class_names: tuple[str, ...],
    target: Target,
    toward: Float[Tensor, " d_embed"],
    *,
    count: int,
    seen: dict[str, Tensor],
) -> Examples | None:
    """Maps over `count` suspect images, each followed by the clean image that it is paired with.

    Args:
        seen: pictures of clean images by name.
    """
    paths = _choose(split.suspect, classifier, target.index, count)
    if not paths:
        return None
    # images that are not paired have nothing in common but the name
    sides = {"suspect": split.suspect.kept, "clean": seen if split.paired else {}}
    shown = [(side, path, kept[path]) for path in paths for side, kept in sides.items() if path in kept]
    images = torch.stack([image for *_, image in shown]).to(model.device)
    chosen = affected_heads(shift)
    components = reduce(or_, (heads[layer, head] for layer, head, _ in chosen))
    d = model.decompose(images, convention="centred", normalize=True, tokens=components)
    answers = classify(None, d, classifier).tolist()
    grid = model.cfg.grid
    maps = []
    for layer, head, end in chosen:
        attention = d.attention(layer, head).float().cpu()
        contribution = d.token_logits(toward[None].to(d.embed), layer, head)[..., 0].float().cpu()
        maps.append(
            HeadMaps(layer, head, end, _grid(attention, grid), attention[:, 0], _grid(contribution, grid))
        )
    captions = tuple(
        f"{path}: taken for {class_names[answer]}"
        for (_, path, _), answer in zip(shown, answers, strict=True)
    )
    pictures = pictures_of(model, images)
    assert pictures is not None, "a HookedCLIP knows its pixels"
    return Examples(pictures, captions, tuple(side for side, *_ in shown), tuple(maps))


def affected_heads(shift: Shift) -> list[tuple[int, int, str]]:
    """The heads whose mean moves most, and those whose mean moves least, as (layer, head, end)."""
    n_heads = shift.heads_distance.shape[1]
    order = shift.heads_distance.flatten().argsort(descending=True).tolist()
    most = order[:PER_END]
    least = [flat for flat in order[::-1][:PER_END] if flat not in most]
    ends = [(most, "most"), (least, "least")]
    return [(flat // n_heads, flat % n_heads, end) for flats, end in ends for flat in flats]


def _choose(suspect: ImageSet, classifier: Tensor, target: int, count: int) -> list[str]:
    """Kept suspect images, those first that the model takes for the target without their being of it."""
    places = [i for i, path in enumerate(suspect.paths) if path in suspect.kept]
    hits = (classify(None, suspect.decomposition, classifier) == target).tolist()
    labels = [None] * len(suspect) if suspect.labels is None else suspect.labels.tolist()
    places.sort(key=lambda i: (not (hits[i] and labels[i] != target), i))
    return [suspect.paths[i] for i in places[:count]]


def _grid(tokens: Float[Tensor, "image token"], grid: tuple[int, int]) -> Float[Tensor, "image rows columns"]:
    return rearrange(tokens[:, -grid[0] * grid[1] :], "i (rows columns) -> i rows columns", rows=grid[0])
