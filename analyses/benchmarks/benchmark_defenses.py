"""Time and memory of fitting every detector and repair, at the size of Tiny ImageNet and of ImageNet.

Command:   python -m analyses.benchmark_defenses --json analyses/results/benchmark_defenses.json
Run time:  about half an hour, one thread; a machine that others use takes longer.
Aim:       at most 60 s for 200 classes and 5,000 images; at most 5 minutes and 4 GiB for 1,000 classes and 50,000 images.

Random pixels are drawn batch by batch and never held; a stand-in for the model makes features and terms of them, in
ViT-B/32's shape, so that fits are measured without the tower. How many images it would encode is counted. `stream` goes once through all terms, as every fit of terms must. Each fit has a process of its own, whose peak
of memory is reported with torch and all else in it. `ratio`: time at the larger size over time at the smaller; of images there are ten times as many.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from analyses.study.command import benchmark
from analyses.study.summary import markdown

if TYPE_CHECKING:
    from torch import Tensor

    from decompclip.decomposition.decomposition import Decomposition


@dataclass(frozen=True)
class Config:
    small: tuple[int, ...] = (200, 5_000)
    large: tuple[int, ...] = (1_000, 50_000)
    only: str = ""
    layers: int = 12
    heads: int = 12
    d_head: int = 64
    d_embed: int = 512
    side: int = 64
    threads: int = 1


class Images:
    """Random pixels in [0, 1], each near the pattern of its class."""

    def __init__(self, config: Config, classes: int, images: int) -> None:
        import torch

        self.images, self.shape = images, (3, config.side, config.side)
        self.patterns = torch.rand(classes, *self.shape, generator=torch.Generator().manual_seed(0))

    def batches(self, batch_size: int = 64) -> Iterator[Any]:
        import torch

        from decompclip.data.images import ImageBatch

        generator = torch.Generator().manual_seed(1)
        for start in range(0, self.images, batch_size):
            places = torch.arange(start, min(start + batch_size, self.images))
            labels = torch.randint(len(self.patterns), places.shape, generator=generator)
            pixels = torch.rand(len(places), *self.shape, generator=generator)
            yield ImageBatch(0.5 * pixels + 0.5 * self.patterns[labels], labels, tuple(map(str, places)))


class StandIn:
    """A model without a tower: a projection of the pixels is the feature, and the last MLP's term; all other terms are drawn."""

    def __init__(self, config: Config, classes: int) -> None:
        import torch

        from decompclip.decomposition.maps import TermMaps

        self.config, self.generator = config, torch.Generator().manual_seed(2)
        self.encoded = 0
        c, width = config, 3 * config.side**2
        self.projection = self._drawn(width, c.d_embed) / width**0.5
        maps = self._drawn(c.layers, c.heads, c.d_head, c.d_embed) / (c.d_embed * c.d_head) ** 0.5
        names = (*(f"attn_bias {layer}" for layer in range(c.layers)), "ln_final bias")
        self.maps = {
            "centred": TermMaps(maps, self._drawn(len(names), c.d_embed) / 100, names, "centred"),
            "paper": TermMaps(maps, self._drawn(0, c.d_embed), (), "paper"),
        }
        self.logit_scale = torch.tensor(4.6)
        self.class_names = tuple(map(str, range(classes)))

    def normalize(self, pixels: Tensor) -> Tensor:
        return pixels - 0.5

    def encode_image(self, images: Tensor) -> Tensor:
        self.encoded += len(images)
        return images.flatten(1) @ self.projection

    def encode_text(self, texts: list[str]) -> Tensor:
        return self._drawn(len(texts), self.config.d_embed)

    def decompose(
        self, images: Tensor, *, normalize: bool = True, convention: str = "centred"
    ) -> Decomposition:
        import torch

        from decompclip.decomposition.decomposition import Decomposition

        c, n = self.config, len(images)
        coords = self._drawn(n, c.layers, c.heads, c.d_head) / 12
        mlps = self._drawn(n, c.layers, c.d_embed) / 100
        mlps[:, -1] += torch.nn.functional.normalize(self.encode_image(images), dim=1)
        maps = self.maps[convention]
        bias = torch.ones(n, len(maps.bias))
        return Decomposition(coords, mlps, self._drawn(n, c.d_embed) / 50, bias, maps, normalized=normalize)

    def terms(self, images: Images) -> Iterator[Decomposition]:
        return (self.decompose(self.normalize(batch.images)) for batch in images.batches())

    def _drawn(self, *shape: int) -> Tensor:
        import torch

        return torch.randn(shape, generator=self.generator)


def works() -> dict[str, Callable[[StandIn, Tensor, Images], Any]]:
    """What is timed, by name."""
    from decompclip.defenses.agnostic import AgnosticRep
    from decompclip.defenses.decomp import DecompRep
    from decompclip.defenses.detectors import DETECTORS
    from decompclip.defenses.distances import ComponentDistances

    def of_terms(make: Callable[[Tensor], Any]) -> Callable[[StandIn, Tensor, Images], Any]:
        return lambda model, classifier, images: make(classifier).fit(model.terms(images))

    def of_pixels(make: Callable[[Any, Tensor], Any]) -> Callable[[StandIn, Tensor, Images], Any]:
        return lambda model, classifier, images: make(model, classifier).fit(images)

    return {
        "stream": lambda model, classifier, images: [len(d) for d in model.terms(images)],
        "AgnosticRep": of_terms(AgnosticRep),
        "DecompRep": of_terms(lambda _: DecompRep(similarity="cosine", threshold="quantile")),
        "ComponentDistances": of_terms(ComponentDistances),
        # token repair reads the tower itself, once an image, and keeps two numbers of each
        **{name: of_pixels(make) for name, make in DETECTORS.items() if name != "token"},
    }


def measure(name: str, config: Config, classes: int, images: int) -> dict[str, float]:
    """Seconds and GiB of one fit, in this process."""
    import torch

    torch.set_num_threads(config.threads)
    model, source = StandIn(config, classes), Images(config, classes, images)
    with torch.no_grad():
        features = model.encode_image(model.normalize(source.patterns))
        classifier = torch.nn.functional.normalize(features - features.mean(0), dim=1)
        work = works()[name]
        model.encoded, start = 0, time.perf_counter()
        work(model, classifier, source)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": seconds, "gib": peak, "encoded": model.encoded}


def run(config: Config) -> dict[str, Any]:
    from decompclip.bench.run import versions

    found: dict[str, dict[str, Any]] = {}
    for size in ("small", "large"):
        for name in config.only.split(",") if config.only else works():
            with ProcessPoolExecutor(1, get_context("spawn")) as alone:
                one = alone.submit(measure, name, config, *getattr(config, size)).result()
            found.setdefault(size, {})[name] = one
            print(f"{size} {name}: {json.dumps(one)}", file=sys.stderr, flush=True)
    return {
        "command": "python -m analyses.benchmark_defenses",
        "config": asdict(config),
        "versions": versions(),
        "made": time.strftime("%Y-%m-%d"),
        "found": found,
    }


def table(result: dict[str, Any]) -> str:
    """A Markdown table."""
    sizes = {size: "{} classes, {:,} images".format(*result["config"][size]) for size in ("small", "large")}
    rows = [["fit of", *(f"{of}: {x}" for of in sizes.values() for x in ("s", "GiB", "encoded")), "ratio"]]
    for name in result["found"]["small"]:
        both = [found for size in sizes if (found := result["found"][size].get(name))]
        cells = [x for f in both for x in (f"{f['seconds']:.1f}", f"{f['gib']:.1f}", f"{f['encoded']:,}")]
        ratio = f"{both[1]['seconds'] / both[0]['seconds']:.1f}" if len(both) > 1 else "not measured"
        rows.append([name, *cells, *[""] * (6 - len(cells)), ratio])
    return markdown(rows)


if __name__ == "__main__":
    benchmark(sys.modules[__name__])
