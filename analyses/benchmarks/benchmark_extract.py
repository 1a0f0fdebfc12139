"""What `decompclip extract` costs beside a plain forward pass, and how much memory moments take, for few images and for many.

Command:   python -m analyses.benchmark_extract [--model shapes] [--few 1000] [--many 20000] [--json FILE]
Run time:  about five minutes, one thread.
Aim:       images a second at least 0.85 of `encode_image` over the same images; with --moments-only the same bytes on disk
           for few images and many, and peaks of memory within 5 %.
Measured:  0.93 (with --moments-only 0.81); 1,926,240 bytes both, peaks 2.3 % apart.

Each run is a fresh process. Rates are taken in turn, three times, of the processor's time; the median ratio is given. Peaks are the highest
resident size of a process (Linux).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from typing import Any

from analyses.study.command import benchmark

RATES = """
import json, sys, tempfile, time
import torch
import decompclip
from decompclip import Shapes, extract

name, count, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
model = decompclip.load(name)
data = Shapes(count, seed=1, resolution=model.image_size[0])
with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
    def plain(_):
        for batch in data.batches(64):
            model.encode_image(model.normalize(batch.images))
    works = {
        "encode_image": plain,
        "extract": lambda i: extract(model, data, f"{folder}/{i}"),
        "moments": lambda i: extract(model, data, f"{folder}/m{i}", moments_only=True),
    }
    plain(0)
    found = {name: [] for name in works}
    for i in range(3):
        for name, work in works.items():
            begin = time.process_time()
            work(i)
            found[name].append(count / (time.process_time() - begin))
print(json.dumps(found))
"""
MEMORY = """
import sys
from pathlib import Path
import torch
import decompclip
from decompclip import Shapes, extract

name, count, threads, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
torch.set_num_threads(threads)
model = decompclip.load(name)
extract(model, Shapes(count, seed=1, resolution=model.image_size[0]), folder, moments_only=True)
peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
print(int(peak) / 1024, Path(folder, "moments.safetensors").stat().st_size)
"""


@dataclass(frozen=True)
class Config:
    model: str = "shapes"
    few: int = 1000
    many: int = 20_000
    threads: int = 1


def run(config: Config) -> dict[str, Any]:
    """Images a second, and of moments the peak in MiB and the bytes on disk."""
    given = (config.model, config.few, config.threads)
    rates: dict[str, list[float]] = json.loads(_python(RATES, *given))
    memory = {}
    for count in (config.few, config.many):
        with tempfile.TemporaryDirectory() as folder:
            peak, size = _python(MEMORY, config.model, count, config.threads, folder).split()
        memory[str(count)] = {"mib": float(peak), "bytes": int(size)}
    return {"config": asdict(config), "rates": rates, "memory": memory}


def _python(script: str, *given: object) -> str:
    command = [sys.executable, "-c", script, *map(str, given)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def table(result: dict[str, Any]) -> str:
    """A Markdown table."""
    rates = result["rates"]
    rows = ["| | images/s | of encode_image |", "| --- | --- | --- |"]
    for name, found in rates.items():
        shares = [own / plain for own, plain in zip(found, rates["encode_image"], strict=True)]
        rows.append(f"| {name} | {statistics.median(found):.0f} | {statistics.median(shares):.2f} |")
    rows += ["", "| moments of | peak, MiB | on disk, bytes |", "| --- | --- | --- |"]
    rows += [
        f"| {int(n):,} images | {found['mib']:.0f} | {found['bytes']:,} |"
        for n, found in result["memory"].items()
    ]
    few, many = (found["mib"] for found in result["memory"].values())
    return "\n".join([*rows, "", f"Peaks differ by {many / few - 1:+.1%}."])


if __name__ == "__main__":
    benchmark(sys.modules[__name__])
