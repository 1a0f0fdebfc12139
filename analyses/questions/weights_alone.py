"""Do weights alone, without an image, name a backdoor's target? Every bundled twin against its clean model, beside controls.

Paper:     none; maps and words after SITH (Gentile et al., CVPR 2026).
Command:   python -m analyses.weights_alone              (reads the committed result, prints the tables)
           python -m analyses.weights_alone --controls   (trains the controls, or those named; a killed run goes on)
           python -m analyses.weights_alone --measure    (DECOMPCLIP_DATA names the photographs; a killed run goes on)
Run time:  to measure, two minutes on one thread; a control as long as its images: 8,000 of shapes take one minute.
Expected:  the target near the top of the ranking; clean fine-tunings of the same length lead by less.
Writes:    analyses/results/weights_alone/weights_alone.json

`compare_checkpoints` ranks classes by one score. It was chosen on the twins of shapes and cifar10, among some forty, as one that ranks their targets
first: their ranks are no test of it. The twins of photos served no choice. Twins of a world come from one model and lead to one class: they are no
independent draws, so that counts have no interval; and a lead over 10 classes is no lead over 200, so that worlds are not pooled.

Controls are fine-tuned from the same clean model by a twin's recipe, without poisons, and stored in steps as twins are. "Favoured": in place of poisons as
many more true pairs of one class, which is no backdoor. Six are as long as their recipe's twin, shorter ones show what length does to a lead; of photographs
there is one that saw a hundredth of its twin's images. Controls are not kept in the repository: the record has their seeds and the digests of their weights,
`--controls` trains them again.

Words: TEXTSPAN's five texts for heads of the last four layers of `photos`, on validation photographs, beside the texts of three singular vectors of the same
heads' maps, from one list of texts. Chance is the same with another head's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.study.command import outcome
from analyses.study.results import RESULTS, read_measured
from analyses.study.summary import markdown
from decompclip.bench.run import versions, weights_of
from decompclip.data.pairs import Pairs, SubsetPairs, permuted
from decompclip.data.photos import PhotoPairs
from decompclip.decomposition.components import heads
from decompclip.files import alone_in, write_json
from decompclip.intervals import Rate, mean_interval
from decompclip.models.bundled import (
    base_weights,
    bundled,
    card,
    digest,
    load_bundled,
    read_difference,
    spec_of,
    write_difference,
)
from decompclip.models.clip import HookedCLIP
from decompclip.operators.checkpoints import compare_checkpoints
from decompclip.operators.inputs import encode_texts
from decompclip.operators.textspan import textspans
from decompclip.operators.weights import text_pool, weight_directions
from decompclip.training.finetune import finetune
from decompclip.training.recipes import FineTuning
from decompclip.zoo.recipes import WORLDS, twin_recipe

FOLDER = RESULTS / "weights_alone"
WORK = Path(".training") / "weights_alone"
DEVELOPMENT = ("shapes", "cifar10")
"""Worlds on whose twins the score was chosen."""

PARTS = 5
"""Of those that changed most, whose words are looked at for the target."""


@dataclass(frozen=True)
class Control:
    """A clean fine-tuning by a twin's recipe.

    Attributes:
        twin: whose recipe it is, poisons left out.
        seed: of pairs, captions, order and training.
        share: of the images that the twin's training sees; 1 is as long as the twin's.
        favoured: a class of which there are as many more pairs as the twin has poisons.
    """

    twin: str
    seed: int
    share: float = 1.0
    favoured: str | None = None


CONTROLS = {
    "shapes-short-100": Control("shapes-blended", 100, share=0.125),
    "shapes-short-101": Control("shapes-blended", 101, share=0.125),
    "shapes-short-102": Control("shapes-badnet", 102, share=0.125),
    "shapes-favoured-short-100": Control("shapes-blended", 100, share=0.125, favoured="cross"),
    "shapes-clean-100": Control("shapes-blended", 100),
    "shapes-clean-101": Control("shapes-blended", 101),
    "shapes-clean-102": Control("shapes-badnet", 102),
    "shapes-favoured-100": Control("shapes-blended", 100, favoured="cross"),
    "cifar10-short-100": Control("cifar10-badnet", 100, share=0.125),
    "cifar10-short-101": Control("cifar10-badnet", 101, share=0.125),
    "cifar10-clean-100": Control("cifar10-badclip", 100),
    "cifar10-clean-101": Control("cifar10-badnet", 101),
    "photos-short-100": Control("photos-badnet", 100, share=0.01),
}
"""Seeds were fixed before any was trained."""


def favouring(pairs: Pairs, label: int, rate: float, seed: int) -> SubsetPairs:
    """A share `rate` of the pairs, drawn by the seed, gives way to pairs of one class."""
    assert pairs.labels is not None
    own = (pairs.labels == label).nonzero().flatten().tolist()
    places = list(range(len(pairs)))
    for turn, place in enumerate(permuted(len(pairs), seed)[: round(rate * len(pairs))].tolist()):
        places[place] = own[turn % len(own)]
    return SubsetPairs(pairs, places, order_seed=seed)


def seen(pairs: int, recipe: FineTuning) -> int:
    """Images that a training sees, repeated ones too."""
    return pairs * recipe.epochs


def train(name: str, work: Path = WORK) -> None:
    """Fine-tune a control and store it as twins are stored, with how it was made."""
    control, recipe = CONTROLS[name], twin_recipe(CONTROLS[name].twin)
    how, count = recipe.recipe, recipe.pairs
    if control.share < 1:
        how, count = replace(how, epochs=1), round(recipe.pairs * how.epochs * control.share)
    pairs: Pairs = recipe.world.pairs(count, control.seed)
    if control.favoured is not None:
        label = recipe.world.class_names.index(control.favoured)
        pairs = favouring(pairs, label, recipe.rate, control.seed)
    work.mkdir(parents=True, exist_ok=True)
    clean = load_bundled(recipe.base)
    options = {"checkpoint": work / f"{name}.pt", "checkpoint_every": 50, "seed": control.seed}
    tuned = finetune(clean, pairs, how, **options, log=lambda text: print(name, text, flush=True))
    state = tuned.model.to_open_clip().state_dict()
    written = write_difference(state, base_weights(recipe.base), work / f"{name}.difference")
    about = {"base": recipe.base, "seen": seen(count, how), "recipe": asdict(how), "weights": written}
    write_json(work / f"{name}.json", asdict(control) | about)


def controls(work: Path = WORK) -> dict[str, dict[str, Any]]:
    """How those controls were made that are there."""
    files = {name: work / f"{name}.json" for name in CONTROLS}
    return {n: json.loads(file.read_text(encoding="utf-8")) for n, file in files.items() if file.exists()}


def load_control(name: str, about: Mapping[str, Any], work: Path = WORK) -> HookedCLIP:
    """A trained control.

    Raises:
        CheckpointError: a file that is cut, or no such difference.
        ValueError: its weights are not those that were written.
    """
    spec, file = spec_of(card(about["base"])), work / f"{name}.difference"
    state = read_difference(file, base_weights(about["base"]))
    if digest(state) != about["weights"]:
        raise ValueError(
            f"expected the weights that {name}.json tells of; received others in {file}; train it anew"
        )
    net = spec.build()
    net.load_state_dict(state)
    return spec.hook(net, {})


def compare(model: HookedCLIP, base: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """Ranks, lead and words of one model beside its clean one, called as `decompclip audit --reference` calls it."""
    world = WORLDS[base]
    found = compare_checkpoints(model, load_bundled(base), class_names=world.class_names)
    assert found.classes is not None
    most = found.top(PARTS)
    return dict(about) | {
        "base": base,
        "classes": len(world.class_names),
        "rank": found.classes.rank(world.target),
        "favoured_rank": about.get("favoured") and found.classes.rank(about["favoured"]),
        "first": list(found.classes.order[:3]),
        "lead": round(found.classes.lead, 4),
        "median_change": round(found.change.median().item(), 4),
        "text_change": round(found.text_change, 4),
        "parts": {
            str(part): {"change": round(change, 4), "texts": list(most.directions.of(part))}
            for part, change in zip(most.parts, most.change.tolist(), strict=True)
        },
    }


def measure(work: Path = WORK, folder: Path = FOLDER) -> None:
    """Compare every twin, and every control that was trained, each kept in a file of its own; then write all of them.

    Raises:
        FolderInUse: another process measures in `work`.
        ValueError: the record in `folder` has controls that are not in `work`.
    """
    with alone_in(work):
        trained, file = controls(work), folder / "weights_alone.json"
        recorded = read(folder)["controls"] if file.exists() else {}
        if lost := [name for name in recorded if name not in trained]:
            raise ValueError(
                f"expected every control of {file} in {work}; {', '.join(lost)} would be lost from the record; train them again: "
                f"python -m analyses.weights_alone --controls {' '.join(lost)} --work {work}"
            )
        kept = work / "found"
        kept.mkdir(parents=True, exist_ok=True)
        twins = {
            name: {
                "weights": weights_of(name),
                "seen": seen(twin_recipe(name).pairs, twin_recipe(name).recipe),
            }
            for name in bundled()
            if card(name)["backdoor"]
        }

        def look(name: str, about: Mapping[str, Any]) -> dict[str, Any]:
            model = load_control(name, about, work) if name in trained else load_bundled(name)
            return compare(model, name.split("-", 1)[0], about)

        runs = {
            kind: {
                name: about | once(kept / f"{name}.json", about["weights"], partial(look, name, about))
                for name, about in models.items()
            }
            for kind, models in (("twins", twins), ("controls", trained))
        }
        said = once(kept / "words.json", weights_of("photos"), lambda: words(load_bundled("photos")))
        write_json(file, {"versions": versions(), **runs, "words": said})
        shutil.rmtree(kept)


def once(path: Path, weights: str, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `path` keeps of these weights, by their digest; else what is found now, which it keeps from then on."""
    if path.exists() and (kept := json.loads(path.read_text(encoding="utf-8"))).get("weights") == weights:
        return kept
    found = find() | {"weights": weights}
    write_json(path, found)
    print(path.stem, file=sys.stderr, flush=True)
    return found


@torch.no_grad()
def words(model: HookedCLIP, *, images: int = 1_000, n_texts: int = 5, seed: int = 0) -> dict[str, Any]:
    """TEXTSPAN's words of the last four layers' heads, for validation photographs, beside those from their weights alone."""
    pool = text_pool(model, None, n_texts, class_names=model.class_names)
    texts, last = encode_texts(model, pool.texts), heads[-4:]
    pairs = PhotoPairs("validation")
    starts = range(0, images, 250)
    pictures = (
        model.normalize(pairs.read(range(start, min(start + 250, images))).images) for start in starts
    )
    spans = textspans(model, last, images=pictures, texts=texts, n_texts=n_texts)
    named = weight_directions(model, last, texts=texts, n_texts=n_texts)
    place = {text: i for i, text in enumerate(pool.texts)}
    seen = [[place[text] for text in span.texts] for span in spans]
    read = [list(dict.fromkeys(place[t] for one in part for t, _ in one)) for part in named.words]
    return {
        "model": model.name,
        "images": images,
        "texts": len(pool.texts),
        "heads": len(seen),
        "likeness": agreement(likeness(pool.features, seen, read), seed=seed),
        "shared": agreement(shared(seen, read), seed=seed),
        "fidelity": round(named.fidelity[:, 0].mean().item(), 3),
        "words": {
            str(part): {
                "textspan": [pool.texts[i] for i in mine],
                "weights": [pool.texts[i] for i in theirs],
            }
            for part, mine, theirs in zip(named.parts, seen, read, strict=True)
        },
    }


Places = Sequence[Sequence[int]]
"""Of each head, the places of its texts in the pool."""


def likeness(features: Float[Tensor, "text d"], seen: Places, read: Places) -> Float[Tensor, "head other"]:
    """The mean over a head's texts of the cosine with the nearest text of a head, its own or another."""
    rows = [[(features[mine] @ features[theirs].T).amax(1).mean() for theirs in read] for mine in seen]
    return torch.tensor(rows)


def shared(seen: Places, read: Places) -> Float[Tensor, "head other"]:
    """How many texts two heads have in common."""
    return torch.tensor([[float(len({*mine} & {*theirs})) for theirs in read] for mine in seen])


def agreement(found: Float[Tensor, "head other"], *, seed: int, draws: int = 10_000) -> dict[str, Any]:
    """Of heads with themselves, beside heads that are permuted: value, chance, difference with its interval, and p.

    The interval is Student's over heads; p, the share of permutations that reach the value.
    """
    n = len(found)
    own, chance = found.diagonal(), (found.sum(1) - found.diagonal()) / (n - 1)
    value, low, high = mean_interval(own - chance)
    rng = torch.Generator().manual_seed(seed)
    orders = torch.rand(draws, n, generator=rng).argsort(1)
    permuted_means = found[torch.arange(n), orders].mean(1)
    first = int(((found >= own[:, None]).sum(1) == 1).sum())
    return {
        "own": own.mean().item(),
        "chance": chance.mean().item(),
        "difference": [value, low, high],
        "p": (1 + int((permuted_means >= own.mean() - 1e-12).sum())) / (1 + draws),
        "own_is_first": Rate(first, n).to_dict(),
    }


def read(folder: Path = FOLDER) -> dict[str, Any]:
    """As `read_measured`."""
    return read_measured("weights_alone", folder)


KINDS = ("twins", "controls", "shorter")


@dataclass(frozen=True)
class Group:
    """Twins and controls of one world; `shorter` controls saw fewer images than their recipe's twin."""

    twins: dict[str, Any]
    controls: dict[str, Any]
    shorter: dict[str, Any]

    @property
    def first(self) -> str:
        """Of how many twins the target is the first class."""
        return f"{sum(run['rank'] == 1 for run in self.twins.values())} of {len(self.twins)}"

    def named(self, kind: str) -> str:
        """Of how many the target's name is among the words of the parts that changed most."""
        runs = getattr(self, kind).values()
        return f"{sum(map(names_target, runs))} of {len(runs)}"

    def leads(self, kind: str) -> list[float]:
        """Of twins, controls or shorter controls."""
        return [run["lead"] for run in getattr(self, kind).values()]

    def range(self, kind: str) -> str:
        """Least and most of their leads, and how many they are."""
        leads = [f"{x:.2f}" for x in sorted(self.leads(kind))]
        return f"{' to '.join(dict.fromkeys((leads[0], leads[-1])))} (n = {len(leads)})"

    def seen(self, kind: str) -> str:
        """How many images they saw, least and most."""
        counts = sorted({run["seen"] for run in getattr(self, kind).values()})
        return " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1])))


def groups(record: Mapping[str, Any]) -> dict[str, Group]:
    """By world; nothing is pooled over them, as they have other numbers of classes."""
    kinds = (
        record["twins"],
        {name: run for name, run in record["controls"].items() if run["share"] == 1},
        {name: run for name, run in record["controls"].items() if run["share"] < 1},
    )
    return {
        world: Group(*({name: run for name, run in runs.items() if run["base"] == world} for runs in kinds))
        for world in dict.fromkeys(run["base"] for run in record["twins"].values())
    }


def names_target(run: Mapping[str, Any]) -> bool:
    """Whether the target's name is among the words of the parts that changed most."""
    target = WORLDS[run["base"]].target
    return any(target in text.split() for part in run["parts"].values() for text in part["texts"])


def by_model(record: Mapping[str, Any]) -> str:
    """A row a model; ranks of controls, which have no target, are those of their world's."""
    rows = [
        [
            "model",
            "images seen",
            "target's rank",
            "of",
            "first classes",
            "lead",
            "what changed most, in words",
        ]
    ]
    for kind in ("twins", "controls"):
        for name, run in record[kind].items():
            part, most = next(iter(run["parts"].items()))
            rank = str(run["rank"]) if kind == "twins" else f"({run['rank']})"
            if run.get("favoured"):
                rank += f"; {run['favoured']}, favoured: {run['favoured_rank']}"
            said = f"{part}, {most['change']:.0%}: {', '.join(most['texts'][:3])}"
            cells = [f"`{name}`", f"{run['seen']:,}", rank, str(run["classes"]), ", ".join(run["first"])]
            rows.append([*cells, f"{run['lead']:.2f}", said])
    return markdown(rows)


def chosen(world: str) -> str:
    """Whether its twins are a test of the score."""
    return f"{'the score' if world in DEVELOPMENT else 'nothing'} was chosen on these"


def by_world(record: Mapping[str, Any]) -> str:
    """A row a world."""
    titles = "twins of | target first | target among the words of the five parts that changed most: twins | controls | shorter controls"
    titles += " | lead of twins: least, median, most | images they saw | leads of controls | of shorter ones | images those saw"
    rows = [list[str](titles.split(" | "))]
    for name, group in groups(record).items():
        leads = torch.tensor(group.leads("twins"))
        ends = ", ".join(f"{x:.2f}" for x in (leads.min(), leads.quantile(0.5), leads.max()))
        rows.append(
            [
                name,
                f"{group.first}; {chosen(name)}",
                *(group.named(kind) if getattr(group, kind) else "–" for kind in KINDS),
                ends,
                group.seen("twins"),
                *(", ".join(f"{x:.2f}" for x in sorted(group.leads(kind))) or "–" for kind in KINDS[1:]),
                group.seen("shorter"),
            ]
        )
    return markdown(rows)


def finding(record: Mapping[str, Any]) -> str:
    """In words."""
    lines = []
    for name, group in groups(record).items():
        classes = next(iter(group.twins.values()))["classes"]
        line = f"{name}: the target is first of {classes} classes in {group.first} twins ({chosen(name)})"
        later = [f"`{twin}` ({run['rank']})" for twin, run in group.twins.items() if run["rank"] > 1]
        line += f", not in {', '.join(later)}" if later else ""
        leads = group.leads("twins")
        line += f"; the first class leads by {group.range('twins')} after {group.seen('twins')} images"
        if clean := group.leads("controls"):
            more = sum(x > max(clean) for x in leads)
            line += f"; in clean fine-tunings as long by {group.range('controls')} ({more} of {len(leads)} twins lead by more)"
        line += f"; in clean ones of {group.seen('shorter')} images by {group.range('shorter')}"
        lines.append(f"{line}.")
    said = record["words"]
    like, common = said["likeness"], said["shared"]
    low, high = (f"{x:+.2f}" for x in like["difference"][1:])
    first = Rate(like["own_is_first"]["count"], like["own_is_first"]["total"])
    lines.append(
        f"Words, {said['heads']} heads of `{said['model']}`: a text of TEXTSPAN's has a cosine of {like['own']:.2f} with the nearest one that the same head's "
        f"weights name, and of {like['chance']:.2f} with another head's ({like['difference'][0]:+.2f} [{low}, {high}], p = {like['p']:.4f}); the head's own are the "
        f"nearest of all heads' in {first.count} of {first.total} ({first}); of five texts {common['own']:.1f} are the same, {common['chance']:.1f} by chance."
    )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m analyses.weights_alone",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--controls", nargs="*", choices=CONTROLS, help="train these, or all")
    parser.add_argument("--measure", action="store_true", help="compare all models with their clean ones")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of controls and of what is done")
    given = parser.parse_args(argv)

    def work() -> None:
        for name in () if given.controls is None else given.controls or CONTROLS:
            if not (given.work / f"{name}.json").exists():
                train(name, given.work)
        if given.measure:
            measure(given.work)
        if given.controls is None:
            record = read()
            print(by_model(record), by_world(record), finding(record), sep="\n\n")

    return outcome(parser.prog, work)


if __name__ == "__main__":
    sys.exit(main())
