"""How long the explorer takes to answer, from a change in the view to what is sent back.

Command:   python -m analyses.benchmark_explore [--images 48] [--rounds 10] [--threads 2] [--json FILE]
Run time:  under a minute.
Aim:       200 ms for a new text, image or head, on the bundled models.
Measured:  on two cores with nothing else to do, ms of wall clock:
           | model | new text | new image | new head | causal | begin, s | page, MB |
           | shapes | 7 | 1 | 4 | 42 | 0.5 | 0.9 |
           | cifar10 | 6 | 1 | 3 | 30 | 0.1 | 0.5 |
           | photos | 8 | 1 | 5 | 356 | 1.6 | 2.6 |

A change is all questions that the view then asks, through the widget's own handler, with buffers as they are sent: a new
text: contributions, maps, one ablation; another image: its maps; another head: words, images alike, one ablation. What the
browser draws is not in it. Processor time is what counts where others use the machine too. No answer is asked twice, so none is from memory. Photographs are noise of their size: times do
not depend on what is seen.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from analyses.study.command import benchmark

if TYPE_CHECKING:
    from decompclip.explorer.explore import Explorer

MODELS = ("shapes", "cifar10", "photos")


@dataclass(frozen=True)
class Config:
    images: int = 48
    rounds: int = 10
    threads: int = 2
    seed: int = 0


def changes(explorer: Explorer, texts: Iterator[str]) -> dict[str, Iterator[list[tuple[Any, ...]]]]:
    """The questions of one change after another, by what changes."""
    first, d = explorer.first(), explorer.decomposition
    text, here = first["text"], (first["layer"], first["head"])
    places = [(layer, head) for layer in range(d.n_layers) for head in range(d.n_heads)]
    return {
        "text": ([("text", t), ("maps", t, 0), ("ablate", t, *here, "direct")] for t in texts),
        "image": ([("maps", text, i), ("attention", i)] for i in range(len(d))),
        "head": (
            [("words", *place), ("nearest", *place), ("ablate", text, *place, "direct")] for place in places
        ),
        "causal": ([("ablate", text, *place, "causal")] for place in places),
    }


def run(config: Config) -> dict[str, Any]:
    """Milliseconds a change, the time to begin, and the bytes of a saved page."""
    import torch

    import decompclip

    torch.set_num_threads(config.threads)
    generator = torch.Generator().manual_seed(config.seed)
    rows = []
    for name in MODELS:
        model = decompclip.load(name)
        pixels = torch.rand(config.images, 3, *model.image_size, generator=generator)
        start = time.perf_counter()
        explorer = decompclip.explore(model, model.normalize(pixels))
        explorer.answer("words", 0, 0)  # once for all heads
        row: dict[str, Any] = {"model": name, "begin_s": time.perf_counter() - start}
        explorer.widget.send = lambda content, buffers=None: None
        for what, asked in changes(explorer, iter(model.tokenizer.words)).items():
            times = []
            for questions in islice(asked, config.rounds):
                start, busy = time.perf_counter(), time.process_time()
                for question in questions:
                    explorer.widget._asked(None, {"id": 0, "question": question}, [])
                times.append((time.perf_counter() - start, time.process_time() - busy))
            wall, processor = (1000 * statistics.median(column) for column in zip(*times, strict=True))
            row[what] = {"wall_ms": wall, "processor_ms": processor}
        fresh = decompclip.explore(model, model.normalize(pixels))
        start = time.perf_counter()
        row["page_bytes"] = len(fresh.html().encode())
        rows.append(row | {"page_s": time.perf_counter() - start})
    return {"config": asdict(config), "rows": rows}


def table(result: dict[str, Any]) -> str:
    """A Markdown table of medians."""
    kinds = ("text", "image", "head", "causal")
    lines = [
        f"| {result['config']['images']} images, ms of wall clock (of processor) | {' | '.join(f'new {kind}' for kind in kinds)} | begin, s | page, MB |",
        f"| --- |{' --- |' * (len(kinds) + 2)}",
    ]
    for row in result["rows"]:
        cells = [f"{row[kind]['wall_ms']:.0f} ({row[kind]['processor_ms']:.0f})" for kind in kinds]
        lines.append(
            f"| `{row['model']}` | {' | '.join(cells)} | {row['begin_s']:.1f} | {row['page_bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    benchmark(sys.modules[__name__])
