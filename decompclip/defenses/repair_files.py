"""A fitted selector as one safetensors file: what was learnt, the options, whose model it is, and what judges by it."""

from __future__ import annotations

from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decompclip.decomposition.components import heads
from decompclip.decomposition.decomposition import read_tensors, write_tensors
from decompclip.decomposition.maps import same_model, term_maps
from decompclip.decomposition.moments import TERMS, Moments, StreamMeans
from decompclip.defenses.selector import Selector
from decompclip.models.clip import HookedCLIP
from decompclip.tower.vit import HookedViT

FORMAT = "decompclip.selector/2"
LEARNT = ("mask_", "prototypes_", "thresholds_", "deviations_")
OPTIONS = ("similarity", "threshold", "epsilon", "quantile", "convention")


def save_selector(selector: Selector, path: Path, kind: str, own: dict[str, Any]) -> Path:
    """Write it whole, or not at all. Second moments are left out.

    Args:
        kind: name of the class that judges by the selector; only it reads the file.
        own: its options.

    Raises:
        ValueError: the terms that it was fitted on do not know their model.
    """
    moments = selector.moments_
    if moments.maps.fingerprint is None:
        raise ValueError(
            "expected moments that know their model; received some without a fingerprint; fit on terms of decompose"
        )
    tensors: dict[str, Tensor | None] = {name: getattr(selector, name) for name in LEARNT}
    tensors |= {f"moments.{name}": getattr(moments, name) for name in TERMS}
    tensors |= {
        f"streams.{name}": x for name, x in (vars(moments.streams) if moments.streams else {}).items()
    }
    tensors["fingerprint"] = moments.maps.fingerprint
    about = {
        "kind": kind,
        "own": own,
        "options": {name: getattr(selector, name) for name in OPTIONS},
        "count": moments.count,
        "normalized": moments.normalized,
        "convention": moments.maps.convention,
    }
    return write_tensors(path, {name: x for name, x in tensors.items() if x is not None}, FORMAT, about)


def load_selector(path: Path, visual: HookedViT, kind: str) -> tuple[Selector, dict[str, Any]]:
    """Read what `save_selector` wrote, for the model that it was fitted on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is broken, holds something else, or belongs to another model.
    """
    tensors, about = read_tensors(path, FORMAT, f"a saved {kind}", f"{kind}.save")
    if about["kind"] != kind:
        raise ValueError(f"expected a saved {kind}; received {path}, a saved {about['kind']}; load it as one")
    maps = term_maps(visual, about["convention"])
    if maps.fingerprint is None or not same_model(tensors["fingerprint"], maps.fingerprint.cpu()):
        raise ValueError(
            f"expected the model that the prototypes in {path} were fitted on; received another one; fit anew "
            "on clean images of this model"
        )
    device = maps.heads.device
    means: dict[str, Any] = {name: tensors[f"moments.{name}"] for name in TERMS}
    if device.type != "mps":  # which has no fp64
        means = {name: x.to(device) for name, x in means.items()}
    streams = {name.removeprefix("streams."): x for name, x in tensors.items() if name.startswith("streams.")}
    mask = tensors["mask_"].to(torch.bool)
    each = [heads[layer, row.nonzero()[:, 0].tolist()] for layer, row in enumerate(mask) if row.any()]
    selector = Selector(**about["options"], components=reduce(or_, each) if each else None)
    selector.moments_ = Moments(
        about["count"],
        **means,
        maps=maps,
        normalized=about["normalized"],
        streams=StreamMeans(**streams) if streams else None,
    )
    selector.mask_ = mask
    selector.prototypes_ = tensors["prototypes_"].to(maps.heads)
    selector.thresholds_ = tensors["thresholds_"].to(maps.heads)
    deviations = tensors.get("deviations_")
    selector.deviations_ = None if deviations is None else deviations.to(maps.heads)
    return selector, about["own"]


def visual_of(model: HookedCLIP | HookedViT) -> HookedViT:
    return model if isinstance(model, HookedViT) else model.visual
