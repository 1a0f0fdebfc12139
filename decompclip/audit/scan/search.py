"""The search: one small change a class that sends images of other classes there, and how well it does on other images.

After Neural Cleanse (Wang et al., 2019): in a backdoored model the attacker's class is much easier to reach than the
others. There the size of the change is minimised; here it is fixed, and what is compared is how sure the model gets.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from decompclip.audit.config import Track, silently
from decompclip.audit.scan.config import ScanConfig
from decompclip.audit.scan.kept import Kept
from decompclip.audit.scan.probes import Probe
from decompclip.evaluation.metrics import predict
from decompclip.models.clip import HookedCLIP
from decompclip.models.gradients import differentiable

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
