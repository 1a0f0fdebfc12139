"""Runs of a plan, each in a file of its own: a killed leaderboard goes on where it was."""

from __future__ import annotations

import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from decompclip import __version__
from decompclip.bench.measure import Log, measure
from decompclip.bench.plan import Plan, base_of
from decompclip.files import write_json
from decompclip.models.bundled import card
from decompclip.progress import span

RUNS = "runs"
LIBRARIES = ("torch", "numpy", "scipy", "scikit-learn", "open_clip_torch")


def run(plan: Plan, out: Path, *, log: Log = lambda line: None) -> list[dict[str, Any]]:
    """Every run of the plan: read where it is there already, else measured and written.

    A run is there if its file says the same configuration and the same weights.

    Raises:
        ValueError, FileNotFoundError: as `measure`; what was measured before stays.
        OSError: `out` cannot be written to.
    """
    folder = out / RUNS
    folder.mkdir(parents=True, exist_ok=True)
    runs, spent = [], []
    for number, (model, seed) in enumerate(plan.jobs, 1):
        path = folder / f"{model}-seed{seed}.json"
        at = f"[{number}/{len(plan.jobs)}] "
        known = _known(path, plan.config(seed), weights_of(model))
        if known is not None:
            log(f"{at}{model}, seed {seed}: there already")
            runs.append(known)
            continue
        begin = time.perf_counter()
        found = _facts(model, plan, seed) | measure(model, plan, seed=seed, log=lambda line: log(at + line))  # noqa: B023 - called at once
        found["seconds"] = round(time.perf_counter() - begin, 1)
        write_json(path, found)
        runs.append(found)
        spent.append(found["seconds"])
        left = (len(plan.jobs) - number) * sum(spent) / len(spent)
        log(f"{at}{model}, seed {seed}: {found['seconds']:.0f} s; at most {span(left)} left at this pace")
    return runs


def weights_of(model: str) -> str:
    """SHA-256 of the model's weights, as its card says and its loading verifies."""
    facts = card(model)
    return facts.get("weights_sha256") or facts["sha256"]


def _facts(model: str, plan: Plan, seed: int) -> dict[str, Any]:
    backdoor = card(model)["backdoor"]
    trigger = backdoor and backdoor["trigger"]
    return {
        "model": model,
        "base": base_of(model),
        "attack": attack_of(model),
        "extent": trigger and trigger["extent"],
        "structure": trigger and trigger["structure"],
        "target": backdoor and backdoor["target"],
        "seed": seed,
        "weights": weights_of(model),
        "config": plan.config(seed),
        "versions": versions(),
    }


def attack_of(model: str) -> str | None:
    """What twins of several seeds have in common; None for a clean model."""
    backdoor = card(model)["backdoor"]
    if backdoor is None:
        return None
    seed = backdoor["trigger"]["seed"]
    return model.removesuffix(f"-{seed}") if seed else model


def versions() -> dict[str, str]:
    found = {"decompclip": __version__, "python": platform.python_version()}
    return found | {name: version(name) for name in LIBRARIES}


def _known(path: Path, config: dict[str, Any], weights: str) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # cut, or another's: measured again
        return None
    same = isinstance(found, dict) and found.get("config") == config and found.get("weights") == weights
    return found if same else None
