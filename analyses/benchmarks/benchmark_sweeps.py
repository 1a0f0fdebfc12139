"""Time and memory of `ablation_sweep` over stored decompositions, beside the settings evaluated one by one.

Command:   python -m analyses.benchmark_sweeps [--images 50000] [--json FILE]
Run time:  about three minutes, one thread (the settings one by one are timed on some batches and scaled up).
Aim:       at least 20 times faster; at most 2 GiB of memory over the store.

The store: decompositions of random numbers in the shape of ViT-B-32 (12 layers of 12 heads, 512 numbers in the joint
space), written once and gone through in turn, so that all 50,000 images cost no more disk than the kept batches. One by
one: each of the 72 settings reads the store, ablates, sums up the features and classifies.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from analyses.study.command import benchmark

if TYPE_CHECKING:
    from torch import Tensor

    from decompclip.decomposition.decomposition import Decomposition
    from decompclip.decomposition.moments import Moments

T = TypeVar("T")


@dataclass(frozen=True)
class Config:
    images: int = 50_000
    classes: int = 1000
    batch_size: int = 1000
    kept: int = 2
    one_by_one: int = 1
    threads: int = 1
    layers: int = 12
    heads: int = 12
    d_head: int = 64
    d_embed: int = 512


class Store:
    """Batches on disk, gone through again and again until there are as many as asked for."""

    def __init__(self, config: Config, folder: Path) -> None:
        import torch

        from decompclip.decomposition.decomposition import Decomposition
        from decompclip.decomposition.maps import TermMaps

        generator = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        c, n = config, config.batch_size
        names = (*(f"attn_bias {layer}" for layer in range(c.layers)), "ln_final bias")
        maps = TermMaps(
            drawn(c.layers, c.heads, c.d_head, c.d_embed), drawn(len(names), c.d_embed), names, "centred"
        )
        self.batches = config.images // n
        self.files = []
        for number in range(config.kept):
            coords = drawn(n, c.layers, c.heads, c.d_head)
            rest: dict[str, Any] = {"mlps": drawn(n, c.layers, c.d_embed), "embed": drawn(n, c.d_embed)}
            more: dict[str, Any] = (
                {"pool": drawn(n, 0, c.d_embed)} if "pool" in Decomposition.__dataclass_fields__ else {}
            )
            d = Decomposition(
                coords, **rest, **more, bias_coords=drawn(n, len(names)), maps=maps, normalized=False
            )
            self.files.append(d.save(folder / f"{number}.safetensors"))

    def __iter__(self) -> Iterator[Decomposition]:
        return self.first(self.batches)

    def first(self, batches: int) -> Iterator[Decomposition]:
        from decompclip.decomposition.decomposition import Decomposition

        return (Decomposition.load(self.files[number % len(self.files)]) for number in range(batches))


def one_by_one(store: Store, moments: Moments, classifier: Tensor, batches: int) -> dict[Any, Tensor]:
    """The plain way: a pass over the store for every setting."""
    import torch

    from decompclip.operators.ablation import MeanAblate
    from decompclip.operators.sweep_results import Kind, Scheme, Sweep

    n_layers = moments.coords.shape[0]
    found = {}
    for kind in get_args(Kind):
        for scheme in get_args(Scheme):
            named = Sweep(torch.zeros(n_layers, 0, dtype=torch.long), kind, scheme, "mean", torch.zeros(0))
            of_scheme = []
            for layer in range(n_layers):
                edit = MeanAblate(named.components(layer), moments)
                answers = [(edit(d).features @ classifier.T).argmax(1) for d in store.first(batches)]
                of_scheme.append(torch.cat(answers))
            found[kind, scheme] = torch.stack(of_scheme)
    return found


def run(config: Config) -> dict[str, Any]:
    """Seconds of both ways for all images, their ratio, memory, and the share of equal predictions."""
    import torch

    from decompclip.decomposition.moments import Moments
    from decompclip.operators.sweeps import ablation_sweep

    torch.set_num_threads(config.threads)
    classifier = torch.randn(config.classes, config.d_embed, generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder:
        store = Store(config, Path(folder))
        moments = Moments.of(next(store.first(1)), second=False)
        ablation_sweep(store.first(1), moments, classifier)  # warm
        # One by one before and after, so that a noisy machine slows both ways alike.
        plain, first = timed(lambda: one_by_one(store, moments, classifier, config.one_by_one))
        _clear_peak()
        before = _mib("VmRSS")
        table, fast = timed(lambda: ablation_sweep(store, moments, classifier))
        grown = _mib("VmHWM") - before
        _, last = timed(lambda: one_by_one(store, moments, classifier, config.one_by_one))
    seconds = (first + last) / 2 * store.batches / config.one_by_one
    n = config.one_by_one * config.batch_size
    alike = [float((table[key].predictions[:, :n] == plain[key]).double().mean()) for key in plain]
    return {
        "config": asdict(config),
        "seconds": {"one by one (scaled up)": seconds, "ablation_sweep": fast, "ratio": seconds / fast},
        "mib": grown,
        "equal predictions": min(alike),
    }


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What the work gives, and its seconds."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def _clear_peak() -> None:
    Path("/proc/self/clear_refs").write_text(
        "5", encoding="ascii"
    )  # the high-water mark falls to the size now


def _mib(field: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition(f"{field}:")[2].split()[0]) / 1024


def table(result: dict[str, Any]) -> str:
    """A Markdown table."""
    found = result["seconds"]
    rows = [
        "| | one by one | `ablation_sweep` | ratio |",
        "| --- | --- | --- | --- |",
        f"| 72 settings, s | {found['one by one (scaled up)']:.0f} | {found['ablation_sweep']:.1f} | "
        f"{found['ratio']:.1f} |",
        f"| memory over the store, MiB | | {result['mib']:.0f} | |",
        f"| equal predictions | | {result['equal predictions']:.5f} | |",
    ]
    return "\n".join(rows)


if __name__ == "__main__":
    benchmark(sys.modules[__name__])
