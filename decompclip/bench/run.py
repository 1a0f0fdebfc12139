"""Runs of a plan, each in a file of its own: every detector and repair on one model of the zoo. A killed leaderboard goes on where it was."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from decompclip.attacks.registry import from_card
from decompclip.attacks.trigger import Trigger
from decompclip.bench.page import REPAIR_RATES
from decompclip.bench.plan import (
    FPR,
    MOST_SEEDS,
    REPAIRS,
    SLOW,
    FitInputs,
    Plan,
    RepairRecipe,
    Samples,
    base_of,
    draw_samples,
)
from decompclip.data.processes import Processes
from decompclip.decomposition.components import Components
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.maps import Convention
from decompclip.defenses.detectors import DETECTORS
from decompclip.defenses.detectors.detector import measure_cost
from decompclip.display import span
from decompclip.evaluation.evaluate import DecomposedImages, evaluate
from decompclip.evaluation.metrics import attack_success, auroc, auroc_interval, clean_accuracy
from decompclip.files import write_json
from decompclip.intervals import Rate, Redrawn
from decompclip.models.bundled import card, load_bundled
from decompclip.models.clip import HookedCLIP
from decompclip.models.spec import versions
from decompclip.zoo.recipes import WORLDS

if TYPE_CHECKING:
    from accelerate import Accelerator

RUNS = "runs"
LIBRARIES = ("torch", "numpy", "scipy", "scikit-learn", "open_clip_torch")


class Remembering:
    """`model`, which recalls features and terms of the images in its memory; others go through the tower.

    So detectors and repairs share every forward pass of a run, and need not know of each other. All else is the model's.

    Args:
        model: a CLIP.
        batch_size: images a forward pass.

    Attributes:
        looks: images that went through the tower.
    """

    def __init__(self, model: HookedCLIP, *, batch_size: int = 64) -> None:
        self.model = model
        self.batch_size = batch_size
        self.looks = 0
        self._places: dict[bytes, tuple[int, int]] = {}
        self._sets: list[Tensor] = []
        self._seen: dict[tuple[int, str], Any] = {}
        self._awake = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)

    def remember(self, pixels: Float[Tensor, "image 3 h w"]) -> None:
        """Put images into the memory; they go through the tower when they are first asked for."""
        images = self.normalize(pixels)
        for row, key in enumerate(_keys(images)):
            self._places.setdefault(key, (len(self._sets), row))
        self._sets.append(images)

    def normalize(self, pixels: Tensor) -> Tensor:
        return self.model.normalize(pixels)

    def terms(self, pixels: Float[Tensor, "image 3 h w"], convention: Convention) -> Decomposition:
        """Terms of unit features."""
        return self.decompose(self.normalize(pixels), convention=convention, normalize=True)

    @torch.no_grad()
    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        recalled = self._recall(images, "features")
        if recalled is None:
            self.looks += len(images)
            return self.model.encode_image(images, normalize)
        return nn.functional.normalize(recalled, dim=-1) if normalize else recalled

    @torch.no_grad()
    def decompose(
        self,
        images: Tensor,
        *,
        convention: Convention = "centred",
        normalize: bool = False,
        tokens: Components | Literal[True] | None = None,
    ) -> Decomposition:
        recalled = self._recall(images, convention) if normalize and not tokens else None
        if recalled is None:
            self.looks += len(images)
            return self.model.decompose(images, convention=convention, normalize=normalize, tokens=tokens)
        return recalled

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """Nothing is recalled: for measurements of time."""
        self._awake = False
        try:
            yield
        finally:
            self._awake = True

    def _recall(self, images: Tensor, kind: str) -> Any:
        """What was seen of these images; None unless they are all of one set."""
        if not (self._awake and len(images)):
            return None
        places = [self._places.get(key, (-1, 0)) for key in _keys(images)]
        which = places[0][0]
        if which < 0 or any(place[0] != which for place in places):
            return None
        return self._whole(which, kind)[[row for _, row in places]]

    def _whole(self, which: int, kind: str) -> Any:
        """All that was seen of a set."""
        if (which, kind) not in self._seen:
            parts = self._sets[which].split(self.batch_size)
            self.looks += len(self._sets[which])
            if kind == "features":
                seen: Any = torch.cat([self.model.encode_image(part) for part in parts])
            else:
                options: Any = {"convention": kind, "normalize": True}
                seen = Decomposition.cat([self.model.decompose(part, **options) for part in parts])
            self._seen[which, kind] = seen
        return self._seen[which, kind]


def _keys(images: Tensor) -> Iterator[bytes]:
    for image in images.detach().cpu().contiguous().numpy():
        yield blake2b(image.tobytes(), digest_size=16).digest()


Log = Callable[[str], None]

COST_IMAGES = {False: 64, True: 8}
"""Images that time is taken on: of the other detectors, and of the slow ones."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, its trigger (None for a clean one), and the images of one run."""

    model: Remembering
    classifier: Float[Tensor, "class d_embed"]
    trigger: Trigger | None
    target: int
    samples: Samples
    triggered: Float[Tensor, "triggered 3 h w"] | None

    @staticmethod
    def of(name: str, *, images: int, seed: int, draws: int = 1) -> Subject:
        """Raises ValueError or FileNotFoundError as `draw_samples`."""
        world, backdoor = WORLDS[base_of(name)], card(name)["backdoor"]
        clip = load_bundled(name)
        model = Remembering(clip)
        samples = draw_samples(world, images=images, seed=seed, draws=draws)
        trigger = None if backdoor is None else from_card(backdoor["trigger"])
        target = world.label if backdoor is None else world.class_names.index(backdoor["target"])
        triggered = None if trigger is None else samples.triggered(trigger, target)
        for pixels in (
            *samples.fits,
            samples.clean,
            samples.other,
            *([] if triggered is None else [triggered]),
        ):
            model.remember(pixels)
        with torch.no_grad():
            classifier = world.classifier(clip)
        return Subject(model, classifier, trigger, target, samples, triggered)

    def shared(self, n: int) -> tuple[Samples, Tensor | None]:
        """The first `n` images of each kind, and the triggered copies of those."""
        samples = self.samples.first(n)
        own = int((samples.labels != self.target).sum())
        return samples, None if self.triggered is None else self.triggered[:own]


def measure(name: str, plan: Plan, *, seed: int, log: Log = lambda line: None) -> dict[str, Any]:
    """Every detector and repair of the plan on one model, ready for JSON.

    Raises:
        ValueError: too few images for a detector or a repair (which is named), or more than there are.
        FileNotFoundError: the photographs of a model of `cifar10` are not there.
    """
    subject = Subject.of(name, images=plan.images, seed=seed, draws=plan.draws)
    detectors, repairs = {}, {}
    for detector in plan.detectors:
        log(f"{name}, seed {seed}: {detector}")
        with _named(f"{name}, {detector}"):
            detectors[detector] = detection(subject, detector, images=plan.images_of(detector))
    if plan.repairs:
        log(f"{name}, seed {seed}: {len(plan.repairs)} repairs")
    for repair in plan.repairs:
        with _named(f"{name}, {repair}"):
            repairs[repair] = evaluate_repair(subject, repair, seed=seed)
    counts = {kind: len(getattr(subject.samples, kind)) for kind in ("fit", "clean", "other")}
    return {
        "images": counts | {"triggered": 0 if subject.triggered is None else len(subject.triggered)},
        "detectors": detectors,
        "repairs": repairs,
    }


def detection(subject: Subject, name: str, *, images: int) -> dict[str, Any]:
    """AUROC of clean and triggered images, none of the target's class, and rates at the detector's own threshold.

    The control puts other clean images in the place of the triggered ones: 0.5, but for chance.
    """
    samples, triggered = subject.shared(images)
    detector = DETECTORS[name](subject.model, subject.classifier)
    detector.fit(samples.fit)
    threshold = detector.threshold_at(FPR)
    clean, other = detector.score(samples.clean), detector.score(samples.other)
    own = clean[samples.labels != subject.target]
    few = COST_IMAGES[name in SLOW]
    with subject.model.asleep():
        cost = measure_cost(detector, samples.clean[:few])
    found: dict[str, Any] = {
        "images": images,
        "auroc": None,
        "tpr": None,
        "fpr": Rate.of(torch.cat([clean, other]) > threshold).to_dict(),
        "control": area(own, other[samples.other_labels != subject.target]),
        "threshold": threshold,
        "forwards": detector.forwards,
        "cost": round(cost, 3),
    }
    if triggered is not None:
        suspect = detector.score(triggered)
        found |= {"auroc": area(own, suspect), "tpr": Rate.of(suspect > threshold).to_dict()}
    return found


def evaluate_repair(subject: Subject, name: str, *, seed: int) -> dict[str, Any]:
    """Rates over clean and triggered images that went through the same repair, fitted on each draw in turn."""
    rates: dict[str, list[Rate]] = {}
    for draw, fit in enumerate(subject.samples.fits):
        for key, rate in _one_draw(subject, REPAIRS[name], fit, seed=seed + MOST_SEEDS * draw).items():
            rates.setdefault(key, []).append(rate)
    return {key: Redrawn(tuple(rates[key])).to_dict() if key in rates else None for key in REPAIR_RATES}


def _one_draw(subject: Subject, repair: RepairRecipe, images: Tensor, *, seed: int) -> dict[str, Rate]:
    """After one draw."""
    samples, target = subject.samples, subject.target
    extent = None if subject.trigger is None else subject.trigger.extent
    fit = subject.model.terms(images, repair.convention)
    edit = repair.fit(FitInputs(fit, subject.classifier, extent, seed))

    def seen(images: Tensor, labels: Tensor) -> DecomposedImages:
        return DecomposedImages(subject.model.terms(images, repair.convention), labels)

    truth = samples.labels[samples.labels != target]
    triggered = None if subject.triggered is None else seen(subject.triggered, truth)
    found = evaluate(
        edit,
        seen(samples.clean, samples.labels),
        subject.classifier,
        triggered,
        None if triggered is None else target,
        batch_size=len(samples.labels),
    )
    rates = {"cacc": found.cacc, "control": attack_success(found.predictions, samples.labels, target)}
    if found.asr is not None and found.triggered_predictions is not None:
        rates["asr"] = found.asr
        rates["triggered_accuracy"] = clean_accuracy(found.triggered_predictions, truth)
    return rates


def area(clean: Tensor, suspect: Tensor) -> dict[str, float]:
    """AUROC with its 95 % interval, for JSON."""
    low, high = auroc_interval(clean, suspect)
    return {"value": auroc(clean, suspect), "low": low, "high": high}


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Says whose error it was."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def run(
    plan: Plan, out: Path, *, accelerator: Accelerator | None = None, log: Log = lambda line: None
) -> list[dict[str, Any]]:
    """Every run of the plan: read where it is there already, else measured and written.

    A run is there if its file says the same configuration and the same weights.

    Args:
        plan: what is measured.
        out: folder that holds the runs.
        accelerator: of Hugging Face's accelerate, to spread the runs over its processes, which share the folder. Each measures
            whole runs, each in a file of its own, so that any number of processes goes on from any other's.
        log: is told what goes on.

    Raises:
        ValueError, FileNotFoundError: as `measure`; what was measured before stays. Or processes that disagree, or do not
            share the folder.
        FolderInUse: another run writes there.
        OSError: `out` cannot be written to.
    """
    group, folder = Processes(accelerator), out / RUNS
    group.check_equal(
        {
            "the models": [(model, weights_of(model)) for model in plan.models],
            "the plan": [plan.config(seed) for seed in plan.seeds],
            "the versions": versions(),
        }
    )

    def known(job: tuple[str, int]) -> dict[str, Any] | None:
        model, seed = job
        return _known(_place(folder, job), plan.config(seed), weights_of(model))

    def whole() -> list[dict[str, Any]]:
        runs = [(job, known(job)) for job in plan.jobs]
        if lost := [_place(folder, job).name for job, found in runs if found is None]:
            raise ValueError(
                f"expected every run in {folder}; {', '.join(lost)} is not there any more; leave its files alone, and run the "
                "same again"
            )
        return [found for _, found in runs if found is not None]

    at = {job: f"[{place}/{len(plan.jobs)}] " for place, job in enumerate(plan.jobs, 1)}
    with group.alone_in(out):
        todo = group.in_first(lambda: [job for job in plan.jobs if known(job) is None])
        for model, seed in plan.jobs:
            if group.rank == 0 and (model, seed) not in todo:
                log(f"{at[model, seed]}{model}, seed {seed}: there already")
        own, spent = todo[group.rank :: group.count], []
        for model, seed in own:
            begin, where = time.perf_counter(), at[model, seed]
            found = _facts(model, plan, seed) | measure(
                model, plan, seed=seed, log=lambda line, where=where: log(where + line)
            )
            found["seconds"] = round(time.perf_counter() - begin, 1)
            write_json(_place(folder, (model, seed)), found)
            spent.append(found["seconds"])
            left = (len(own) - len(spent)) * sum(spent) / len(spent)
            log(
                f"{where}{model}, seed {seed}: {found['seconds']:.0f} s; at most {span(left)} left at this pace"
            )
        group.wait()
        return group.in_first(whole)


def _place(folder: Path, job: tuple[str, int]) -> Path:
    model, seed = job
    return folder / f"{model}-seed{seed}.json"


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
        "versions": {"python": platform.python_version()} | versions(("decompclip", *LIBRARIES)),
    }


def attack_of(model: str) -> str | None:
    """What twins of several seeds have in common; None for a clean model."""
    if card(model)["backdoor"] is None:
        return None
    seed = card(model)["training"]["seed"]
    return model.removesuffix(f"-{seed}") if seed else model


def _known(path: Path, config: dict[str, Any], weights: str) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # cut, or another's: measured again
        return None
    same = isinstance(found, dict) and found.get("config") == config and found.get("weights") == weights
    return found if same else None
