"""Kills long work at random moments and looks at what is left: `python -m tests.kill_loop --kills 20`.

Each piece of work runs in a forked process that is killed (SIGKILL) after a random part of its time, again and again, in one folder
until it ends; then in a new one. After every kill what lies there must be whole or be refused; and what the run that ends leaves
must be what an undisturbed run leaves, byte for byte, but for measured times.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import decompclip
from analyses.paper import table5
from analyses.study.command import produce
from analyses.study.family import open_family
from decompclip import Moments, Shapes, Store, extract
from decompclip.attacks.patch import BadNet
from decompclip.attacks.poisoned import UNFINISHED, PoisonedPairs, PoisonRecord, write_poisoned
from decompclip.audit import scan as kept
from decompclip.audit.collect import open_source
from decompclip.audit.pipeline import run_audit
from decompclip.audit.scan import ScanConfig, run_scan
from decompclip.bench.page import leaderboard, write_board
from decompclip.bench.plan import Plan
from decompclip.bench.run import run
from decompclip.cli.repair import ASKED, NUMBERS, UNFINISHED as UNFINISHED_REPAIR
from decompclip.data.files import POISON_LIST
from decompclip.data.sources import open_pairs
from decompclip.decomposition.store import MANIFEST, MOMENTS, read_shard
from decompclip.files import alone_in
from decompclip.models.folders import CONFIG, GUARD, save_model
from decompclip.operators import extract as extracting
from decompclip.report import write_report
from decompclip.training.finetune import finetune
from decompclip.training.recipes import FineTuning
from tests.commands import in_processes, succeeds

SCAN = ScanConfig(steps=4, images=2, fit=20, held_out=20)
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")


def poison(folder: Path) -> None:
    pairs = PoisonedPairs(open_pairs("shapes:240"), BadNet(), "star", count=8)
    # a kill may come after the last write: all is there
    if not (folder / POISON_LIST).exists() or (folder / UNFINISHED).exists():
        write_poisoned(pairs, folder, per_shard=40)


def poison_whole(folder: Path) -> None:
    if (folder / POISON_LIST).exists():
        PoisonRecord.load(folder / POISON_LIST)
        assert len(list(folder.glob("*.tar"))) == 6
    elif any(folder.glob("*.tar")):
        with contextlib.suppress(ValueError):
            open_pairs(str(folder))
            raise AssertionError(f"{folder} is not finished, and was read")


def tune(folder: Path) -> None:
    with alone_in(folder):
        model = decompclip.load("shapes")
        recipe = FineTuning(epochs=1, batch_size=8, lr=1e-4, loss="grouped")
        path = folder / "checkpoint.pt"
        tuned = finetune(model, open_pairs("shapes:160"), recipe, checkpoint=path, checkpoint_every=3)
        save_model(tuned.model, folder)


def tune_whole(folder: Path) -> None:
    if (folder / "open_clip_config.json").exists():
        decompclip.load(str(folder))
    if (folder / "checkpoint.pt").exists():
        torch.load(folder / "checkpoint.pt", weights_only=True)


def scan(folder: Path) -> None:
    with alone_in(folder):
        model = decompclip.load("shapes-badnet")
        source = open_source("shapes", model, model.class_names, limit=SCAN.fit + SCAN.held_out)
        result = run_scan(model, source, model.class_names, config=SCAN, keep=folder / ".scan")
        write_report(result, folder)
        shutil.rmtree(folder / ".scan", ignore_errors=True)


def audit(folder: Path) -> None:
    with alone_in(folder):
        model = decompclip.load("shapes-badnet")
        names = model.class_names
        clean, suspect = (open_source(f"shapes{kind}", model, names, limit=60) for kind in ("", ":badnet"))
        write_report(run_audit(model, clean, suspect, names), folder)


def repair(folder: Path, *, options: tuple[object, ...]) -> None:
    # a kill may come after the last write: all is there
    if not (folder / NUMBERS).exists() or (folder / UNFINISHED_REPAIR / ASKED).exists():
        succeeds("repair", "shapes-badnet", "--out", folder, *options)


def repair_whole(folder: Path) -> None:
    if (folder / GUARD).exists() or (folder / CONFIG).exists():
        decompclip.load(str(folder))
    if (folder / NUMBERS).exists():
        assert set(json.loads((folder / NUMBERS).read_text(encoding="utf-8"))["results"]) == SUBJECTS
    for checkpoint in folder.glob(f"{UNFINISHED_REPAIR}/*.pt"):
        torch.load(checkpoint, weights_only=True)


SUBJECTS = {"before", "after", "control"}
FITTED = ("--method", "agnostic", "--clean", "shapes:200")
TUNED = ("--method", "par", "--clean", "shapes:160", "--epochs", 1, "--lr", 1e-3, "--batch-size", 16)


def analysis(folder: Path) -> None:
    family = open_family("shapes")
    produce(table5, family, table5.Config(images=60), family.select(("shapes-badnet",)), folder=folder)  # pyright: ignore[reportArgumentType]


def analysis_whole(folder: Path) -> None:
    for path in folder.rglob("*.json"):
        json.loads(path.read_text(encoding="utf-8"))


def bench(folder: Path) -> None:
    write_board(leaderboard(run(PLAN, folder)), folder)


def bench_of_two(folder: Path) -> None:
    """By two processes, which a kill takes both."""
    for found in in_processes(2, lambda rank: run(PLAN, folder, accelerator=Accelerator(cpu=True))):
        assert isinstance(found, list), found
    write_board(leaderboard(found), folder)


PLAN = Plan(
    models=("shapes", "shapes-badnet"), detectors=(), repairs=("none",), images=40, slow_images=40, draws=2
)


def pages_whole(folder: Path) -> None:
    for numbers in folder.glob("*.json"):
        found = json.loads(numbers.read_text(encoding="utf-8"))
        (page,) = folder.glob("*.html")
        assert f'content="{found["run"]}"' in page.read_text(encoding="utf-8")
    for part in folder.glob("runs/*.json"):
        json.loads(part.read_text(encoding="utf-8"))


def store(folder: Path, **options: Any) -> None:
    model = decompclip.load("shapes")
    extract(model, Shapes(400, seed=3), folder, shard_size=40, batch_size=20, **options)


def store_of_two(folder: Path, **options: Any) -> None:
    """By two processes, which a kill takes both."""
    found = in_processes(2, lambda rank: store(folder, accelerator=Accelerator(cpu=True), **options))
    assert found == [None, None], found


def moments(folder: Path) -> None:
    store(folder, moments_only=True)


def moments_of_two(folder: Path) -> None:
    store_of_two(folder, moments_only=True)


def store_whole(folder: Path) -> None:
    if (folder / MANIFEST).exists():
        assert len(Store(folder)[:]) == 400
    elif folder.exists():
        with contextlib.suppress(FileNotFoundError):
            Store(folder)
            raise AssertionError(f"{folder} is not finished, and was read")
    for shard in folder.glob("0*.safetensors"):
        read_shard(shard)


def moments_whole(folder: Path) -> None:
    if (folder / MOMENTS).exists():
        Moments.load(folder / MOMENTS)
        assert not (folder / MANIFEST).exists() or Moments.load(folder / MOMENTS).count == 400


@dataclass(frozen=True)
class Work:
    """Something long, and what must hold of its folder whenever it is killed."""

    do: Callable[[Path], None]
    whole: Callable[[Path], None]


WORKS = {
    "poison": Work(poison, poison_whole),
    "finetune": Work(tune, tune_whole),
    "scan": Work(scan, pages_whole),
    "audit": Work(audit, pages_whole),
    "repair": Work(partial(repair, options=FITTED), repair_whole),
    "repair by fine-tuning": Work(partial(repair, options=TUNED), repair_whole),
    "analysis": Work(analysis, analysis_whole),
    "bench": Work(bench, pages_whole),
    "bench of two": Work(bench_of_two, pages_whole),
    "extract": Work(store, store_whole),
    "extract of two": Work(store_of_two, store_whole),
    "moments": Work(moments, moments_whole),
    "moments of two": Work(moments_of_two, moments_whole),
}


def content(folder: Path) -> dict[str, str]:
    """Of each file a digest; without checkpoints, locks and measured times, and the marks that hang on these."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name.startswith(".decompclip") or path.suffix == ".pt":
            continue
        data = path.read_bytes()
        if path.suffix in {".json", ".html"}:
            text = re.sub(r'"(?:seconds|cost|time)": [\d.e+-]+', "", data.decode())
            data = re.sub(r"&#34;seconds&#34;: [\d.]+|\b[0-9a-f]{16}\b", "", text).encode()
        found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def attempt(work: Work, folder: Path, patience: float | None) -> bool:
    """Whether the work ended; after `patience` seconds it is killed."""
    child = os.fork()
    if not child:
        os.setsid()  # what it starts is killed with it
        code = 1
        try:
            with open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):
                work.do(folder)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    end = None if patience is None else time.monotonic() + patience
    while True:
        done, status = os.waitpid(child, 0 if end is None else os.WNOHANG)
        if done:
            assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0, f"ended with status {status}"
            return True
        if end is not None and time.monotonic() > end:
            with contextlib.suppress(ProcessLookupError):  # it has just begun
                os.killpg(child, signal.SIGKILL)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.005)


def loop(name: str, kills: int, seed: int, folder: Path) -> str:
    """Kill the work so often; what was seen, in a line.

    Raises:
        AssertionError: something was not whole, or not the same.
    """
    work, draw = WORKS[name], random.Random(seed)
    began = time.monotonic()
    attempt(work, folder / "undisturbed", None)
    took, expected = time.monotonic() - began, content(folder / "undisturbed")
    killed = ended = 0
    while killed < kills:
        place = folder / f"{ended}"
        place.mkdir()
        while not attempt(work, place, draw.uniform(0.02, 1) * took if killed < kills else None):
            killed += 1
            work.whole(place)
        work.whole(place)
        ended += 1
        assert content(place) == expected, (
            f"{name} after {killed} kills: {place} is not as an undisturbed run leaves it"
        )
        assert not list(place.rglob(".*.partial")), f"{name}: left-over files in {place}"
    return f"{name}: {killed} kills, {ended} runs ended with the bytes of an undisturbed one ({took:.1f} s)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=WORKS, nargs="+", default=list(WORKS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    kept.EVERY = extracting.EVERY = 0.1
    for name in given.only:
        with tempfile.TemporaryDirectory() as folder:
            print(loop(name, given.kills, given.seed, Path(folder)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
