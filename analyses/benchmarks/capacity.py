"""What stores of large data sets take: the tables of docs/capacity.md, from the store's own formula and a measured rate.

Command:   python -m analyses.capacity
Run time:  seconds.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from analyses.study.command import benchmark
from analyses.study.summary import markdown

COUNTS = {"50 K": 5e4, "1 M": 1e6, "12 M": 12e6, "400 M": 4e8}
GPUS = (1, 8, 64)

SHAPES = {
    "ViT-B-32": (12, 12, 64, 512, 13, 0),
    "ViT-L-14": (24, 16, 64, 768, 25, 0),
    "ViT-B-16-SigLIP": (12, 12, 768, 768, 145, 1),
}
"""Layers, heads, coordinates of a head, width of the joint space, constant terms, MLPs of the attention pool."""


@dataclass(frozen=True)
class Config:
    """`plain`: images a second of `encode_image` of ViT-B-32 on one H100, bf16, batch 256; `ratio`: of the time of `decompose` to it."""

    plain: float = 17_300
    ratio: float = 1.88


def run(config: Config) -> dict[str, Any]:
    """Bytes of an image and of moments by model, and images a second."""
    import torch

    from decompclip.decomposition.maps import TermMaps
    from decompclip.decomposition.store import TYPES, bytes_per_image

    sizes: dict[str, Any] = {}
    for name, (layers, heads, coord, d_embed, bias, pool) in SHAPES.items():
        names = tuple(map(str, range(bias)))
        with torch.device("meta"):
            maps = TermMaps(
                torch.empty(layers, heads, coord, d_embed), torch.empty(bias, d_embed), names, "centred"
            )
        each = {dtype: bytes_per_image(maps, pool, dtype) for dtype in TYPES}
        second = 8 * (layers * heads * coord**2 + (layers + 1 + pool) * d_embed**2)
        sizes[name] = {**each, "moments": second}
    return {"sizes": sizes, "rate": config.plain / config.ratio}


def table(result: dict[str, Any]) -> str:
    """The page's tables."""
    sizes, rate = result["sizes"], result["rate"]
    disk = [["", *(f"{name}, {dtype}" for name in sizes for dtype in ("fp32", "fp16"))]]
    disk.append(
        ["an image", *(f"{each[dtype]:,} B" for each in sizes.values() for dtype in ("fp32", "fp16"))]
    )
    for words, count in COUNTS.items():
        disk.append(
            [words, *(size(count * each[dtype]) for each in sizes.values() for dtype in ("fp32", "fp16"))]
        )
    disk.append(
        ["moments alone", *(size(each["moments"]) for each in sizes.values() for _ in ("fp32", "fp16"))]
    )
    time = [["ViT-B-32", *(f"{n} GPU{'s' * (n > 1)}" for n in GPUS)]]
    time += [[words, *(span(count / rate / n) for n in GPUS)] for words, count in COUNTS.items()]
    write = [["ViT-B-32, fp16", *(f"{n} GPU{'s' * (n > 1)}" for n in GPUS)]]
    fp16 = sizes["ViT-B-32"]["fp16"]
    write.append(["written, a second", *(size(n * rate * fp16) for n in GPUS)])
    return "\n\n".join(map(markdown, (disk, time, write)))


def size(count: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e6:.3g} MB"


def span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    benchmark(sys.modules[__name__])
