"""Time of TEXTSPAN for all heads of a ViT-B/32, from moments and as published.

Command:   python -m analyses.benchmark_textspan [--json FILE]
Run time:  about two minutes, one thread.
Aim:       at least 50 times faster than the plain algorithm on stored head matrices.

144 heads of 64 coordinates, 10,000 images, 3,498 texts, 20 picks each, on made-up terms whose variance falls off over
their coordinates as that of trained heads does. Ours is all there is to do: moments of the terms (those of the MLPs
and the embedding, which `Moments` keeps too, included), then all picks. The plain algorithm (Gandelsman et al.'s
`replace_with_iterative_removal`, fp32) runs on the stored matrices of a few heads, and its time is multiplied up to
all: heads do not differ in cost. Both make the same picks.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

from analyses.study.command import benchmark

if TYPE_CHECKING:
    from torch import Tensor

    from decompclip.decomposition.decomposition import Decomposition


@dataclass(frozen=True)
class Config:
    layers: int = 12
    heads: int = 12
    d_head: int = 64
    d_embed: int = 512
    images: int = 10_000
    texts: int = 3_498
    n_texts: int = 20
    plain_heads: int = 2
    batch_size: int = 500
    threads: int = 1


def make(config: Config) -> tuple[list[Decomposition], Tensor]:
    """Batches of decompositions, and unit text features."""
    import torch
    from torch.nn.functional import normalize

    from decompclip.decomposition.decomposition import Decomposition
    from decompclip.decomposition.maps import TermMaps

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shape = (config.layers, config.heads, config.d_head)
    maps = TermMaps(draw(*shape, config.d_embed) / config.d_embed, draw(0, config.d_embed), (), "centred")
    mean, scale = draw(*shape), 1 / torch.arange(1, config.d_head + 1).sqrt()
    batches = []
    for start in range(0, config.images, config.batch_size):
        size = min(config.batch_size, config.images - start)
        coords = mean + draw(size, *shape) * scale
        still = torch.zeros(size, config.layers, config.d_embed)
        batches.append(Decomposition(coords, still, still[:, 0], draw(size, 0), maps, normalized=False))
    return batches, normalize(draw(config.d_embed) + draw(config.texts, config.d_embed), dim=1)


def plain(terms: Tensor, texts: Tensor, n_texts: int, rank: int) -> list[int]:
    """The published algorithm on the matrix of one head's terms."""
    import torch

    right = torch.linalg.svd(terms, full_matrices=False)[2][:rank]
    texts = texts @ right.T @ right
    terms = terms - terms.mean(0)
    picks = []
    for _ in range(n_texts):
        best = int((terms @ texts.T).std(0).argmax())
        direction = texts[best] / texts[best].norm()
        terms = terms - (terms @ direction)[:, None] * direction
        texts = texts - (texts @ direction)[:, None] * direction
        picks.append(best)
    return picks


def run(config: Config) -> dict[str, Any]:
    import torch

    from decompclip.decomposition.components import heads
    from decompclip.decomposition.moments import Moments
    from decompclip.operators.inputs import TextFeatures
    from decompclip.operators.textspan import fit_textspans

    torch.set_num_threads(config.threads)
    batches, features = make(config)
    texts = TextFeatures(tuple(map(str, range(config.texts))), features)

    start = time.perf_counter()
    moments = reduce(Moments.merge, map(Moments.of, batches))
    middle = time.perf_counter()
    spans = fit_textspans(moments, texts, heads, n_texts=config.n_texts)
    end = time.perf_counter()

    stored = [
        torch.cat([d.coords[:, 0, head] for d in batches]) @ batches[0].maps.heads[0, head]
        for head in range(config.plain_heads)
    ]
    begin = time.perf_counter()
    picks = [plain(terms, features, config.n_texts, config.d_head) for terms in stored]
    each = (time.perf_counter() - begin) / config.plain_heads
    n_heads = config.layers * config.heads
    matrices = n_heads * config.images * config.d_embed * stored[0].element_size()
    kept = sum(x.nbytes for x in (*(moments.scatter or {}).values(), moments.coords, moments.mlps))
    return {
        "config": asdict(config),
        "seconds": {"moments": middle - start, "picks": end - middle, "plain_one_head": each},
        "ratio": each * n_heads / (end - start),
        "ratio_of_picks": each * n_heads / (end - middle),
        "mib": {"moments": kept / 2**20, "matrices": matrices / 2**20},
        "same_picks": sum(list(span.indices) == found for span, found in zip(spans, picks, strict=False)),
    }


def table(result: dict[str, Any]) -> str:
    """A Markdown table."""
    seconds, mib, config = result["seconds"], result["mib"], result["config"]
    n_heads = config["layers"] * config["heads"]
    ours = seconds["moments"] + seconds["picks"]
    return "\n".join(
        [
            f"| {n_heads} heads, {config['images']} images, {config['texts']} texts | plain | from moments | ratio |",
            "| --- | --- | --- | --- |",
            f"| time, s (plain: {config['plain_heads']} heads, multiplied up) | {seconds['plain_one_head'] * n_heads:.0f} "
            f"| {ours:.1f} (moments {seconds['moments']:.1f}, picks {seconds['picks']:.1f}) | {result['ratio']:.0f} |",
            f"| data kept, MiB | {mib['matrices']:.0f} | {mib['moments']:.0f} | {mib['matrices'] / mib['moments']:.0f} |",
            "",
            f"Same {config['n_texts']} picks on {result['same_picks']} of {config['plain_heads']} heads.",
        ]
    )


if __name__ == "__main__":
    benchmark(sys.modules[__name__])
