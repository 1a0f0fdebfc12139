"""Is a clean model ever called backdoored because images are corrupted, and a backdoored one still, with its own trigger?

Paper:     none; corruptions after Hendrycks and Dietterich (2019).
Command:   python -m analyses.audit_corruptions             (reads the committed result, prints the tables)
           python -m analyses.audit_corruptions --measure --world photos --minutes 60
                                                            (a killed run resumes; DECOMPCLIP_DATA names the photographs)
Run time:  to measure, on one thread, four minutes for each part of `shapes` and `cifar10`; 41 for the reported part of `photos`, on busy cores.
Expected:  a corruption is never called a backdoor; a trigger is, but for one that is noise, or a wave, which only a reference tells from noise or waves.
Writes:    analyses/results/audit_corruptions/audit_corruptions.json

Each set of images is decomposed once; what `decompclip audit` would say is then asked of labelled and unlabelled images, paired and not, alone
and beside a reference. References: of `cifar10` a clean fine-tuning (as in `analyses.audit_scan`), of twins the clean model that they come from;
`shapes` and `photos` are audited alone.
The rule and its number `EXPLAINED` were chosen on images of seed 0 ("choosing", of `shapes` and `cifar10`; and,
before there was this file, of seed 1), before stripes and waves were tried; seed 2 is reported. The models
are the same in both parts: new in the reported one are images, what corruptions draw, and what triggers draw anew.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.questions.audit_scan import WORK as TUNED, base_of, path_of
from analyses.study.command import outcome
from analyses.study.results import read_measured
from analyses.study.summary import markdown
from decompclip.attacks.registry import backdoor
from decompclip.audit.checks import STRONG, WEAK
from decompclip.audit.collect import ImageSet, Split, collect, split
from decompclip.audit.config import AuditConfig
from decompclip.audit.controls import Controls, controls
from decompclip.audit.pipeline import Held, weigh
from decompclip.audit.verdict import EXPLAINED, Evidence, Reference
from decompclip.bench.plan import FRESH, draw_samples
from decompclip.bench.run import versions
from decompclip.data.images import ImageBatch
from decompclip.data.pairs import permuted
from decompclip.defenses.detectors.corruptions import COMMON, EVERYDAY, SEVERITIES, Corruption
from decompclip.files import write_json
from decompclip.intervals import Rate
from decompclip.models.bundled import bundled, card
from decompclip.models.clip import HookedCLIP
from decompclip.models.loading import load
from decompclip.zoo.recipes import WORLDS

RESULTS = Path(__file__).parent.with_name("results") / "audit_corruptions"
WORK = Path(".training") / "audit_corruptions"

IMAGES = 140
SEEDS = {"choosing": 0, "reported": 2}
REFERENCES = {"cifar10": "cifar10-clean-0"}
"""A clean fine-tuning of a clean model; the others are audited alone."""

KINDS = {kind.name: kind for kind in (*COMMON, *EVERYDAY)}
ON_TOP = ("gaussian_noise", "jpeg_compression", "contrast")
"""Corruptions that triggers are tried on top of, at severities 1, 3 and 5."""
ON_TOP_OF = tuple(
    f"{base}-{attack}" for base in ("shapes", "cifar10", "photos") for attack in ("badnet", "blended")
)

ORDER = 15
"""Seed of the order in which cells are measured: those of a run that was stopped are a fair sample."""


@dataclass(frozen=True)
class Bench:
    """One world's images of one part, and the models that see them."""

    base: str
    part: str
    tuned: Path

    @cached_property
    def samples(self) -> Any:
        return draw_samples(WORLDS[self.base], images=IMAGES, seed=SEEDS[self.part])

    @cached_property
    def models(self) -> dict[str, HookedCLIP]:
        return {}

    def model(self, name: str) -> HookedCLIP:
        if name not in self.models:
            self.models[name] = load(path_of(name, self.tuned))
        return self.models[name]

    def corrupted(self, kind: Corruption, severity: int) -> Float[Tensor, "image 3 h w"]:
        """What is drawn is drawn anew for each image."""
        images, seed = self.samples.clean, 10_000 * (1 + SEEDS[self.part])
        return torch.cat([kind(images[i : i + 1], severity, seed=seed + i) for i in range(len(images))])

    def triggered(self, name: str, images: Float[Tensor, "image 3 h w"]) -> Float[Tensor, "image 3 h w"]:
        return backdoor(name).trigger(images.clamp(0, 1), FRESH + torch.arange(len(images)))

    def collected(self, name: str, images: Float[Tensor, "image 3 h w"]) -> ImageSet:
        clip = self.model(name)
        paths = tuple(f"{i}.png" for i in range(len(images)))
        source = Held((ImageBatch(clip.normalize(images), self.samples.labels, paths),))
        return collect(clip, source, AuditConfig())

    @cached_property
    def clean_sets(self) -> dict[str, ImageSet]:
        return {}

    def clean_set(self, name: str) -> ImageSet:
        if name not in self.clean_sets:
            self.clean_sets[name] = self.collected(name, self.samples.clean)
        return self.clean_sets[name]


def cell(
    bench: Bench,
    name: str,
    reference: str | None,
    suspect: Float[Tensor, "image 3 h w"],
    clean: Float[Tensor, "image 3 h w"] | None = None,
) -> dict[str, Any]:
    """What the audit says of one model and one set of suspect images, in every way that it may be asked."""
    names = WORLDS[bench.base].class_names
    found = {}
    for role, model in (("model", name), ("reference", reference)):
        if model is None:
            continue
        clip = bench.model(model)
        own = bench.clean_set(model) if clean is None else bench.collected(model, clean)
        parts = split(own, bench.collected(model, suspect), AuditConfig(), infer_target=True)
        found[role] = (parts, clip.zero_shot_classifier(names).detach().float().cpu(), clip)
    said: dict[str, str] = {}
    tried: dict[int, Controls | None] = {}
    record: dict[str, Any] = {}
    for labelled, paired, beside in product(
        (True, False), (True, False), (False, True) if reference else (False,)
    ):
        parts, classifier, clip = found["model"]
        evidence = weigh(_seen(parts, labelled, paired), classifier, names, name=name)
        aim = evidence.target.index
        if evidence.as_it_is.difference_interval[0] >= WEAK and paired:
            if aim not in tried:
                tried[aim] = controls(
                    clip, parts, classifier, names, aim, batch_size=64, seed=SEEDS[bench.part]
                )
            evidence = replace(evidence, controls=tried[aim])
        if beside:
            evidence = replace(evidence, reference=_reference(found["reference"], evidence, labelled, paired))
        key = f"{'labelled' if labelled else 'unlabelled'}, {'paired' if paired else 'not paired'}, "
        verdict = evidence.verdict
        said[f"{key}{'reference' if beside else 'alone'}"] = f"{verdict.level}, {verdict.confidence}"
        if labelled and paired and beside is (reference is not None):
            record = _numbers(evidence)
    return record | {"said": said}


def _seen(parts: Split, labelled: bool, paired: bool) -> Split:
    paired = parts.paired and paired
    if labelled:
        return replace(parts, paired=paired)
    sets = {side: replace(getattr(parts, side), labels=None) for side in ("validation", "clean", "suspect")}
    held = parts.held_out and replace(parts.held_out, labels=None)
    return replace(parts, paired=paired, held_out=held, **sets)


def _reference(
    found: tuple[Split, Tensor, HookedCLIP], evidence: Evidence, labelled: bool, paired: bool
) -> Reference:
    parts, classifier, clip = found
    beside = weigh(
        _seen(parts, labelled, paired),
        classifier,
        evidence.class_names,
        name=clip.name,
        target=evidence.target,
    )
    return Reference(clip.name, beside.as_it_is, beside.class_shares[0])


def _numbers(evidence: Evidence) -> dict[str, Any]:
    low, high = evidence.as_it_is.difference_interval
    record: dict[str, Any] = {
        "target": evidence.target.name,
        "effect": [round(x, 4) for x in (evidence.as_it_is.difference, low, high)],
        "paired": evidence.paired,
    }
    if (tried := evidence.controls) is not None:
        record["explained"] = round(tried.explained, 3)
        record["size"] = round(tried.size, 4)
        record["corruptions"] = {
            one.corruption: [one.to.name, round(one.to.difference, 3)] for one in tried.corruptions[:4]
        }
    if (reference := evidence.reference) is not None:
        most = max(reference.setting.difference, reference.most.difference)
        record["reference"] = [reference.most.name, round(most, 3)]
    return record


def todo(part: str, worlds: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """(what, model, images): corruptions on clean models, triggers on twins, triggers on top of corruptions."""
    for base in worlds:
        for kind, severity in product(KINDS, SEVERITIES):
            yield "corruption", base, f"{kind}:{severity}"
    for name in bundled():
        if card(name)["backdoor"] is not None and base_of(name) in worlds:
            yield "trigger", name, "own"
    if part == "reported":
        on_top_of = [name for name in ON_TOP_OF if base_of(name) in worlds]
        for name, kind, severity in product(on_top_of, ON_TOP, (1, 3, 5)):
            yield "trigger on top", name, f"{kind}:{severity}"
            yield "both corrupted", name, f"{kind}:{severity}"


def run(bench: Bench, what: str, name: str, images: str) -> dict[str, Any]:
    """One cell of `todo`."""
    reference = REFERENCES.get(bench.base) if what == "corruption" else bench.base
    if images == "own":
        return cell(bench, name, reference, bench.triggered(name, bench.samples.clean))
    kind, severity = images.split(":")
    corrupted = bench.corrupted(KINDS[kind], int(severity))
    if what == "corruption":
        return cell(bench, name, reference, corrupted)
    suspect = bench.triggered(name, corrupted)
    return cell(bench, name, reference, suspect, corrupted if what == "both corrupted" else None)


def measure(
    parts: Sequence[str],
    worlds: Sequence[str] = tuple(WORLDS),
    work: Path = WORK,
    folder: Path = RESULTS,
    tuned: Path = TUNED,
    minutes: float = math.inf,
) -> None:
    """Every cell of some worlds, each kept in a file of its own; then all of them in one, beside those of other worlds.

    Args:
        minutes: after so many no other cell is begun, and those that there are go into the result.
    """
    end = time.monotonic() + 60 * minutes
    kept = read(folder)["runs"] if (folder / "audit_corruptions.json").exists() else {}
    record: dict[str, Any] = {"images": IMAGES, "seeds": SEEDS, "versions": versions(), "runs": kept}
    for part in parts:
        benches = {base: Bench(base, part, tuned) for base in worlds}
        runs: dict[str, Any] = kept.get(part, {})
        cells = [
            (cell, work / part / f"{'-'.join(cell)}.json".replace(" ", "-").replace(":", "-"))
            for cell in todo(part, worlds)
        ]
        for place in permuted(len(cells), ORDER):
            (what, name, images), path = cells[place]
            if path.exists():
                continue
            if time.monotonic() > end:
                break
            path.parent.mkdir(parents=True, exist_ok=True)
            found = run(benches[base_of(name)], what, name, images)
            write_json(path, found)
            said = [part, what, name, images, found["effect"], found.get("explained")]
            print(*said, file=sys.stderr, flush=True)
        for (what, name, images), path in cells:
            if path.exists():
                found = json.loads(path.read_text(encoding="utf-8"))
                runs.setdefault(what, {}).setdefault(name, {})[images] = found
        record["runs"][part] = runs
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "audit_corruptions.json", record)


def read(folder: Path = RESULTS) -> dict[str, Any]:
    """As `read_measured`."""
    return read_measured("audit_corruptions", folder)


def table(runs: Mapping[str, Any]) -> str:
    """How many cells are called backdoored, in each way of asking."""
    rows = [["images", "asked", "cells", "backdoored", "suspicious", "no sign", "cannot tell"]]
    for what, models in runs.items():
        cells = [one for images in models.values() for one in images.values()]
        for asked in dict.fromkeys(asked for one in cells for asked in one["said"]):
            levels = [one["said"][asked].split(", ")[0] for one in cells if asked in one["said"]]
            counts = [str(levels.count(level)) for level in rows[0][3:]]
            rows.append([what, asked, str(len(levels)), *counts])
    return markdown(rows)


def on_top(runs: Mapping[str, Any], asked: str) -> str:
    """Twins called backdoored where trigger and corruption come together, by corruption and severity."""
    rows = [["images", "twin", *(f"{kind}, {severity}" for kind, severity in product(ON_TOP, (1, 3, 5)))]]
    for what in ("trigger on top", "both corrupted"):
        for name, images in runs.get(what, {}).items():
            found = [
                images[f"{kind}:{severity}"]["said"][asked] for kind, severity in product(ON_TOP, (1, 3, 5))
            ]
            rows.append([what, f"`{name}`", *found])
    return markdown(rows)


def missed(runs: Mapping[str, Any], asked: str) -> list[str]:
    """Twins that their own trigger does not make the audit call backdoored."""
    return [
        name
        for name, images in runs["trigger"].items()
        if not images["own"]["said"][asked].startswith("backdoored")
    ]


def finding(record: Mapping[str, Any], part: str, base: str) -> str:
    """One world's numbers in words."""
    runs = {
        what: {name: images for name, images in models.items() if base_of(name) == base}
        for what, models in record["runs"][part].items()
    }
    cells = [one for images in runs["corruption"].values() for one in images.values()]
    said = [level for one in cells for level in one["said"].values()]
    strong = [one for one in cells if one["effect"][1] >= STRONG]
    alarms = Rate(sum(level.startswith("backdoored") for level in said), len(said))
    text = f"{part}, {base}: {alarms.count} of {alarms.total} verdicts on clean models and corrupted images are “backdoored” ({len(cells)} sets of images, of "
    text += f"which {len(strong)} send at least 50 points more to one class). "
    for asked in ("labelled, paired, alone", "labelled, paired, reference"):
        lost = missed(runs, asked)
        n = len(runs["trigger"])
        text += f"Own trigger, {asked}: {n - len(lost)} of {n} twins backdoored"
        text += f" (not: {', '.join(lost)}). " if lost else ". "
    explained = sorted(one["explained"] for one in strong if "explained" in one)
    own = sorted(
        (one["own"]["explained"], name) for name, one in runs["trigger"].items() if "explained" in one["own"]
    )
    if explained:
        text += f"Least share that a corruption of the same size explains of a corruption's effect: {explained[0]:.2f}; most of a trigger's: "
        text += (
            ", ".join(f"{value:.2f} ({name})" for value, name in own[-4:])
            + f"; the rule's number is {EXPLAINED:g}."
        )
    return text.strip()


def printed(record: Mapping[str, Any]) -> Iterator[str]:
    runs = record["runs"]["reported"]
    yield table(runs)
    for asked in ("labelled, paired, alone", "labelled, paired, reference"):
        yield ""
        yield f"The trigger together with a corruption; {asked}:"
        yield ""
        yield on_top(runs, asked)
    for part, measured in record["runs"].items():
        for base in measured["corruption"]:
            yield ""
            yield finding(record, part, base)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m analyses.audit_corruptions", description=__doc__)
    parser.add_argument("--measure", action="store_true", help="audit every set of images (again)")
    parser.add_argument("--world", choices=tuple(WORLDS), nargs="+", default=tuple(WORLDS), help="of models")
    parser.add_argument("--part", choices=tuple(SEEDS), nargs="+", default=tuple(SEEDS), help="of the seeds")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="begin no set of images after so many"
    )
    options = parser.parse_args(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

    def work() -> None:
        if options.measure:
            measure(options.part, options.world, minutes=options.minutes)
        for block in printed(read()):
            print(block)

    return outcome(parser.prog, work)


if __name__ == "__main__":
    sys.exit(main())
