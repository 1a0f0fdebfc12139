"""Time, memory and exactness of hooked towers beside open_clip's own, as a table for the README.

Command:   python -m analyses.benchmark_towers [--models ViT-B-32 ...] [--device cuda] [--json FILE]
Run time:  about six minutes, one thread.
Aim:       `encode_image` at most 1.05 times the source tower's time; `decompose` at most 1.15 times that of
           `encode_image`, and its peak memory at most 1.1 times that of `encode_image` and the result together;
           `token_logits` of all heads and 100 texts, with the decomposition that it reads, at most 1.6 times.

Time: all four in turn, in one process, of the processor (on CUDA by the clock), so that what else a machine runs counts
for little; ratios of medians. Memory: a fresh process for each, the highest resident size of some batches above the size before them (Linux; on CUDA the allocator's peak).
Operations: what is dispatched to the device (views too), and arithmetic, with the tokens of all heads and all texts or without, over those of
`encode_image`: what a GPU pays for, where none is at hand. `--count` counts them alone, in seconds.
Towers whose rows are weighed only at the end (SigLIP) hold all of them in up to a quarter of the memory at hand.
Sum error: the largest miss of the terms' sum over the largest entry, by dtype; beside it how far the feature itself
is from that in fp32, which is the rounding of the tower's own arithmetic. Weights are random.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from decompclip.files import write_json

MODELS = ("ViT-B-32", "ViT-B-16", "ViT-B-16-SigLIP", "EVA02-B-16")
COUNTED = ("ViT-B-32", "ViT-B-16-SigLIP", "ViT-L-14", "EVA02-B-16")
WORK = ("source", "plain", "decompose", "token_logits")
DTYPES = ("fp32", "bf16", "fp16", "bf16 autocast", "fp16 autocast")


@dataclass(frozen=True)
class Config:
    batch_size: int = 16
    repeats: int = 7
    threads: int = 1
    texts: int = 100
    batches_for_memory: int = 3
    device: str = "cpu"


def prepare(name: str, config: Config) -> dict[str, Callable[[], Any]]:
    """The four pieces of work, on the same weights and images."""
    import open_clip
    import torch

    from decompclip.decomposition.capture import decompose
    from decompclip.models.spec import build_image_only
    from decompclip.tower.convert import convert_open_clip

    torch.set_num_threads(config.threads)
    architecture = open_clip.get_model_config(name)
    if architecture is None:
        raise ValueError(f"open_clip has no configuration {name!r}")
    visual = build_image_only(architecture, why="an image tower alone").visual.eval().to(config.device)
    tower = convert_open_clip(visual, copy=False).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(config.batch_size, 3, *tower.cfg.image_size, generator=generator).to(config.device)
    texts = torch.randn(config.texts, tower.cfg.d_embed, generator=generator).to(config.device)

    def token_logits() -> None:
        decompose(tower, images, tokens=True).token_logits(texts)

    return {
        "source": torch.no_grad()(lambda: visual(images)),
        "plain": torch.no_grad()(lambda: tower(images)),
        "decompose": lambda: decompose(tower, images),
        "token_logits": token_logits,
    }


def times(name: str, config: Config) -> dict[str, float]:
    """Median seconds of each."""
    work = prepare(name, config)
    for warm_up in work.values():
        warm_up()
    seconds: dict[str, list[float]] = {which: [] for which in work}
    for _ in range(config.repeats):
        for which, run in work.items():
            start = _now(config)
            run()
            seconds[which].append(_now(config) - start)
    return {which: median(values) for which, values in seconds.items()}


def _now(config: Config) -> float:
    if config.device == "cpu":
        return time.process_time()
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


# Operations


def counts(work: Callable[[], Any]) -> tuple[int, int]:
    """Operations dispatched, and floating-point operations."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    class Count(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.total += 1
            return func(*args, **(kwargs or {}))

    work()  # what is made once is not counted
    with Count() as count:
        work()
    with FlopCounterMode(display=False) as flops:
        work()
    return count.total, flops.get_total_flops()


def count_table(names: list[str], config: Config) -> str:
    """Markdown: operations and FLOPs of each tower, over those of `encode_image`."""
    lines = [["over `encode_image`", *names], ["---"] * (len(names) + 1)]
    found = []
    for name in names:
        work = prepare(name, replace(config, batch_size=2))
        found.append({which: counts(work[which]) for which in WORK[1:]})
    for which in WORK[2:]:
        for place, what in enumerate(("operations", "FLOPs")):
            ratios = [f"{one[which][place] / one['plain'][place]:.2f}" for one in found]
            lines.append([f"{what} of `{which}`", *ratios])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# Memory


def growth(name: str, which: str, config: Config) -> float:
    """MiB by which the work drives memory up, at its highest."""
    run = prepare(name, config)[which]
    run()  # what is made once, such as the maps of the terms and the kernels' buffers, is no growth
    gc.collect()
    if config.device != "cpu":
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # the high-water mark falls to the size now
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _kib("VmRSS")
    for _ in range(config.batches_for_memory):
        run()
    return (_kib("VmHWM") - before) / 1024


def _kib(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition(f"{field}:")[2].split()[0])


def memory(name: str, config: Config) -> dict[str, float]:
    """MiB of a plain run, of `decompose`, and of what it returns."""
    grown = {}
    for which in ("plain", "decompose"):
        command = [sys.executable, "-m", "analyses.benchmark_towers", "--models", name, "--memory-of", which]
        options = [f"--{key.replace('_', '-')}={value}" for key, value in asdict(config).items()]
        # glibc keeps freed blocks for reuse by its own rules: large ones go back at once, so that peaks compare
        env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
        run = subprocess.run([*command, *options], capture_output=True, text=True, check=True, env=env)
        grown[which] = float(run.stdout.splitlines()[-1])
    d = prepare(name, config)["decompose"]()
    kept = (d.coords, d.mlps, d.embed, d.pool, d.bias_coords, d.target)
    grown["result"] = sum(x.numel() * x.element_size() for x in kept) / 2**20
    return grown


# Exactness


def sum_errors(name: str, config: Config) -> dict[str, dict[str, float]]:
    """By dtype: the terms' miss, and how far the feature is from that in fp32."""
    import open_clip
    import torch

    from decompclip.decomposition.capture import decompose
    from decompclip.models.spec import build_image_only
    from decompclip.tower.convert import convert_open_clip

    torch.set_num_threads(config.threads)
    visual = build_image_only(open_clip.get_model_config(name) or {}, why="an image tower alone").visual
    full = convert_open_clip(visual.eval(), copy=False).to(config.device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, *full.cfg.image_size, generator=generator).to(config.device)
    with torch.no_grad():
        exact = full(images)
    errors = {}
    for label in DTYPES:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[label.split()[0]]
        autocast = "autocast" in label
        tower = full if autocast else deepcopy(full).to(dtype)
        with torch.autocast(torch.device(config.device).type, dtype=dtype) if autocast else nullcontext():
            d = decompose(tower, images if autocast else images.to(dtype), tolerance=float("inf"))
        assert d.target is not None
        rounding = ((d.target - exact).abs().max() / exact.abs().max()).item()
        errors[label] = {"sum error": d.sum_error, "rounding": rounding}
    return errors


# The table


def measure(name: str, config: Config) -> dict[str, Any]:
    return {
        "seconds": times(name, config),
        "mib": memory(name, config),
        "errors": sum_errors(name, config),
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    titles = ["", "aim", *results]
    rows = [
        ("`encode_image`, over the source tower's time", "1.05", lambda r: _ratio(r, "plain", "source")),
        ("`decompose`, over `encode_image`", "1.15", lambda r: _ratio(r, "decompose", "plain")),
        ("`token_logits`, over `encode_image`", "1.6", lambda r: _ratio(r, "token_logits", "plain")),
        ("peak memory of `decompose`, over `encode_image` and the result", "1.10", _memory_ratio),
        *((f"sum error, {label}", "", lambda r, label=label: _error(r, label)) for label in DTYPES),
    ]
    lines = [titles, ["---"] * len(titles)]
    lines += [[label, aim, *map(cell, results.values())] for label, aim, cell in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ratio(result: dict[str, Any], over: str, under: str) -> str:
    return f"{result['seconds'][over] / result['seconds'][under]:.2f}"


def _memory_ratio(result: dict[str, Any]) -> str:
    found = result["mib"]
    return f"{found['decompose'] / (found['plain'] + found['result']):.2f}"


def _error(result: dict[str, Any], label: str) -> str:
    found = result["errors"][label]
    return f"{found['sum error']:.0e} ({found['rounding']:.0e})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", metavar="NAME")
    parser.add_argument(
        "--count", action="store_true", help="count operations and FLOPs, and measure nothing"
    )
    parser.add_argument("--json", type=Path, help="write the results to this file too")
    parser.add_argument("--memory-of", choices=WORK, help=argparse.SUPPRESS)
    config = Config()
    for key, value in asdict(config).items():
        parser.add_argument(f"--{key.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args())
    config = replace(config, **{key: given[key] for key in asdict(config)})
    if given["count"]:
        print(count_table(given["models"] or list(COUNTED), config))
        return
    if given["memory_of"]:
        print(growth(given["models"][0], given["memory_of"], config))
        return
    results = {}
    for name in given["models"] or MODELS:
        results[name] = measure(name, config)
        print(f"{name}: {json.dumps(results[name])}", file=sys.stderr, flush=True)
    print(table(results))
    if given["json"]:
        write_json(given["json"], {"config": asdict(config), **results})


if __name__ == "__main__":
    main()
