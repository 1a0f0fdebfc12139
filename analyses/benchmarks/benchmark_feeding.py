"""Whether the model waits for its data: `evaluate` and `finetune` on picture files beside bare loops, and memory over the run.

Command:   python -m analyses.benchmark_feeding
Run time:  about 3 minutes, one thread.
Aim:       `evaluate` at least 0.85 of `encode_image` over the same loader; `finetune` at least 0.8 of a bare loop over the same pairs in
           memory; memory that does not grow over the run.

JPEG photographs of 500 x 375 pixels (smooth noise, seeded) are written to a temporary folder. Ratios are of images a processor
second, medians of rounds in turn within one process: that one core decodes while another works on the batch before counts for nothing here. The bundled model of
photographs is a hard case: larger towers leave more time to decode. Memory: resident, mean of the last quarter of a run of `evaluate` over that of the
second quarter.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from analyses.study.command import benchmark
from analyses.study.summary import markdown


@dataclass(frozen=True)
class Config:
    models: str = "photos"
    images: int = 128
    batch_size: int = 32
    steps: int = 4
    rounds: int = 3
    passes: int = 12
    threads: int = 1


def write_photographs(folder: Path, images: int) -> None:
    """Of two classes."""
    import numpy as np
    from PIL import Image

    for number in range(images):
        coarse = np.random.default_rng(number).integers(0, 256, (47, 63, 3), dtype=np.uint8)
        path = folder / ("cat", "dog")[number % 2] / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)


def rates(
    works: dict[str, Callable[[], object]], images: dict[str, int], rounds: int
) -> dict[str, list[float]]:
    """Images a processor second of each, round by round, in turn; one round before the clock runs."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            began = time.process_time()
            work()
            if number:
                found[name].append(images[name] / (time.process_time() - began))
    return found


def evaluation(model: Any, folder: Path, config: Config) -> dict[str, Callable[[], object]]:
    """`evaluate`, and the tower alone over the same loader."""
    import torch

    from decompclip.data.feed import feed
    from decompclip.data.images import FolderSource
    from decompclip.evaluation.evaluate import evaluate

    classifier = torch.nn.functional.normalize(model.encode_text(model.tokenizer(["a cat", "a dog"])), dim=-1)

    def source(preprocess: Any) -> FolderSource:
        return FolderSource(folder, preprocess, class_names=("cat", "dog"))

    @torch.no_grad()
    def plain() -> None:
        for batch in feed(source(model.preprocess), config.batch_size, device=model.device):
            model.encode_image(batch.images)

    def ours() -> None:
        evaluate(model, source(model.pixels), classifier.detach(), batch_size=config.batch_size)

    return {"plain": plain, "ours": ours}


def training(model: Any, folder: Path, config: Config) -> dict[str, Callable[[], object]]:
    """`finetune` on files, and forward, loss, backward and step on the same pairs in memory."""
    from decompclip.data.sources import open_pairs
    from decompclip.training.finetune import finetune, spare_gains
    from decompclip.training.loop import build_optimizers
    from decompclip.training.recipes import FineTuning, features_of, pair_loss

    recipe = FineTuning(epochs=1, batch_size=config.batch_size, lr=1e-6)
    pairs = open_pairs(str(folder), model.pixels)
    length = config.steps * config.batch_size
    held = [pairs.take(step, config.batch_size) for step in range(config.steps)]
    batches = [(model.normalize(batch.images), model.tokenizer(list(batch.captions))) for batch in held]

    def plain() -> None:
        net = model.to_open_clip().float().train()
        ((optimizer, _),) = build_optimizers([net], recipe.over(length), no_decay=spare_gains)
        for images, tokens in batches:
            pair_loss("clip", *features_of(net(images, tokens))).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return {"plain": plain, "ours": lambda: finetune(model, pairs, recipe, length=length)}


def memory(model: Any, folder: Path, config: Config) -> list[int]:
    """Resident bytes after each batch of an evaluation that goes through the folder again and again."""
    import psutil
    import torch

    from decompclip.data.images import FolderSource
    from decompclip.evaluation.evaluate import evaluate

    source = FolderSource(folder, model.pixels, class_names=("cat", "dog"))
    seen: list[int] = []

    class Again:
        def batches(self, batch_size: int = 64) -> Iterator[Any]:
            for _ in range(config.passes):
                yield from source.batches(batch_size)

    def noted(batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            yield batch
            seen.append(psutil.Process().memory_info().rss)

    classifier = torch.eye(2, model.cfg.d_embed)
    evaluate(model, Again(), classifier, batch_size=config.batch_size, track=noted)
    return seen


def run(config: Config) -> dict[str, Any]:
    import torch

    import decompclip
    from decompclip.models.bundled import bundled

    torch.set_num_threads(config.threads)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_photographs(folder, config.images)
        for name in config.models.split(","):
            model = decompclip.load(name, pretrained=None if name in bundled() else "random")
            parts = {
                "evaluate": (evaluation(model, folder, config), config.images),
                "finetune": (training(model, folder, config), config.steps * config.batch_size),
            }
            found[name] = {
                what: rates(works, dict.fromkeys(works, images), config.rounds)
                for what, (works, images) in parts.items()
            }
            seen = memory(model, folder, config)
            quarter = len(seen) // 4
            found[name]["growth"] = mean(seen[-quarter:]) / mean(seen[quarter : 2 * quarter])
            print(f"{name}: measured", file=sys.stderr, flush=True)
    return {"config": vars(config), "found": found}


def table(result: dict[str, Any]) -> str:
    """A Markdown table."""
    found = result["found"]
    rows = [["images a processor second", "aim", *found]]
    aims = {
        "evaluate": ("`evaluate`, over `encode_image` over the same loader", "0.85"),
        "finetune": ("`finetune`, over a bare loop over the same pairs in memory", "0.8"),
    }
    for key, (words, aim) in aims.items():
        cells = []
        for one in found.values():
            ours, plain = one[key]["ours"], one[key]["plain"]
            ratio = median(a / b for a, b in zip(ours, plain, strict=True))
            cells.append(f"{ratio:.2f} ({median(ours):.0f}/s)")
        rows.append([words, aim, *cells])
    growth = [f"{one['growth']:.3f}" for one in found.values()]
    rows.append(["memory late over early in the run", "1.00", *growth])
    return markdown(rows)


if __name__ == "__main__":
    benchmark(sys.modules[__name__])
