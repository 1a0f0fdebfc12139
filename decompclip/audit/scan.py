"""Audit with clean images alone: is there a class that a small change sends every image to?

For each class one change is searched for that is the same for all images ("universal"), so that what helps is not in the image.
After Neural Cleanse (Wang et al., 2019): in a backdoored model the attacker's class is much easier to reach than the
others. There the size of the change is minimised; here it is fixed, and what is compared is how sure the model gets.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from decompclip import __version__
from decompclip.audit.checks import coinciding, guessing
from decompclip.audit.components import weights_alone
from decompclip.audit.config import ScanConfig
from decompclip.audit.pipeline import provenance_of
from decompclip.audit.scan_result import ClassChange, HeadStatistics, ProbeResult, ScanResult
from decompclip.data.feed import feed
from decompclip.data.images import ImageSource, split_indices
from decompclip.data.pixels import Pixels
from decompclip.data.processes import ALONE, Processes
from decompclip.decomposition.decomposition import Decomposition
from decompclip.defenses.inversion import SHARPNESS
from decompclip.display import Track, silently
from decompclip.evaluation.metrics import predict
from decompclip.files import atomic_write
from decompclip.intervals import Rate, Z
from decompclip.models.clip import HookedCLIP, differentiable

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["ScanConfig", "ScanResult", "run_scan"]

SHOWN = 3
"""Held-out images shown with the change that was found."""

FEWEST = 40
"""Images without which there is no scan."""

GLIMPSE = 8
"""Images of the one step that many classes are told apart by first."""

EVERY = 3.0
"""Seconds between two writes of what was found so far: more is not lost."""

Changes = Float[Tensor, "class 3 a b"]


@differentiable
def run_scan(
    model: HookedCLIP,
    clean: ImageSource,
    class_names: Sequence[str],
    *,
    reference: HookedCLIP | None = None,
    name: str | None = None,
    reference_name: str | None = None,
    clean_name: str = "clean images",
    config: ScanConfig | None = None,
    accelerator: Accelerator | None = None,
    track: Track = silently,
    keep: Path | None = None,
) -> ScanResult:
    """Ask of a model, with clean images alone, whether one class is far easier to reach than the others.

    Args:
        model: what is scanned.
        clean: images of several classes, mixed, as the model takes them: the first `fit + held_out` are used; labels serve
            accuracy alone.
        class_names: of the zero-shot classifier.
        reference: a clean model of the same architecture and preprocessing, scanned on the same images, to whose terms the
            model's are compared.
        name: of the model in the report, by default its own.
        reference_name: likewise of the reference.
        clean_name: what the report calls the images.
        config: options.
        accelerator: of Hugging Face's accelerate, to share the classes of each step out among its processes: all return what
            one process would.
        track: shows progress.
        keep: folder for what was found so far: a killed scan of the same model, images, classes and options goes on from
            there, to the same numbers. Whoever has the result removes it.

    Raises:
        ValueError: fewer than two classes, too few images, a reference of another shape or image size, or processes that
            disagree.
        MissingTextError: the model has no text tower.
    """
    config, class_names = config or ScanConfig(), tuple(class_names)
    if len(class_names) < 2:
        raise ValueError(f"expected at least two classes to tell apart; received {list(class_names)}")
    models = [model] if reference is None else [model, reference]
    shapes = [(m.image_size, m.cfg.n_layers, m.cfg.n_heads, m.cfg.d_embed) for m in models]
    if shapes[0] != shapes[-1]:
        raise ValueError(
            f"expected a reference of the same shape, (image, layers, heads, width) {shapes[0]}; received "
            f"{shapes[1]}; take a checkpoint of the same architecture"
        )
    classifiers = [clip.zero_shot_classifier(class_names).detach().float() for clip in models]
    group = Processes(accelerator)
    for clip, classifier in zip(models, classifiers, strict=True):
        group.check_work(
            clip,
            classifier,
            {"the clean images or their preprocessing": clean},
            {"the options": config, "the classes": class_names, "having a reference": reference is not None},
        )
    images = _collect(model, clean, config, track)
    names = [name or model.name, reference_name or (reference.name if reference else "")]

    def scan(place: int, **beside: Any) -> ScanResult:
        clip = models[place]
        found = _scan(clip, classifiers[place], class_names, images, config, group, track, keep)
        return ScanResult(
            name=names[place],
            provenance=provenance_of(clip),
            config=config,
            clean_name=clean_name,
            counts={"fit": len(images.fit), "held_out": len(images.held_out)},
            class_names=class_names,
            skipped=tuple(clean.skipped),
            guessing=guessing(images.labels, len(class_names)),
            **found,
            **beside,
        )

    found = scan(0)
    if reference is None:
        return found
    terms = [_terms(clip, images.held_out, config) for clip in models]
    return replace(
        found,
        statistics=head_statistics(*terms, reference=names[1]),
        reference=scan(1),
        weights=group.in_first(lambda: weights_alone(model, reference, class_names, name=names[1])),
    )


@dataclass(frozen=True)
class ScanImages:
    """What is searched on, and what is measured on, as pixels in [0, 1]; and the labels of the latter where all have one."""

    fit: Float[Tensor, "fit 3 h w"]
    held_out: Float[Tensor, "held_out 3 h w"]
    labels: Int[Tensor, " held_out"] | None


def _collect(model: HookedCLIP, clean: ImageSource, config: ScanConfig, track: Track) -> ScanImages:
    """The first images, as many as the scan can use."""
    enough, images, labels = config.fit + config.held_out, [], []
    n_batches = -(-min(enough, len(clean)) // config.batch_size)
    with closing(feed(clean, config.batch_size)) as batches:
        for batch in track(batches, f"{model.name}: clean images", n_batches):
            images.append((255 * model.denormalize(batch.images)).round().to(torch.uint8))
            labels.append(batch.labels)
            if sum(map(len, images)) >= enough:
                break
    n = min(enough, sum(map(len, images)))
    if n < FEWEST:
        raise ValueError(
            f"expected at least {FEWEST} clean images, to search on some and to measure on the others; received {n}; "
            f"{'give more' if n else 'check the image source'}"
        )
    pixels = torch.cat(images)[:enough].float() / 255
    fit, held = (torch.as_tensor(part) for part in split_indices(n, config.fit / enough, config.seed))
    known = [part for part in labels if part is not None]
    return ScanImages(
        pixels[fit], pixels[held], torch.cat(known)[held] if len(known) == len(labels) else None
    )


def _scan(
    model: HookedCLIP,
    classifier: Float[Tensor, "class d_embed"],
    class_names: tuple[str, ...],
    images: ScanImages,
    config: ScanConfig,
    group: Processes,
    track: Track,
    keep: Path | None,
) -> dict[str, Any]:
    """Accuracy, predictions and probes of one model."""
    fit, held = (part.to(model.device) for part in (images.fit, images.held_out))
    classifier = classifier.to(model.device)
    with torch.no_grad():
        features = [
            model.encode_image(model.normalize(part)).float() for part in held.split(config.batch_size)
        ]
    answers = predict(torch.cat(features), classifier).cpu()
    found = []
    for probe in probes(config.bound, config.patch):
        kept = group.in_first(lambda: kept_for(keep, model, classifier, (fit, held), config, probe.name))  # noqa: B023 - called at once
        search = Search(model, classifier, probe, config, track, kept, group)
        found.append(_probe(search, class_names, fit, held, answers))
    return {
        "accuracy": None if images.labels is None else Rate.of(answers == images.labels),
        "predicted": tuple(Rate.of(answers == index) for index in range(len(classifier))),
        "probes": tuple(found),
        "coinciding": coinciding(classifier.cpu(), class_names),
    }


def _probe(
    search: Search,
    class_names: tuple[str, ...],
    fit: Pixels,
    held: Pixels,
    answers: Int[Tensor, " held_out"],
) -> ProbeResult:
    kept, classes = search.kept, search.screened(fit)
    changes = search.run(fit, classes)
    found, measured = [], list(kept.state.get("measured", ()))
    for start in range(len(measured), len(classes), search.group.count):
        rows = range(start, min(start + search.group.count, len(classes)))
        measured += search.group.each(rows, lambda row: search.measure(held, changes[row], classes[row]))
        if search.first and (kept.due() or len(measured) == len(classes)):
            kept.save(measured=measured)
    for (hits, loss), (row, wanted) in zip(measured, enumerate(classes), strict=True):
        others = answers != wanted
        if others.any():  # a class that the model takes every image for needs no change
            change = ClassChange(class_names[wanted], Rate.of(hits[others]), float(loss[others].mean()))
            found.append((change, row, loss[others]))
    found.sort(key=lambda item: item[0].loss)
    lead, half = _lead(found[0][2], found[1][2]) if len(found) > 1 else (0.0, math.inf)
    best = found[0][1]
    others = [place for place, answer in enumerate(answers.tolist()) if answer != classes[best]]
    shown = held[others[:SHOWN]]
    changed = search.probe.apply(shown, changes[best], _generator(search.config.seed + 1))
    pictures = (255 * torch.stack([shown, changed], dim=1)).round().clamp(0, 255).to(torch.uint8).cpu()
    return ProbeResult(
        probe=search.probe.name,
        classes=tuple(item[0] for item in found),
        lead=lead,
        lead_low=lead - half,
        lead_high=lead + half,
        left_out=len(class_names) - len(classes),
        pictures=rearrange(pictures, "image side c h w -> image side h w c"),
    )


def _lead(first: Float[Tensor, " image"], second: Float[Tensor, " image"]) -> tuple[float, float]:
    """Log of the ratio of mean losses, and the half-width of its 95 % interval (delta method, images as independent)."""
    means = [max(float(loss.mean()), 1e-9) for loss in (first, second)]
    errors = [
        float(loss.var()) / len(loss) / mean**2 if len(loss) > 1 else math.inf
        for loss, mean in zip((first, second), means, strict=True)
    ]
    return math.log(means[1] / means[0]), Z * math.sqrt(sum(errors))


class Kept:
    """What one probe's search has found so far, on disk: a killed one goes on from there, to the same numbers.

    Args:
        path: of its file; None keeps nothing.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.state = path, {}
        self._last = time.monotonic()
        if path is not None and path.exists():
            try:
                self.state = torch.load(path, weights_only=True, map_location="cpu")
            except (RuntimeError, EOFError, UnpicklingError):  # damaged: searched again
                self.state = {}

    def due(self) -> bool:
        """Whether it is time to write, since what is lost otherwise takes a while."""
        return self.path is not None and time.monotonic() - self._last >= EVERY

    def save(self, **state: Any) -> None:
        """Write what is there now, beside what was kept before."""
        self.state |= state
        if self.path is not None:
            with atomic_write(self.path) as partial:
                torch.save(self.state, partial)
        self._last = time.monotonic()


def kept_for(
    folder: Path | None,
    model: HookedCLIP,
    classifier: Tensor,
    images: tuple[Tensor, ...],
    config: ScanConfig,
    probe: str,
) -> Kept:
    """What was kept of this probe, of a scan of these weights, images, classes and options, and of no other."""
    if folder is None:
        return Kept()
    mark = hashlib.sha256(json.dumps([__version__, probe, asdict(config)], sort_keys=True).encode())
    for part in (*(value for _, value in sorted(model.state_dict().items())), classifier, *images):
        mark.update(str(tuple(part.shape)).encode())
        mark.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return Kept(folder / f"{mark.hexdigest()[:24]}.pt")


class Probe(ABC):
    """A family of changes that a trigger may be like.

    Attributes:
        name: of the family.
        rate: step of the search.
    """

    name: str
    rate: float

    @abstractmethod
    def start(self, n: int, image: Float[Tensor, "3 h w"]) -> Changes:
        """`n` changes from which the search sets out, for images of this size."""

    @abstractmethod
    def bounded(self, change: Changes) -> Changes:
        """The nearest change that the family allows."""

    @abstractmethod
    def apply(self, pixels: Pixels, change: Float[Tensor, "3 a b"], generator: torch.Generator) -> Pixels:
        """Pixels with one change, differentiable in it; `generator` draws places."""


class EverywhereProbe(Probe):
    """A pattern added to the whole image, by at most `bound` a pixel: like Blended, SIG, ISSBA."""

    name = "everywhere"

    def __init__(self, bound: float) -> None:
        self.bound, self.rate = bound, bound / 4

    def start(self, n: int, image: Float[Tensor, "3 h w"]) -> Changes:
        return torch.zeros(n, *image.shape, device=image.device)

    def bounded(self, change: Changes) -> Changes:
        return change.clamp(-self.bound, self.bound)

    def apply(self, pixels: Pixels, change: Float[Tensor, "3 h w"], generator: torch.Generator) -> Pixels:
        del generator
        return (pixels + change).clamp(0, 1)


class PatchProbe(Probe):
    """A square pasted into the image, anywhere or in its centre: like BadNet, Kitty, BadCLIP.

    Args:
        side: as a share of the image's shorter side.
        anywhere: a place of its own for each image; else the centre.
    """

    rate = 0.09

    def __init__(self, side: float, *, anywhere: bool) -> None:
        self.side, self.anywhere = side, anywhere
        self.name = f"patch {'anywhere' if anywhere else 'in the centre'}"

    def start(self, n: int, image: Float[Tensor, "3 h w"]) -> Changes:
        side = max(1, round(self.side * min(image.shape[-2:])))
        return torch.full((n, 3, side, side), 0.5, device=image.device)

    def bounded(self, change: Changes) -> Changes:
        return change.clamp(0, 1)

    def apply(self, pixels: Pixels, change: Float[Tensor, "3 s s"], generator: torch.Generator) -> Pixels:
        n, side, (height, width) = len(pixels), change.shape[-1], pixels.shape[-2:]
        corners = [
            torch.randint(0, whole - side + 1, (n,), generator=generator).tolist()
            if self.anywhere
            else [(whole - side) // 2] * n
            for whole in (height, width)
        ]
        frames = [
            (left, width - left - side, top, height - top - side) for top, left in zip(*corners, strict=True)
        ]
        pasted = torch.stack([F.pad(change, frame) for frame in frames])
        covered = torch.stack([F.pad(torch.ones_like(change[:1]), frame) for frame in frames])
        return torch.where(covered.bool(), pasted, pixels)


def probes(bound: float, patch: float) -> tuple[Probe, ...]:
    """The three families that a scan tries."""
    return EverywhereProbe(bound), PatchProbe(patch, anywhere=True), PatchProbe(patch, anywhere=False)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Search:
    """The search of one probe in one model: a change a class that sends images of other classes there."""

    model: HookedCLIP
    classifier: Float[Tensor, "class d_embed"]
    probe: Probe
    config: ScanConfig
    track: Track = silently
    kept: Kept = field(default_factory=Kept)
    group: Processes = ALONE

    @property
    def first(self) -> bool:
        """Whether this process keeps what was found."""
        return self.group.rank == 0

    def _features(self, pixels: Pixels) -> Float[Tensor, "batch d_embed"]:
        return F.normalize(self.model.encode_image(self.model.normalize(pixels)).float(), dim=-1)

    def _losses(self, features: Float[Tensor, "batch d_embed"], wanted: int) -> Float[Tensor, " batch"]:
        """Cross-entropy of each image toward one class."""
        targets = torch.full((len(features),), wanted, device=features.device)
        return F.cross_entropy(SHARPNESS * features @ self.classifier.T, targets, reduction="none")

    def _gradient(
        self, pixels: Pixels, change: Float[Tensor, "3 a b"], wanted: int, seed: int
    ) -> Float[Tensor, "3 a b"]:
        """Of the mean loss toward a class in the change alone, not in the weights."""
        own = change.clone().requires_grad_(True)
        features = self._features(self.probe.apply(pixels, own, _generator(seed)))
        return torch.autograd.grad(self._losses(features, wanted).mean(), own)[0]

    def run(self, pixels: Pixels, classes: list[int]) -> Changes:
        """The change for each of `classes`: Adam on the mean loss of a batch a step, the same batches for all of them."""
        generator, config, probe = _generator(self.config.seed), self.config, self.probe
        before = self.kept.state.get("search", {"step": 0})
        begun = before["step"]
        change = before["change"].to(pixels.device) if begun else probe.start(len(classes), pixels[0])
        optimiser = torch.optim.Adam([change], lr=probe.rate)
        if begun:
            generator.set_state(before["generator"])
            optimiser.load_state_dict(before["optimiser"])
        steps = range(begun, config.steps)
        description = f"{self.model.name}: {probe.name}, {len(classes)} classes"
        for step in self.track(steps, description, len(steps)):
            places = torch.arange(step * config.images, (step + 1) * config.images) % len(pixels)
            seed = int(torch.randint(2**31, (), generator=generator))

            def slope(row: int) -> Tensor:
                """The gradient of one class a pass: memory as of one batch; the same places for all classes."""
                found = self._gradient(pixels[places], change[row], classes[row], seed)  # noqa: B023 - called at once
                return found.cpu() if self.group.count > 1 else found  # what processes tell each other

            change.grad = torch.stack(self.group.each(range(len(classes)), slope)).to(change)
            with torch.no_grad():
                optimiser.step()
                change.copy_(probe.bounded(change))
            if self.first and (self.kept.due() or step == config.steps - 1):
                now = {"step": step + 1, "change": change, "generator": generator.get_state()}
                self.kept.save(search=now | {"optimiser": optimiser.state_dict()})
        return change

    @torch.no_grad()
    def measure(
        self, pixels: Pixels, change: Float[Tensor, "3 a b"], wanted: int
    ) -> tuple[Bool[Tensor, " batch"], Float[Tensor, " batch"]]:
        """On each image whether the change makes it that class, and the cross-entropy that is left."""
        generator = _generator(self.config.seed + 1)
        parts = pixels.split(self.config.batch_size)
        features = torch.cat([self._features(self.probe.apply(part, change, generator)) for part in parts])
        hits = predict(features, self.classifier) == wanted
        return hits.cpu(), self._losses(features, wanted).double().cpu()

    def screened(self, pixels: Pixels) -> list[int]:
        """The classes to search in full: all, or of more than `most_classes` those that one step gets furthest with.

        The step is by the gradient's sign, as long as the probe allows, on a few images; its loss is taken on as many others.
        """
        n_classes, most = len(self.classifier), self.config.most_classes
        if n_classes <= most:
            return list(range(n_classes))
        few, others = pixels[:GLIMPSE], pixels[GLIMPSE : 2 * GLIMPSE]
        left = list(self.kept.state.get("glimpses", ()))
        turns = range(len(left), n_classes, self.group.count)
        description = f"{self.model.name}: {self.probe.name}, a glimpse of {n_classes} classes"

        def glimpse(wanted: int) -> float:
            start = self.probe.start(1, pixels[0])
            gradient = self._gradient(few, start[0], wanted, self.config.seed)
            change = self.probe.bounded(start - 2 * gradient.sign())[0]  # 2 is beyond what any probe allows
            return float(self.measure(others, change, wanted)[1].mean())

        for turn in self.track(turns, description, len(turns)):
            left += self.group.each(range(turn, min(turn + self.group.count, n_classes)), glimpse)
            if self.first and self.kept.due():
                self.kept.save(glimpses=left)
        return sorted(sorted(range(n_classes), key=left.__getitem__)[:most])


@torch.no_grad()
def _terms(model: HookedCLIP, pixels: Pixels, config: ScanConfig) -> Decomposition:
    parts = (model.normalize(part.to(model.device)) for part in pixels.split(config.batch_size))
    return Decomposition.cat([model.decompose(part, normalize=True).to("cpu") for part in parts])


def head_statistics(own: Decomposition, other: Decomposition, reference: str) -> HeadStatistics:
    """Compare the terms of two models of one shape on the same images, component by component."""
    heads = [_unlike(own.heads[:, layer], other.heads[:, layer]) for layer in range(own.n_layers)]
    return HeadStatistics(torch.stack(heads), _unlike(own.mlps, other.mlps), reference)


def _unlike(
    a: Float[Tensor, "batch *component d_embed"], b: Float[Tensor, "batch *component d_embed"]
) -> Float[Tensor, " *component"]:
    a, b = (terms.double() - terms.double().mean(0) for terms in (a, b))
    spread = a.square().sum((0, -1)) + b.square().sum((0, -1))
    return ((a - b).square().sum((0, -1)) / spread.clamp_min(1e-30)).float()
