"""Time of `Guard.encode_image` beside the plain forward.

Command:   python -m analyses.benchmark_guard [--rounds 7] [--json FILE]
Run time:  about three minutes, one thread.
Aim:       at most 1.2 times the plain forward.
Measured:  0.97 to 0.99 times, which is 1 within the noise (3 rounds; processor time, on a machine that others used).

A tower of ViT-B-32's shape with random weights, one batch of 64 images of 224 pixels; plain and guarded forwards in
turn, in one process. The ratio is of medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from decompclip.files import write_json


@dataclass(frozen=True)
class Config:
    batch_size: int = 64
    clean: int = 128
    rounds: int = 7
    threads: int = 1
    layers: int = 12
    heads: int = 12
    d_model: int = 768
    d_embed: int = 512
    image_size: int = 224
    patch_size: int = 32


def run(config: Config) -> dict[str, Any]:
    """Seconds of a plain forward, and each repair's as a ratio to it."""
    import torch
    from torch import nn

    from decompclip.decomposition.components import heads, mlps
    from decompclip.decomposition.moments import Moments
    from decompclip.defenses.decomp import DecompDet, DecompRep
    from decompclip.defenses.guard import Guard
    from decompclip.models.clip import HookedCLIP
    from decompclip.models.text import WordTokenizer
    from decompclip.operators.ablation import MeanAblate
    from decompclip.tower.config import ViTConfig
    from decompclip.tower.vit import HookedViT

    torch.set_num_threads(config.threads)
    generator = torch.Generator().manual_seed(0)
    shape = ViTConfig(
        n_layers=config.layers,
        d_model=config.d_model,
        n_heads=config.heads,
        d_head=config.d_model // config.heads,
        d_mlp=4 * config.d_model,
        d_embed=config.d_embed,
        image_size=(config.image_size, config.image_size),
        patch_size=(config.patch_size, config.patch_size),
    )
    visual = HookedViT(shape)
    with torch.no_grad():
        for parameter in visual.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
    tokenizer: Any = WordTokenizer(("cat",), 4)
    model = HookedCLIP(
        visual, nn.Module(), tokenizer=tokenizer, preprocess={}, provenance={"name": "random ViT-B-32"}
    )
    size = (3, config.image_size, config.image_size)
    clean = model.decompose(torch.randn(config.clean, *size, generator=generator), normalize=True)
    images = torch.randn(config.batch_size, *size, generator=generator)
    repair = DecompRep(similarity="cosine", threshold="quantile").fit(clean)
    mean = MeanAblate(mlps[-5:], Moments.of(clean, second=False))
    guards = {
        "DecompRep": Guard(model, repair).encode_image,
        "MeanAblate(mlps[-5:])": Guard(model, mean).encode_image,
        "DecompRep on all heads": Guard(
            model, DecompRep(similarity="cosine", threshold="quantile", components=heads).fit(clean)
        ).encode_image,
        "DecompRep, check by DecompDet": Guard(
            model, repair, reject=DecompDet(similarity="cosine", threshold="quantile").fit(clean)
        ).check,
    }

    def plain(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model.encode_image(x)

    ways: dict[str, Callable[[torch.Tensor], Any]] = {"plain": plain, **guards}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(config.rounds + 1):  # the first round warms up, and builds the maps
        for name, way in ways.items():
            start = time.process_time()
            way(images)
            if number:
                times[name].append(time.process_time() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {name: round(medians[name] / medians["plain"], 3) for name in guards}
    return {"config": asdict(config), "plain seconds": round(medians["plain"], 3), "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=Config.rounds)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = run(Config(rounds=args.rounds))
    print(f"plain forward: {found['plain seconds']} s of processor time")
    for name, ratio in found["ratios"].items():
        print(f"{name}: {ratio} times the plain forward")
    if args.json:
        write_json(args.json, found)


if __name__ == "__main__":
    main()
