"""Do TEXTSPAN's words name what a component encodes? Probes are the truth, on the Shapes world and on photographs.

Command:   python -m analyses.head_words [--models photos] [--json FILE]   (DECOMPCLIP_DATA names the photographs)
Run time:  about two minutes, one thread; a minute and a half for `photos`.
Aim:       agreement well above chance on every bundled model (docs/method.md, section 4).

Every image of the world carries its six properties; a photograph has its object's colour, brightness, place and size as measured, and the kind of
its class, which a text names by the kind or by a class. Probes say which of them a head or MLP encodes: by share of its
variance, which is what TEXTSPAN goes by, or by accuracy of a linear probe on images held out, which a property can reach
with ever so small a share. TEXTSPAN says it in words: its first texts, weighted by the variance that each adds, over
what the pool names anyway. Probes and texts see different images, and neither is chosen on any of them. Chance is the
agreement that the frequencies of both alone would give; kappa is zero there and one where agreement is complete.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from analyses.study.command import outcome
from decompclip.files import write_json

if TYPE_CHECKING:
    from torch import Tensor

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


@dataclass(frozen=True)
class Seen:
    """A world's images for texts and for probes, its texts, and its properties.

    Attributes:
        for_texts, for_probes: the same batches at every call; no image is in both.
        truth: each property's value of the images for probes, as an index.
        vocabulary: the words that name a property.
    """

    for_texts: Callable[[], Iterator[Any]]
    for_probes: Callable[[], Iterator[Any]]
    truth: Mapping[str, Tensor]
    pool: tuple[str, ...]
    vocabulary: Mapping[str, Sequence[str]]


def shapes(model: HookedCLIP, config: Config) -> Seen:
    from decompclip.data.shapes import PROPERTIES, Shapes
    from decompclip.operators.inputs import shapes_texts

    def images(seed: int) -> Iterator[Any]:
        return Shapes(config.images, seed=seed).batches(config.batch_size)

    attributes = Shapes(config.images, seed=config.probe_seed).draw(range(config.images)).attributes
    return Seen(
        partial(images, config.text_seed),
        partial(images, config.probe_seed),
        {name: getattr(attributes, name) for name in PROPERTIES},
        shapes_texts(model.tokenizer.words),
        PROPERTIES,
    )


def photos(model: HookedCLIP, config: Config) -> Seen:
    """Texts are of validation photographs, probes of test ones; "even", "medium" and "mixed" are values without a word.

    A class counts as its kind, unless its name holds another property's word ("brown bear"); "object" is what any text may say.
    """
    import torch

    from decompclip.data.pairs import SubsetPairs, permuted
    from decompclip.data.photos import PhotoPairs, properties_of

    def some(split: Any, seed: int) -> SubsetPairs:
        whole = PhotoPairs(split)
        return SubsetPairs(whole, permuted(len(whole), seed)[: config.images].tolist())

    probed = some("test", config.probe_seed)
    truth = {}
    for name, values in properties_of(probed).items():
        known = sorted(set(values))
        truth[name] = torch.tensor([known.index(value) for value in values])
    vocabulary = photo_vocabulary()
    others = {word for name in vocabulary if name != "kind" for word in vocabulary[name]}
    classes = [name for name in model.class_names if others.isdisjoint(re.findall(r"\w+", name))]
    return Seen(
        partial(some("validation", config.text_seed).batches, config.batch_size),
        partial(probed.batches, config.batch_size),
        truth,
        photo_texts(vocabulary, classes),
        vocabulary | {"kind": (*vocabulary["kind"], *classes)},
    )


def photo_vocabulary() -> dict[str, tuple[str, ...]]:
    from decompclip.data.photos import PROMPTS

    return {name: tuple(v for v in values if v != "object") for name, (values, _) in PROMPTS.items()}


def photo_texts(vocabulary: Mapping[str, Sequence[str]], class_names: Sequence[str]) -> tuple[str, ...]:
    """Every value of a property, every pair of values of two, and every class, as captions say them."""
    from decompclip.data.photos import PLACES
    from decompclip.data.shapes import with_article

    def text(of: Mapping[str, str]) -> str:
        subject = " ".join([*([of["size"]] if "size" in of else []), of.get("kind", "object")])
        shown = " ".join([*([of["brightness"]] if "brightness" in of else []), "photo"])
        place = [PLACES[of["position"]]] if "position" in of else []
        colour = [f"mostly {of['colour']}"] if "colour" in of else []
        return " ".join([with_article(shown), "of", with_article(subject), *place, *colour])

    singles = (text({name: value}) for name, values in vocabulary.items() for value in values)
    pairs = (
        text({a: x, b: y})
        for a, b in combinations(vocabulary, 2)
        for x, y in product(vocabulary[a], vocabulary[b])
    )
    return tuple(dict.fromkeys([*singles, *pairs, *(text({"kind": name}) for name in class_names)]))


WORLDS = {"shapes": shapes, "photos": photos}


def run(config: Config) -> dict[tuple[str, str], Agreement]:
    """Agreement by model and by the probes' score."""
    import decompclip

    return {
        (name, by): found for name in config.models for by, found in agreements(decompclip.load(name), config)
    }


def agreements(model: HookedCLIP, config: Config) -> Iterator[tuple[str, Agreement]]:
    """Of one model: all heads and MLPs."""
    import numpy as np

    from decompclip.api import check_choice
    from decompclip.bench.plan import base_of
    from decompclip.decomposition.components import heads, mlps
    from decompclip.operators.naming import By, agreement
    from decompclip.operators.probes import probe
    from decompclip.operators.textspan import textspans

    check_choice("world", base_of(model.name), tuple(WORLDS))
    seen = WORLDS[base_of(model.name)](model, config)
    pictures = (model.normalize(batch.images) for batch in seen.for_texts())
    spans = textspans(model, heads | mlps, images=pictures, texts=seen.pool, n_texts=config.n_texts)
    terms = (model.decompose(model.normalize(batch.images)) for batch in seen.for_probes())
    probes = probe(terms, seen.truth, components=heads | mlps)
    texts = {str(span.part): span.texts for span in spans}
    gains = {
        str(span.part): np.diff(span.variance_explained.numpy(), prepend=0).clip(0).tolist() for span in spans
    }
    for by in reversed(get_args(By)):
        yield by, agreement(probes, texts, seen.vocabulary, pool=seen.pool, weights=gains, by=by)


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
    parser.add_argument("--models", nargs="+", default=Config.models, help="bundled, of shapes or of photos")
    parser.add_argument("--json", type=Path, help="write every part's properties to this file too")
    given = parser.parse_args()
    config = Config(tuple(given.models))

    def work() -> None:
        results = run(config)
        print(table(results))
        if given.json:
            record = {
                f"{model}, {by}": found.to_frame().to_dict("records")
                for (model, by), found in results.items()
            }
            write_json(given.json, {"config": asdict(config), "parts": record})

    sys.exit(outcome("python -m analyses.head_words", work))


if __name__ == "__main__":
    main()
