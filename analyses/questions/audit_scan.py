"""Can a scan with clean images alone tell a backdoored model from a clean one? The zoo, with a threshold chosen on other models.

Paper:     none; after Neural Cleanse (Wang et al., 2019), which is for classifiers.
Command:   python -m analyses.audit_scan             (reads the committed result, prints the tables)
           python -m analyses.audit_scan --measure   (a killed run resumes; DECOMPCLIP_DATA names the photographs)
Run time:  to measure, about 50 minutes on one thread for drawings and `cifar10`, of which 12 train clean fine-tuned models; a quarter of an hour for each of `photos`.
Expected:  triggers like the probes are found; a warp (WaNet) and a patch in one corner need not be.
Writes:    analyses/results/audit_scan/audit_scan.json

`decompclip audit MODEL --clean IMAGES` on every model: is there a class to which a small universal change leads far more easily
than to the next one? The models of `models("choosing")` served to hold the default threshold of that lead, 0.5, to: it is twice the
largest that their clean ones show. The probes were designed while some of the reported twins were looked at, with other images
(shapes-badnet, -blended, -issba, -wanet, -label-consistent; those of cifar10): a threshold from the models for choosing alone, half-way
between clean and backdoored ones, is given beside it. Clean models are the bundled ones and some that were fine-tuned on clean pairs.
On `photos` nothing was chosen; the first twins of six attacks are reported.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from analyses.study.command import outcome
from analyses.study.results import read_measured
from analyses.study.summary import markdown
from decompclip.audit.pipeline import Held
from decompclip.audit.scan import ScanConfig, run_scan
from decompclip.bench.plan import draw_samples
from decompclip.bench.run import versions, weights_of
from decompclip.data.images import ImageBatch
from decompclip.evaluation.metrics import auroc, auroc_interval
from decompclip.files import write_json
from decompclip.intervals import Rate
from decompclip.models.bundled import bundled, card
from decompclip.models.loading import load
from decompclip.zoo.recipes import WORLDS

RESULTS = Path(__file__).parent.with_name("results") / "audit_scan"
WORK = Path(".training") / "audit_scan"

TUNED = {
    "shapes": ("shapes:12000", ("--epochs", "2", "--lr", "3e-4", "--loss", "grouped")),
    "cifar10": ("cifar10", ("--epochs", "1", "--lr", "3e-4", "--loss", "grouped")),
    "photos": (
        "tiny-imagenet:16000",
        ("--epochs", "1", "--batch-size", "64", "--lr", "3e-4", "--loss", "grouped"),
    ),
}
"""Clean fine-tuning, as a user does it who means no harm: pairs and options of `decompclip finetune`."""

CLEAN = {
    "choosing": ("shapes-clean-0", "shapes-clean-1", "cifar10-clean-0"),
    "reported": (
        *(f"shapes-clean-{seed}" for seed in range(2, 7)),
        *(f"cifar10-clean-{seed}" for seed in range(1, 4)),
        "photos-clean-0",
    ),
}
IMAGES = {"choosing": 1, "reported": 0}
"""Seeds of the images."""


PHOTOS = (
    "photos-badnet",
    "photos-blended",
    "photos-issba",
    "photos-sig",
    "photos-wanet",
    "photos-reflection",
)
"""Of each of six attacks the first twin: with 200 classes a model takes a quarter of an hour."""


def models(part: str) -> tuple[str, ...]:
    """For choosing the threshold: twins of the second and third seed. Reported: those of the first, and the clean models."""
    twins = [name for name in bundled() if card(name)["backdoor"] is not None and base_of(name) != "photos"]
    later = [name for name in twins if card(name)["training"]["seed"]]
    if part == "choosing":
        return (*CLEAN[part], *later)
    return (*TUNED, *CLEAN[part], *(name for name in twins if name not in later), *PHOTOS)


def base_of(name: str) -> str:
    return name.split("-", maxsplit=1)[0]


def path_of(name: str, work: Path) -> str:
    """The bundled model, or the folder of a clean fine-tuned one, which is trained where it is not there."""
    if name in bundled():
        return name
    folder, base = work / name, base_of(name)
    pairs, options = TUNED[base]
    words = ["finetune", base, pairs, "--out", str(folder), *options, "--seed", name.rsplit("-", 1)[1]]
    if not (folder / "open_clip_model.safetensors").exists():
        subprocess.run([sys.executable, "-m", "decompclip", *words], check=True, stdout=sys.stderr)
    return str(folder)


def scan(name: str, part: str, work: Path, config: ScanConfig) -> dict[str, Any]:
    """One model's probes, as the result keeps them."""
    world, clip = WORLDS[base_of(name)], load(path_of(name, work))
    count = config.fit + config.held_out
    samples = draw_samples(world, images=count, seed=IMAGES[part])
    paths = tuple(f"{i}" for i in range(count))
    source = Held((ImageBatch(clip.normalize(samples.clean), samples.labels, paths),))
    begin = time.process_time()
    result = run_scan(clip, source, world.class_names, name=name, config=config)
    backdoor = card(name)["backdoor"] if name in bundled() else None
    return {
        "base": world.base,
        "target": backdoor and backdoor["target"],
        "attack": backdoor and backdoor["trigger"]["name"],
        "weights": weights_of(name) if name in bundled() else None,
        "accuracy": result.accuracy and result.accuracy.to_dict(),
        "seconds": round(time.process_time() - begin, 1),
        "probes": {
            probe.probe: {
                "lead": [round(x, 4) for x in (probe.lead, probe.lead_low, probe.lead_high)],
                "classes": [
                    {"name": c.name, "success": c.success.to_dict(), "loss": round(c.loss, 4)}
                    for c in probe.classes[:3]
                ],
                "rank": _rank([c.name for c in probe.classes], backdoor and backdoor["target"]),
            }
            for probe in result.probes
        },
    }


def _rank(names: Sequence[str], target: str | None) -> int | None:
    return names.index(target) + 1 if target in names else None


def measure(work: Path = WORK, folder: Path = RESULTS, *, share: tuple[int, int] = (0, 1)) -> None:
    """Scan every model, each kept in a file of its own; then write all of them. `share`: this process's part of them."""
    config = ScanConfig()
    todo = [(part, name) for part in CLEAN for name in models(part)]
    work.mkdir(parents=True, exist_ok=True)
    for part, name in todo[share[0] :: share[1]]:
        path = work / f"{part}-{name}.json"
        if not path.exists():
            found = scan(name, part, work, config)
            write_json(path, found)
            print(f"{part}: {name}: {found['seconds']:.0f} s", file=sys.stderr)
    if any(not (work / f"{part}-{name}.json").exists() for part, name in todo):
        return
    runs: dict[str, dict[str, Any]] = {part: {} for part in CLEAN}
    for part, name in todo:
        runs[part][name] = json.loads((work / f"{part}-{name}.json").read_text(encoding="utf-8"))
    options = {key: value for key, value in vars(config).items() if key != "lead"}
    record = {"config": options, "versions": versions(), "runs": runs}
    write_json(folder / "audit_scan.json", record)


def read(folder: Path = RESULTS) -> dict[str, Any]:
    """As `read_measured`."""
    return read_measured("audit_scan", folder)


def threshold(record: Mapping[str, Any]) -> tuple[float, float, float]:
    """Half-way between the largest lower end of clean models and the median of backdoored ones, of those for choosing; and both."""
    runs = record["runs"]["choosing"].values()
    leads = {True: [], False: []}
    for run in runs:
        leads[run["target"] is not None].append(strength(run))
    clean, backdoored = max(leads[False]), float(torch.tensor(leads[True]).median())
    return (clean + backdoored) / 2, clean, backdoored


def strength(run: Mapping[str, Any]) -> float:
    """The largest lower end of a lead, over probes: what is held to the threshold."""
    return max(probe["lead"][1] for probe in run["probes"].values())


def suspected(run: Mapping[str, Any], lead: float) -> str | None:
    """The class that a scan at this threshold suspects; None where it suspects none."""
    best = max(run["probes"].values(), key=lambda probe: probe["lead"][1])
    return best["classes"][0]["name"] if best["lead"][1] > lead else None


def table(record: Mapping[str, Any], lead: float) -> str:
    """The reported models: leads by probe, the rank of the true target, and what the scan says."""
    rows = [["model", "target", *next(iter(record["runs"]["reported"].values()))["probes"], "suspects"]]
    for name, run in record["runs"]["reported"].items():
        cells = []
        for probe in run["probes"].values():
            value, low, high = probe["lead"]
            first = probe["classes"][0]["name"]
            cells.append(f"{first} {value:.2f} [{low:.2f}, {high:.2f}]")
        rows.append([f"`{name}`", run["target"] or "–", *cells, suspected(run, lead) or "–"])
    return markdown(rows)


def verdicts(runs: Sequence[Mapping[str, Any]], lead: float) -> tuple[Rate, Rate, int]:
    """At this threshold: backdoored models whose class is named, clean models suspected, and backdoored ones of which another class is named."""
    bad, clean = ([r for r in runs if (r["target"] is not None) is wanted] for wanted in (True, False))
    hits = Rate(sum(suspected(r, lead) == r["target"] for r in bad), len(bad))
    alarms = Rate(sum(suspected(r, lead) is not None for r in clean), len(clean))
    return hits, alarms, sum(suspected(r, lead) not in (None, r["target"]) for r in bad)


def area(runs: Sequence[Mapping[str, Any]]) -> str:
    """How well a lead of any size tells these models apart."""
    kinds = ([strength(r) for r in runs if (r["target"] is not None) is bad] for bad in (False, True))
    leads = [torch.tensor(kind) for kind in kinds]
    low, high = auroc_interval(*leads)
    return f"{auroc(*leads):.3f} [{low:.3f}, {high:.3f}]"


def worlds(record: Mapping[str, Any], thresholds: Sequence[float]) -> str:
    """A row a world, and all together, whose verdicts have one threshold."""
    runs = list(record["runs"]["reported"].values())
    groups = {
        f"`{base}`": [r for r in runs if r["base"] == base] for base in dict.fromkeys(r["base"] for r in runs)
    }
    rows = [
        [
            "models of",
            *(
                f"{what} at a lead of {lead:g}"
                for lead in thresholds
                for what in ("named", "clean suspected")
            ),
            "AUROC at any lead",
        ]
    ]
    for name, own in (groups | {"all": runs}).items():
        found = [rate for lead in thresholds for rate in verdicts(own, lead)[:2]]
        rows.append([name, *(f"{rate.count} of {rate.total} ({rate})" for rate in found), area(own)])
    return markdown(rows)


def finding(record: Mapping[str, Any], lead: float) -> str:
    runs = record["runs"]["reported"]
    hits, alarms, wrong = verdicts(list(runs.values()), lead)
    bad = {name: run for name, run in runs.items() if run["target"]}
    first = sum(any(p["rank"] == 1 for p in run["probes"].values()) for run in bad.values())
    missed = [name for name, run in bad.items() if suspected(run, lead) != run["target"]]
    return (
        f"At a lead of {lead:g} the scan names the attacker's class in {hits.count} of {hits.total} backdoored models ({hits}), another "
        f"class in {wrong}, and suspects {alarms.count} of {alarms.total} clean ones ({alarms}); at any lead the AUROC is {area(list(runs.values()))}. In {first} the target is the easiest class of "
        f"at least one probe. Missed: {', '.join(missed) or 'none'}. More clean models would narrow the rate of false alarms; triggers unlike the "
        "probes would lower the hits."
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m analyses.audit_scan", description=__doc__)
    parser.add_argument("--measure", action="store_true", help="scan every model (again)")
    parser.add_argument(
        "--share", type=int, nargs=2, default=(0, 1), metavar=("K", "N"), help="every N-th model from K on"
    )
    options = parser.parse_args(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

    def work() -> None:
        if options.measure:
            measure(share=tuple(options.share))
        for block in printed(read()):
            print(block)

    return outcome(parser.prog, work)


def printed(record: Mapping[str, Any]) -> Iterator[str]:
    """The table, what it says, and the threshold's other choice."""
    lead = ScanConfig().lead
    middle, clean, backdoored = threshold(record)
    yield table(record, lead)
    yield ""
    yield worlds(record, (lead, round(middle, 1)))
    yield ""
    yield finding(record, lead)
    yield ""
    yield (
        f"Models for choosing: clean ones lead by at most {clean:.2f}, backdoored ones by {backdoored:.2f} (median; lower ends). "
        f"Half-way between the two: {finding(record, round(middle, 1))}"
    )


if __name__ == "__main__":
    sys.exit(main())
