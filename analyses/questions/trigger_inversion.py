"""Does the smallest pattern that reaches a class tell a backdoored CLIP from a clean one, and does fine-tuning against it repair?

Paper:     InverTune (Sun et al., 2025), CLIP-Inspector (Jindal et al., 2026), after Neural Cleanse (Wang et al., 2019); none of their code.
Command:   python -m analyses.trigger_inversion             (reads the committed result, prints the tables)
           python -m analyses.trigger_inversion --measure   (a killed run goes on; DECOMPCLIP_DATA names the photographs)
Run time:  see the tables, in seconds of one thread; `--minutes` begins nothing after so many.
Expected:  the attacker's class has the highest score; a few images repair.
Writes:    analyses/results/trigger_inversion/FAMILY.json

Chosen on the twins of cifar10: one pattern over the whole image (a mask with pixels told less), how surely it is to send images, and of the repair the weight,
the rate and four triggers in place of one. Of photos the clean model alone was looked at: it showed that a cross-entropy to reach, the first demand, is out of reach
among 200 classes. photos-badnet, -blended and -wanet were seen once before sizes had a bound (`LARGEST`), which changes those of classes that are not reached. The classes compared are the attacker's and four that a seed drew. A score is the log of
the others' median over the class's own, of sizes for the inversion; of the losses that a change of fixed size leaves for the scan, whose probes
(`decompclip audit --clean`) are searched for with fewer steps here, on the same images and classes, of each class the largest of three. The three repairs see the same pairs, as often,
at one rate. That is far fewer than PAR and CleanCLIP were made for: it is what a short budget gives, not what they can do.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from analyses.study.case import Case
from analyses.study.command import outcome
from analyses.study.family import BundledFamily
from analyses.study.results import RESULTS
from analyses.study.summary import markdown, rate
from decompclip.audit.config import ScanConfig
from decompclip.audit.scan import Search, probes
from decompclip.bench.run import versions, weights_of
from decompclip.data.pairs import permuted
from decompclip.defenses.clean_finetuning import (
    INVERSION_RECIPE,
    PAR,
    CleanCLIP,
    InversionTuning,
    TuningDefense,
)
from decompclip.defenses.inversion import invert_classes, invert_trigger, scores
from decompclip.files import alone_in, write_json
from decompclip.models.bundled import load_bundled
from decompclip.models.clip import HookedCLIP
from decompclip.operators.attribution import attribute

FOLDER = RESULTS / "trigger_inversion"
WORK = Path(".training") / "trigger_inversion"

IMAGES = 300
"""To search with (a half measures), and as many others to report repairs on."""

OTHERS, SEED = 4, 0
"""Classes beside the attacker's, and the seed that draws them and the images."""

INVERSION: dict[str, Any] = {"steps": 50, "images": 16, "reach": 0.9}
SCAN = ScanConfig(steps=12, images=12)
RECIPE = replace(INVERSION_RECIPE, epochs=1)
PAIRS, PAIRS_SEED, TRIGGERS = 1024, 77, 4
REPAIRS = ("inversion", "PAR", "CleanCLIP")


def plan(family: BundledFamily) -> list[tuple[str, str]]:
    """Model and what to measure, in order: later steps may be left."""
    twins = sorted(family.members, key=lambda m: m.seed)  # of each attack one before the others
    names = [family.name, *(m.name for m in twins)]
    repairs = [f"repair by {how}" for how in REPAIRS]
    per_twin = [(name, what) for name in names[1:] for what in (*repairs, "scan")]
    return [*((name, "inversion") for name in names), (family.name, "scan"), *per_twin]


def measured(family: BundledFamily, name: str, what: str) -> dict[str, Any]:
    """One step of the plan."""
    world, model = family.world, load_bundled(name)
    fit, classifier = family.samples(IMAGES, SEED).fit, family.classifier(model)
    own = [c for c in permuted(len(world.class_names), SEED).tolist() if c != world.label]
    classes = [world.label, *own[:OTHERS]]
    begin = time.process_time()
    if what == "scan":
        found = scanned(model, fit, classifier, classes)
        return found | {"seconds": time.process_time() - begin}
    if what == "inversion":
        every = invert_classes(model, fit, classifier, classes, names=world.class_names, **INVERSION)
        seconds = time.process_time() - begin
        of_target = every.triggers[0]
        return {
            "seconds": seconds,
            "sizes": {t.name: t.size for t in every.triggers},
            "success": {t.name: t.success.to_dict() for t in every.triggers},
            "moves": [round(x, 5) for x in of_target.moves.mean[:, 0].tolist()],
            "most moved": list(of_target.moves.top(3).labels),
            "true moves": None if name == family.name else true_moves(case_of(family, name)),
        }
    how = what.removeprefix("repair by ")
    triggers = ()
    if how == "inversion":
        triggers = tuple(
            invert_trigger(model, fit, classifier, world.label, seed=seed, **INVERSION)
            for seed in range(TRIGGERS)
        )
    defenses: dict[str, TuningDefense] = {
        "inversion": InversionTuning(recipe=RECIPE, triggers=triggers),
        "PAR": PAR(recipe=RECIPE),
        "CleanCLIP": CleanCLIP(recipe=replace(RECIPE, loss="cleanclip")),
    }
    tuned = defenses[how].apply(model, world.pairs(PAIRS, seed=PAIRS_SEED)).model
    seconds, case = time.process_time() - begin, case_of(family, name)
    after = replace(case, model=tuned, classifier=family.classifier(tuned))
    return {"seconds": seconds, "before": case.report_of(case.model), "after": after.report_of(tuned)}


def case_of(family: BundledFamily, name: str) -> Case:
    (member,) = family.select((name,))
    return family.case(member, images=IMAGES, seed=SEED)


def scanned(model: HookedCLIP, fit: Tensor, classifier: Tensor, classes: list[int]) -> dict[str, Any]:
    """The loss that each probe of the scan leaves toward each class, on images that it did not search on."""
    found = {}
    for probe in probes(SCAN.bound, SCAN.patch):
        search = Search(model, classifier.detach(), probe, SCAN)
        changes = search.run(fit[: IMAGES // 2], classes)
        left = [
            search.measure(fit[IMAGES // 2 :], change, c) for change, c in zip(changes, classes, strict=True)
        ]
        found[probe.name] = [losses.mean().item() for _, losses in left]
    return {"losses": found}


def true_moves(case: Case, images: int = 100) -> list[float]:
    """How far the attacker's own trigger moves each component toward the target."""
    few = replace(case, clean=case.clean[:images], labels=case.labels[:images], _seen={})
    before, after = (
        attribute(few.terms(part, "centred"), few.classifier, few.target).mean[:, 0]
        for part in ("clean", "triggered")
    )
    return [round(x, 5) for x in (after - before).tolist()]


def measure(
    family: BundledFamily, work: Path, folder: Path = FOLDER, *, minutes: float = float("inf")
) -> int:
    """Measure what is not there yet, each step kept in a file of its own; then write the record of all that is there.

    Returns:
        How many steps are left.

    Raises:
        FolderInUse: another process measures in `work`.
    """
    begin, runs, left = time.monotonic(), dict[str, Any](), 0
    with alone_in(work):
        for name, what in plan(family):
            path = work / f"{name}-{what.replace(' ', '-')}.json"
            if not path.exists():
                if time.monotonic() - begin > 60 * minutes:
                    left += 1
                    continue
                found = measured(family, name, what)
                write_json(path, found | {"seconds": round(found["seconds"], 1)})
                print(f"{name}: {what}", file=sys.stderr, flush=True)
            run = runs.setdefault(name, {"weights": weights_of(name)})
            run[what] = json.loads(path.read_text(encoding="utf-8"))
        about = {
            "images": IMAGES,
            "inversion": INVERSION,
            "scan": asdict(SCAN),
            "repair": asdict(RECIPE),
            "pairs": PAIRS,
        }
        record = {
            "family": family.name,
            "target": family.world.target,
            "config": about,
            "versions": versions(),
            "left": left,
        }
        write_json(folder / f"{family.name}.json", record | {"runs": runs})
    return left


def read(family: str = "photos", folder: Path = FOLDER) -> dict[str, Any]:
    """The record of a family.

    Raises:
        FileNotFoundError: nothing was measured yet; the message says what does.
    """
    path = folder / f"{family}.json"
    if not path.exists():
        raise FileNotFoundError(
            f"expected {path}; it is not there; run: python -m analyses.trigger_inversion --model-family {family} --measure"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def ranked(found: list[float]) -> str:
    """The first class's score, and its rank."""
    return f"{found[0]:.2f} ({1 + sum(x > found[0] for x in found[1:])})"


def detection_table(record: Mapping[str, Any]) -> str:
    clean = record["runs"][record["family"]]["inversion"]
    rows = [
        [
            "model",
            "size",
            "sent",
            "score (rank)",
            "beside the clean model",
            "likeness of moves",
            "of the clean model's",
            "s",
            "scan's score (rank)",
            "s",
        ]
    ]
    for name, run in record["runs"].items():
        found, scan = run["inversion"], run.get("scan")
        size, *_ = sizes = list(found["sizes"].values())
        cells = [f"`{name}`", f"{size:.4f}", rate(found["success"][record["target"]]), ranked(scores(sizes))]
        cells += (
            ["", "", ""]
            if name == record["family"]
            else [
                ranked(scores(sizes, list(clean["sizes"].values()))),
                *(f"{cosine(moves, found['true moves']):.2f}" for moves in (found["moves"], clean["moves"])),
            ]
        )
        cells.append(f"{found['seconds']:.0f}")
        cells += [ranked(scan_scores(scan)), f"{scan['seconds']:.0f}"] if scan else ["", ""]
        rows.append(cells)
    return markdown(rows)


def scan_scores(scan: Mapping[str, Any]) -> list[float]:
    """Of each class, by the probe that shows it most."""
    return [max(of_class) for of_class in zip(*map(scores, scan["losses"].values()), strict=True)]


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    return F.cosine_similarity(torch.tensor(a), torch.tensor(b), dim=0).item()


def repair_table(record: Mapping[str, Any]) -> str:
    """A row a twin: attack success (its control) and clean accuracy, before and after each repair."""
    runs = {name: run for name, run in record["runs"].items() if f"repair by {REPAIRS[0]}" in run}
    rows = [["model", *(f"{what} {how}" for how in ("before", *REPAIRS) for what in ("ASR", "CACC"))]]
    for name, run in runs.items():
        found = [run.get(f"repair by {how}") for how in REPAIRS]
        reports = [found[0]["before"], *(repair and repair["after"] for repair in found)]
        rows.append([f"`{name}`", *(cell for report in reports for cell in repaired(report))])
    return markdown(rows)


def repaired(report: Mapping[str, Any] | None) -> tuple[str, str]:
    """Attack success with its control, and clean accuracy; empty where nothing was measured."""
    if report is None:
        return "", ""
    return f"{rate(report['asr'])} ({100 * report['control']['value']:.1f})", rate(report["cacc"])


def what_is_left(how: str, found: Sequence[Mapping[str, Any]]) -> str:
    """Of one repair over twins: attack success left, and what it costs."""
    left = [100 * x["after"]["asr"]["value"] for x in found]
    lost = 100 * statistics.fmean(x["before"]["cacc"]["value"] - x["after"]["cacc"]["value"] for x in found)
    seconds = statistics.fmean(x["seconds"] for x in found)
    spread = f"{min(left):.1f} to {max(left):.1f}, n = {len(left)}"
    return f"{how} {statistics.fmean(left):.1f} % ({spread}), for {lost:.1f} points of accuracy and {seconds:.0f} s"


def finding(record: Mapping[str, Any]) -> str:
    clean = list(record["runs"][record["family"]]["inversion"]["sizes"].values())
    twins = {
        name: list(run["inversion"]["sizes"].values())
        for name, run in record["runs"].items()
        if name != record["family"]
    }
    alone, beside = ([scores(sizes, reference) for sizes in twins.values()] for reference in (None, clean))
    first = [sum(found[0] == max(found) for found in kind) for kind in (alone, beside)]
    repairs = {
        how: [run[f"repair by {how}"] for run in record["runs"].values() if f"repair by {how}" in run]
        for how in REPAIRS
    }
    left = "; ".join(what_is_left(how, found) for how, found in repairs.items() if found)
    own = scores(clean)
    scans = [
        scan_scores(run["scan"]) for name, run in record["runs"].items() if name in twins and "scan" in run
    ]
    return (
        f"Of {1 + OTHERS} classes the attacker's has the highest score in {first[0]} of {len(twins)} twins alone and in {first[1]} beside the clean model "
        f"(scores {min(x[0] for x in beside):.2f} to {max(x[0] for x in beside):.2f}; the other classes reach {max(max(x[1:]) for x in beside):.2f}). In the clean model itself its score is {own[0]:.2f} "
        f"(rank {1 + sum(x > own[0] for x in own[1:])})."
        + f" By the scan it has the highest in {sum(x[0] == max(x) for x in scans)} of {len(scans)} twins."
        * bool(scans)
        + f" After {PAIRS} pairs they leave of attack success, in the mean: {left}." * bool(left)
        + f" {record['left']} steps were not measured." * bool(record["left"])
    )


def printed(record: Mapping[str, Any]) -> Iterator[str]:
    """Both tables, and what they say."""
    yield detection_table(record)
    yield repair_table(record)
    yield finding(record)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m analyses.trigger_inversion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model-family", default="photos", help="shapes, cifar10 or photos")
    parser.add_argument("--measure", action="store_true", help="measure what is not there yet")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing after so many")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of what is measured so far")
    options = parser.parse_args(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

    def work() -> None:
        if options.measure:
            measure(BundledFamily(options.model_family), options.work, minutes=options.minutes)
        print("\n\n".join(printed(read(options.model_family))))

    return outcome(parser.prog, work)


if __name__ == "__main__":
    sys.exit(main())
