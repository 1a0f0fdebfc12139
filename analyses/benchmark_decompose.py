"""Time and memory of `decompose` beside a plain `encode_image`.

Command:   python -m analyses.benchmark_decompose [--json FILE]
Run time:  about two minutes, one thread.
Aim:       at most 1.15 times the time and 1.3 times the peak memory of the plain forward.

Time: both in turn in one process, so that a noisy machine slows both; the median of the ratios of neighbours.
Memory: a fresh process for each, the highest resident size of some batches above the size before them, the result
of `decompose` included (Linux alone can tell).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

Work = Literal["plain", "decompose"]


@dataclass(frozen=True)
class Config:
    model: str = "ViT-B-32"
    batch_size: int = 64
    repeats: int = 9
    threads: int = 1
    batches_for_memory: int = 3


def prepare(config: Config) -> dict[str, Any]:
    """The two pieces of work, on the same model and images."""
    import torch

    from decompclip.models.loading import load

    torch.set_num_threads(config.threads)
    model = load(config.model, pretrained="random")
    shape = (config.batch_size, 3, *model.image_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def plain() -> None:
        with torch.no_grad():
            model.encode_image(images)

    return {"plain": plain, "decompose": lambda: model.decompose(images)}


def time_both(config: Config) -> dict[str, float]:
    """Median seconds of each, and the median of their ratios."""
    work = prepare(config)
    for warm_up in work.values():
        warm_up()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(config.repeats):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(seconds["plain"], seconds["decompose"], strict=True)]
    return {**{name: median(values) for name, values in seconds.items()}, "ratio": median(ratios)}


def growth(config: Config, which: Work) -> float:
    """MiB by which the work drives this process's resident size up, at its highest (Linux)."""
    run = prepare(config)[which]
    run()  # what is made once, such as the maps of the terms and the kernels' buffers, is no growth
    gc.collect()
    Path("/proc/self/clear_refs").write_text(
        "5", encoding="ascii"
    )  # the high-water mark falls to the size now
    before = _kib("VmRSS")
    for _ in range(config.batches_for_memory):
        run()
    return (_kib("VmHWM") - before) / 1024


def _kib(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition(f"{field}:")[2].split()[0])


def memory_of_both(config: Config) -> dict[str, float]:
    grown = {}
    for which in ("plain", "decompose"):
        command = [sys.executable, "-m", "analyses.benchmark_decompose", "--memory-of", which]
        options = [f"--{key.replace('_', '-')}={value}" for key, value in asdict(config).items()]
        # glibc keeps freed blocks for reuse by its own rules: large ones go back at once, so that peaks compare
        env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
        run = subprocess.run([*command, *options], capture_output=True, text=True, check=True, env=env)
        grown[which] = float(run.stdout.splitlines()[-1])
    return {**grown, "ratio": grown["decompose"] / grown["plain"]}


def run(config: Config) -> dict[str, Any]:
    return {"config": asdict(config), "seconds": time_both(config), "mib": memory_of_both(config)}


def table(result: dict[str, Any]) -> str:
    """A Markdown table."""
    rows = ["| | `encode_image` | `decompose` | ratio |", "| --- | --- | --- | --- |"]
    for key, label, digits in (
        ("seconds", "time of a batch, s", 2),
        ("mib", "peak memory above the model, MiB", 0),
    ):
        found = result[key]
        rows.append(
            f"| {label} | {found['plain']:.{digits}f} | {found['decompose']:.{digits}f} | {found['ratio']:.2f} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the result to this file too")
    parser.add_argument("--memory-of", choices=["plain", "decompose"], help=argparse.SUPPRESS)
    config = Config()
    for key, value in asdict(config).items():
        parser.add_argument(f"--{key.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args())
    config = replace(config, **{key: given[key] for key in asdict(config)})
    if given["memory_of"]:
        print(growth(config, given["memory_of"]))
        return
    result = run(config)
    print(table(result))
    if given["json"]:
        given["json"].write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
