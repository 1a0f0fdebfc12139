"""Do TEXTSPAN's words name what a component encodes? Probes are the truth, on the Shapes world.

Command:   python -m analyses.head_words [--json FILE]
Run time:  about two minutes, one thread.
Aim:       agreement well above chance on every bundled model (docs/method.md, section 4).
Measured:  by share of variance 73, 63 and 76 % on the three models (chance 18 to 20 %), kappa 0.55 to 0.69; by linear probe,
           which also finds what a part writes by the way, 26 to 28 % (chance 13 %).

Every image of the world carries its six properties. Probes say which of them a head or MLP encodes: by share of its
variance, which is what TEXTSPAN goes by, or by accuracy of a linear probe on images held out, which a property can reach
with ever so small a share. TEXTSPAN says it in words: its first texts, weighted by the variance that each adds, over
what the pool names anyway. Probes and texts see different images, and neither is chosen on any of them. Chance is the
agreement that the frequencies of both alone would give; kappa is zero there and one where agreement is complete.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from decompclip.files import write_json

if TYPE_CHECKING:
    from decompclip.models.clip import HookedCLIP
    from decompclip.operators.naming import Agreement


@dataclass(frozen=True)
class Config:
    models: tuple[str, ...] = ("shapes", "shapes-badnet", "shapes-blended")
    images: int = 1500
    n_texts: int = 5
    text_seed: int = 51
    probe_seed: int = 52
    batch_size: int = 250


def run(config: Config) -> dict[tuple[str, str], Agreement]:
    """Agreement by model and by the probes' score."""
    import decompclip

    return {
        (name, by): found for name in config.models for by, found in agreements(decompclip.load(name), config)
    }


def agreements(model: HookedCLIP, config: Config) -> Iterator[tuple[str, Agreement]]:
    """Of one model: all heads and MLPs."""
    import numpy as np

    from decompclip.data.shapes import PROPERTIES, Shapes
    from decompclip.decomposition.components import heads, mlps
    from decompclip.operators.inputs import shapes_texts
    from decompclip.operators.naming import By, agreement
    from decompclip.operators.probes import probe
    from decompclip.operators.textspan import textspans

    def images(seed: int) -> Iterator[Any]:
        return Shapes(config.images, seed=seed).batches(config.batch_size)

    pictures = (model.normalize(batch.images) for batch in images(config.text_seed))
    pool = shapes_texts(model.tokenizer.words)
    spans = textspans(model, heads | mlps, images=pictures, texts=pool, n_texts=config.n_texts)
    attributes = Shapes(config.images, seed=config.probe_seed).draw(range(config.images)).attributes
    terms = (model.decompose(model.normalize(batch.images)) for batch in images(config.probe_seed))
    probes = probe(terms, {name: getattr(attributes, name) for name in PROPERTIES}, components=heads | mlps)
    texts = {str(span.part): span.texts for span in spans}
    gains = {
        str(span.part): np.diff(span.variance_explained.numpy(), prepend=0).clip(0).tolist() for span in spans
    }
    for by in reversed(get_args(By)):
        yield by, agreement(probes, texts, PROPERTIES, pool=pool, weights=gains, by=by)


def chance(found: Agreement) -> float:
    """The share on which two would agree that name properties as often as these, and know nothing of each other."""
    n = len(found.parts)
    return sum(found.probed.count(name) * found.named.count(name) for name in set(found.probed)) / n**2


def table(results: dict[tuple[str, str], Agreement]) -> str:
    """A Markdown table."""
    head = ["model", "truth by", "parts that encode a property", "texts name it, %", "chance, %", "kappa"]
    rows = [head, ["---"] * len(head)]
    for (model, by), found in results.items():
        low, high = found.interval
        share = f"{100 * found.share:.0f} [{100 * low:.0f}, {100 * high:.0f}]"
        words = {"explained": "share of variance", "accuracy": "linear probe"}[by]
        parts = f"{len(found.parts)} of {len(found.parts) + len(found.left_out)}"
        rows.append([f"`{model}`", words, parts, share, f"{100 * chance(found):.0f}", f"{found.kappa:.2f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write every part's properties to this file too")
    given, config = parser.parse_args(), Config()
    results = run(config)
    print(table(results))
    if given.json:
        record = {
            f"{model}, {by}": found.to_frame().to_dict("records") for (model, by), found in results.items()
        }
        write_json(given.json, {"config": asdict(config), "parts": record})


if __name__ == "__main__":
    main()
