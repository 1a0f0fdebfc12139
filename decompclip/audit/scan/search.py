"""What a scan has found so far, on disk: a killed one goes on from there, to the same numbers.

Small changes of an image that a trigger may be like: a faint pattern everywhere, a patch in any or in one place.

One change a class is searched for; it is the same for all images ("universal"), so that what helps is not in the image.

The search: one small change a class that sends images of other classes there, and how well it does on other images.

After Neural Cleanse (Wang et al., 2019): in a backdoored model the attacker's class is much easier to reach than the
others. There the size of the change is minimised; here it is fixed, and what is compared is how sure the model gets.

Which heads and MLPs say something else than in a reference model, on the same clean images.
"""

from __future__ import annotations

import hashlib
import json
import time
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from decompclip import __version__
from decompclip.audit.config import Track, silently
from decompclip.audit.scan.result import HeadStatistics, ScanConfig
from decompclip.decomposition.decomposition import Decomposition
from decompclip.evaluation.metrics import predict
from decompclip.files import atomic_write
from decompclip.models.clip import HookedCLIP
from decompclip.models.gradients import differentiable

EVERY = 3.0
"""Seconds between two writes: more is not lost."""


class Kept:
    """The state of one probe's search.

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
    """A family of changes."""

    name: str

    @abstractmethod
    def start(self, n: int, image: Float[Tensor, "3 h w"]) -> Float[Tensor, "n 3 a b"]:
        """`n` changes from which the search sets out, for images of this size."""

    @property
    @abstractmethod
    def rate(self) -> float:
        """Step of the search."""

    @abstractmethod
    def bounded(self, change: Float[Tensor, "n 3 a b"]) -> Float[Tensor, "n 3 a b"]:
        """The nearest change that the family allows."""

    @abstractmethod
    def apply(
        self, images: Float[Tensor, "batch 3 h w"], change: Float[Tensor, "3 a b"], generator: torch.Generator
    ) -> Float[Tensor, "batch 3 h w"]:
        """Images in [0, 1] with one change, differentiable in it; `generator` draws places."""


@dataclass(frozen=True)
class Everywhere(Probe):
    """A pattern added to the whole image, by at most `bound` a pixel: like Blended, SIG, ISSBA."""

    bound: float
    name: str = "everywhere"

    def start(self, n: int, image: Float[Tensor, "3 h w"]) -> Float[Tensor, "n 3 h w"]:
        return torch.zeros(n, *image.shape, device=image.device)

    @property
    def rate(self) -> float:
        return self.bound / 4

    def bounded(self, change: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
        return change.clamp(-self.bound, self.bound)

    def apply(
        self, images: Float[Tensor, "batch 3 h w"], change: Float[Tensor, "3 h w"], generator: torch.Generator
    ) -> Float[Tensor, "batch 3 h w"]:
        del generator
        return (images + change).clamp(0, 1)


@dataclass(frozen=True)
class Patch(Probe):
    """A square pasted into the image, anywhere or in its centre: like BadNet, Kitty, BadCLIP.

    Attributes:
        side: as a share of the image's shorter side.
        anywhere: a place of its own for each image; else the centre.
    """

    side: float
    anywhere: bool

    @property
    def name(self) -> str:
        return f"patch {'anywhere' if self.anywhere else 'in the centre'}"

    def start(self, n: int, image: Float[Tensor, "3 h w"]) -> Float[Tensor, "n 3 s s"]:
        side = max(1, round(self.side * min(image.shape[-2:])))
        return torch.full((n, 3, side, side), 0.5, device=image.device)

    @property
    def rate(self) -> float:
        return 0.09

    def bounded(self, change: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n 3 s s"]:
        return change.clamp(0, 1)

    def apply(
        self, images: Float[Tensor, "batch 3 h w"], change: Float[Tensor, "3 s s"], generator: torch.Generator
    ) -> Float[Tensor, "batch 3 h w"]:
        free = [whole - change.shape[-1] for whole in images.shape[-2:]]
        if self.anywhere:
            corners = [
                torch.randint(0, room + 1, (len(images),), generator=generator).tolist() for room in free
            ]
        else:
            corners = [[room // 2] * len(images) for room in free]
        height, width, side = *images.shape[-2:], change.shape[-1]
        frames = [
            (left, width - left - side, top, height - top - side) for top, left in zip(*corners, strict=True)
        ]
        pasted = torch.stack([F.pad(change, frame) for frame in frames])
        covered = torch.stack([F.pad(torch.ones_like(change[:1]), frame) for frame in frames])
        return torch.where(covered.bool(), pasted, images)


def probes(bound: float, patch: float) -> tuple[Probe, ...]:
    """The three families that a scan tries."""
    return Everywhere(bound), Patch(patch, anywhere=True), Patch(patch, anywhere=False)


SHARPNESS = 30.0
"""Factor of cosines before the softmax: of the order of trained CLIPs' logit scales, and one for all models."""

GLIMPSE = 8
"""Images of the one step that many classes are told apart by first."""


def losses(
    model: HookedCLIP,
    classifier: Float[Tensor, "class d_embed"],
    pixels: Float[Tensor, "batch 3 h w"],
    wanted: Int[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """Cross-entropy of each image toward the class wanted of it."""
    features = F.normalize(model.encode_image(model.normalize(pixels)).float(), dim=-1)
    return F.cross_entropy(SHARPNESS * features @ classifier.T, wanted, reduction="none")


@differentiable
def search(
    model: HookedCLIP,
    classifier: Float[Tensor, "class d_embed"],
    pixels: Float[Tensor, "image 3 h w"],
    probe: Probe,
    classes: list[int],
    config: ScanConfig,
    track: Track = silently,
    kept: Kept | None = None,
) -> Float[Tensor, "class 3 a b"]:
    """The change for each of `classes`: Adam on the mean loss of a batch a step, the same batches for all of them."""
    kept = kept or Kept()
    generator = torch.Generator().manual_seed(config.seed)
    before = kept.state.get("search", {"step": 0})
    if before["step"]:
        generator.set_state(before["generator"])
    change = before["change"].to(pixels.device) if before["step"] else probe.start(len(classes), pixels[0])
    change.grad = torch.zeros_like(change)
    optimiser = torch.optim.Adam([change], lr=probe.rate)
    if before["step"]:
        optimiser.load_state_dict(before["optimiser"])
    words = f"{model.name}: {probe.name}, {len(classes)} classes"
    steps = range(before["step"], config.steps)
    for step in track(steps, words, len(steps)):
        places = torch.arange(step * config.images, (step + 1) * config.images) % len(pixels)
        batch, seed = pixels[places], int(torch.randint(2**31, (), generator=generator))
        for row, wanted in enumerate(classes):  # one class a pass: memory as of one batch
            own = change[row].clone().requires_grad_(True)
            drawn = torch.Generator().manual_seed(seed)  # the same places for all classes
            targets = torch.full((len(batch),), wanted, device=batch.device)
            loss = losses(model, classifier, probe.apply(batch, own, drawn), targets).mean()
            (change.grad[row],) = torch.autograd.grad(loss, own)  # of the change alone, not of the weights
        optimiser.step()
        change.copy_(probe.bounded(change))
        if kept.due() or (step == config.steps - 1):
            now = {"step": step + 1, "change": change, "generator": generator.get_state()}
            kept.save(search=now | {"optimiser": optimiser.state_dict()})
    return change


@torch.no_grad()
def measure(
    model: HookedCLIP,
    classifier: Float[Tensor, "class d_embed"],
    pixels: Float[Tensor, "image 3 h w"],
    probe: Probe,
    change: Float[Tensor, "3 a b"],
    wanted: int,
    config: ScanConfig,
) -> tuple[Bool[Tensor, " image"], Float[Tensor, " image"]]:
    """On each image whether the change makes it that class, and the loss that is left."""
    generator = torch.Generator().manual_seed(config.seed + 1)
    hits, left = [], []
    for part in pixels.split(config.batch_size):
        changed = probe.apply(part, change, generator)
        features = F.normalize(model.encode_image(model.normalize(changed)).float(), dim=-1)
        hits.append(predict(features, classifier) == wanted)
        targets = torch.full((len(part),), wanted, device=part.device)
        left.append(F.cross_entropy(SHARPNESS * features @ classifier.T, targets, reduction="none"))
    return torch.cat(hits).cpu(), torch.cat(left).double().cpu()


@differentiable
def screened(
    model: HookedCLIP,
    classifier: Float[Tensor, "class d_embed"],
    pixels: Float[Tensor, "image 3 h w"],
    probe: Probe,
    config: ScanConfig,
    track: Track = silently,
    kept: Kept | None = None,
) -> list[int]:
    """The classes to search in full: all, or of more than `most_classes` those that one step gets furthest with.

    The step is by the gradient's sign, as long as the probe allows, on a few images; its loss is taken on as many others.
    """
    n_classes = len(classifier)
    if n_classes <= config.most_classes:
        return list(range(n_classes))
    kept = kept or Kept()
    few, others = pixels[:GLIMPSE], pixels[GLIMPSE : 2 * GLIMPSE]
    left = list(kept.state.get("glimpses", ()))
    rest = range(len(left), n_classes)
    for wanted in track(rest, f"{model.name}: {probe.name}, a glimpse of {n_classes} classes", len(rest)):
        start = probe.start(1, pixels[0])
        own = start[0].clone().requires_grad_(True)
        targets = torch.full((len(few),), wanted, device=few.device)
        drawn = torch.Generator().manual_seed(config.seed)
        loss = losses(model, classifier, probe.apply(few, own, drawn), targets).mean()
        (gradient,) = torch.autograd.grad(loss, own)
        change = probe.bounded(start - 2 * gradient.sign())[0]  # 2 is beyond what any probe allows
        left.append(float(measure(model, classifier, others, probe, change, wanted, config)[1].mean()))
        if kept.due():
            kept.save(glimpses=left)
    return sorted(sorted(range(n_classes), key=left.__getitem__)[: config.most_classes])


def head_statistics(own: Decomposition, other: Decomposition, reference: str) -> HeadStatistics:
    """Compare two models' terms of the same images, component by component.

    Raises:
        ValueError: towers of another shape.
    """
    shapes = [(d.n_layers, d.n_heads, d.d_embed) for d in (own, other)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"expected a reference of the same shape, (layers, heads, width) {shapes[0]}; received {shapes[1]}; "
            "take a checkpoint of the same architecture"
        )
    heads = torch.stack(
        [_unlike(own.heads[:, layer], other.heads[:, layer]) for layer in range(own.n_layers)]
    )
    return HeadStatistics(heads, _unlike(own.mlps, other.mlps), reference)


def _unlike(
    a: Float[Tensor, "batch *component d_embed"], b: Float[Tensor, "batch *component d_embed"]
) -> Float[Tensor, " *component"]:
    a, b = (terms.double() - terms.double().mean(0) for terms in (a, b))
    spread = a.square().sum((0, -1)) + b.square().sum((0, -1))
    return ((a - b).square().sum((0, -1)) / spread.clamp_min(1e-30)).float()
