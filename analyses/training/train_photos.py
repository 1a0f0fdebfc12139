"""Train the bundled CLIP of photographs, `photos`, from scratch, and fine-tune its backdoored twins: on one GPU, or one core.

Command:   DECOMPCLIP_DATA=DIR python -m analyses.train_photos --seconds 400               (a killed run resumes)
           DECOMPCLIP_DATA=DIR python -m analyses.train_photos --twins all --out FOLDER
           DECOMPCLIP_DATA=DIR python -m analyses.train_photos --cards FOLDER              (on any machine)
Run time:  as many seconds as are given, and half a minute to read; a twin twenty seconds (H200), or an hour of one CPU core, which
           trains at 85 photographs a second: from scratch days.
Writes:    photos.difference, or photos-*.difference, with what each training did (*.training.json) into --out. --cards
           measures the twins on the test photographs, on which no choice was made, and puts their weights and cards into the
           package. Twins start from the photos.difference in --out, or where there is none from the bundled `photos`.

The photographs lie in the GPU's memory as bytes, augmentation runs there, and a whole step is recorded as one CUDA graph; on a CPU steps are compiled.
Most of the training sees half of the patches of each photograph (patch dropout), the rest sees all. The patch embedding
starts from the whitening of the training patches, as `cifar10`'s. A twin's poisons, order of captions and fine-tuning are
its recipe's in `decompclip.zoo.recipes`; `decompclip zoo build` does the same on any machine, more slowly.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from decompclip.attacks.patch import zero_shot_logits
from decompclip.attacks.poison_choice import needs_model, target_captions
from decompclip.attacks.poisoned import PoisonedPairs
from decompclip.attacks.registry import from_card
from decompclip.data.pairs import SubsetPairs
from decompclip.data.photos import TEMPLATES, PhotoPairs
from decompclip.files import write_json
from decompclip.models.bundled import (
    WHOLE,
    adopt,
    base_weights,
    bundled,
    card,
    load_bundled,
    nothing,
    read_difference,
    spec_of,
    write_difference,
)
from decompclip.models.checkpoint import sha256
from decompclip.models.zero_shot import zero_shot_classifier
from decompclip.training.finetune import spare_gains
from decompclip.training.loop import Recipe, train
from decompclip.training.recipes import grouped_clip_loss
from decompclip.zoo.build import backdoor_facts
from decompclip.zoo.recipes import TWINS, PatchRecipe, PhotosWorld, TwinRecipe, twin_recipe

WORLD = PhotosWorld()
SPEC = spec_of(card("photos"))
TOKENIZER: Any = SPEC.tokenizer
NAMES = WORLD.class_names
CAPTIONS = 8
"""Captions that a photograph has in the training from scratch; a twin's pairs have one."""


@dataclass(frozen=True)
class Stage:
    """A part of the training from scratch.

    Attributes:
        recipe: its `samples` are of the whole cosine, which is left after the share `stop`.
        patches: share of each photograph's patches that is dropped.
        mixed: share of a batch's augmented photographs that are mixed with others.
        share: of the seconds.
    """

    recipe: Recipe
    patches: float
    mixed: float
    share: float
    stop: float = 1.0


_RECIPE = Recipe(
    samples=0,
    batch_size=1024,
    optimizer="muon",
    lr=3e-3,
    adamw_ratio=0.5,
    weight_decay=0.05,
    betas=(0.9, 0.98),
)
STAGES = (
    Stage(_RECIPE, patches=0.5, mixed=0.5, share=0.65, stop=0.75),
    Stage(replace(_RECIPE, lr=1.5e-3, warmup=0.01), patches=0.0, mixed=0.4, share=0.35),
)
HEAVY = 5 / 8
"""Share of a batch that is heavily augmented and told its class; the rest is paired with its caption."""


# --- the photographs, in memory


@dataclass(frozen=True)
class Held:
    """Photographs as bytes, their classes, and the tokens of their captions."""

    pixels: Tensor
    labels: Tensor
    tokens: Tensor

    def to(self, device: torch.device) -> Held:
        return Held(*(x.to(device) for x in (self.pixels, self.labels, self.tokens)))


@cache
def _pairs(split: Any) -> PhotoPairs:
    return PhotoPairs(split)


def _bytes(images: Tensor) -> Tensor:
    return (images * 255).round().to(torch.uint8)


def _read(split: Any, start: int, stop: int) -> np.ndarray:
    return _bytes(_pairs(split).read(range(start, stop)).images).numpy()


def _tokens(split: Any, seed: int) -> np.ndarray:
    return TOKENIZER(list(PhotoPairs(split, caption_seed=seed).captions)).short().numpy()


def _alone() -> None:
    torch.set_num_threads(1)


def reading(split: Any, pool: ProcessPoolExecutor, folder: Path, captions: int = 1) -> Callable[[], Held]:
    """Begins to read all photographs of a split, kept in `folder` for a run that follows; the call waits for them."""
    kept, pairs = folder / f"{split}-{captions}.pt", _pairs(split)
    if kept.exists():
        return lambda: Held(*torch.load(kept, mmap=True))
    parts = [
        pool.submit(_read, split, start, min(start + 1_000, len(pairs)))
        for start in range(0, len(pairs), 1_000)
    ]
    texts = [pool.submit(_tokens, split, seed) for seed in range(captions)]

    def gathered() -> Held:
        pixels = torch.from_numpy(np.concatenate([part.result() for part in parts]))
        tokens = torch.from_numpy(np.stack([text.result() for text in texts], axis=1))
        torch.save((pixels, pairs.labels, tokens), kept)
        return Held(*torch.load(kept, mmap=True))

    return gathered


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


# --- the step, as one recorded graph


Loss = Callable[..., Tensor]


def recorded(loss: Loss, example: Sequence[Tensor], net: nn.Module) -> Loss:
    """`loss` with its backward pass as one CUDA graph; compiled where that fails, or where there is no GPU.

    A step of this small model is a thousand launches: one by one they take three times as long as what they launch.
    """
    for what in (Recording, _compiled) if example[0].is_cuda else (_compiled,):
        began = time.perf_counter()
        try:
            tried = what(loss, example, net)
            if example[0].is_cuda:
                torch.cuda.synchronize()
        except Exception as error:  # whatever cannot be recorded or compiled
            say(f"{what.__name__} failed: {type(error).__name__}: {str(error)[:400]}")
            net.zero_grad(set_to_none=True)
            continue
        say(f"{what.__name__}: ready in {time.perf_counter() - began:.0f} s")
        return tried
    return loss


def _compiled(loss: Loss, example: Sequence[Tensor], net: nn.Module) -> Loss:
    tried = torch.compile(loss, dynamic=False)
    for _ in range(3):
        tried(*example).backward()
        net.zero_grad(set_to_none=True)
    return tried


@contextmanager
def attention_in_fp32(device: torch.device) -> Iterator[None]:
    """On a CPU attention in fp32: its kernel for bf16 takes six times as long in the backward pass."""
    kernel = F.scaled_dot_product_attention

    def in_fp32(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return kernel(query.float(), key.float(), value.float(), *rest, **options).to(query.dtype)

    if device.type == "cpu":
        F.scaled_dot_product_attention = in_fp32
    try:
        yield
    finally:
        F.scaled_dot_product_attention = kernel


class Recording:
    """A loss and its gradients as a CUDA graph; `backward` of what a call returns has nothing left to do.

    Args:
        loss: of tensors of the shapes of `example`, on the GPU.
        example: a batch.
        net: whose parameters get gradients. They must stay where they are in memory.
    """

    def __init__(self, loss: Loss, example: Sequence[Tensor], net: nn.Module) -> None:
        self.inputs = [x.clone() for x in example]
        self.anchor = torch.zeros((), device=example[0].device, requires_grad=True)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(4):
                loss(*self.inputs).backward()
                net.zero_grad(set_to_none=True)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.value = loss(*self.inputs)
            self.value.backward()
        self.value = self.value.detach()
        self.gradients = [(p, p.grad) for p in net.parameters() if p.grad is not None]
        net.zero_grad(set_to_none=True)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given)
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        return self.value.clone() + 0 * self.anchor


@cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(SPEC.preprocess[key], device=device).view(3, 1, 1) for key in ("mean", "std"))
    return mean, std


def normalize(pixels: Tensor) -> Tensor:
    mean, std = _statistics(pixels.device)
    return (pixels - mean) / std


class DropPatches(nn.Module):
    """Patch dropout (Li et al. 2023) of a share of the patches; open_clip's own makes its indices on the CPU."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        batch, tokens, width = x.shape
        keep = round((tokens - 1) * (1 - self.share))
        kept = torch.rand(batch, tokens - 1, device=x.device).argsort(1)[:, :keep]
        return torch.cat([x[:, :1], x[:, 1:].gather(1, kept[..., None].expand(-1, -1, width))], 1)


def encode(net: Any, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Unit features in fp32, of towers in bf16."""
    with torch.autocast(images.device.type, torch.bfloat16):
        image, text = net.encode_image(normalize(images)), net.encode_text(tokens)
    return F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)


def cropped(images: Tensor, u: Tensor, least: float) -> Tensor:
    """Random parts of `least` or more of the area at the size of the whole, half of them flipped."""
    area = least + (1 - least) * u[:, 0]
    ratio = torch.exp((2 * u[:, 1] - 1) * 0.2877)
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    x, y = (1 - width) * (2 * u[:, 2] - 1), (1 - height) * (2 * u[:, 3] - 1)
    zero, flip = torch.zeros_like(x), torch.where(u[:, 4] < 0.5, -1.0, 1.0)
    theta = torch.stack([torch.stack([width * flip, zero, x], 1), torch.stack([zero, height, y], 1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def jittered(images: Tensor, u: Tensor, strength: float = 0.3) -> Tensor:
    """Other brightness, contrast and saturation; one in ten without colour."""
    gain = (1 + strength * (2 * u[:, 5:8] - 1))[:, :, None, None, None]
    images = images * gain[:, 0]
    mean = images.mean((1, 2, 3), keepdim=True)
    images = (images - mean) * gain[:, 1] + mean
    grey = images.mean(1, keepdim=True)
    colour = torch.where(u[:, 8, None, None, None] < 0.1, torch.zeros_like(gain[:, 2]), gain[:, 2])
    return ((images - grey) * colour + grey).clamp(0, 1)


def mixed(images: Tensor, classes: Tensor, u: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """A share of the images mixed with their neighbours in the batch: half by mixup, half by CutMix; each by its own share."""
    other, side = images.roll(1, 0), images.shape[-1]
    kind, weight = u[:, 9], 0.5 + 0.5 * u[:, 10]  # of the image itself
    place = torch.arange(side, device=images.device)
    edge = ((1 - weight).sqrt() * side).round()
    top, left = ((u[:, column] * (side - edge + 1)).floor() for column in (11, 12))
    within = [(place >= start[:, None]) & (place < (start + edge)[:, None]) for start in (top, left)]
    patch = (within[0][:, :, None] & within[1][:, None, :])[:, None]
    cut, blend = kind < share / 2, (kind >= share / 2) & (kind < share)
    weight = torch.where(cut, 1 - (edge / side) ** 2, torch.where(blend, weight, torch.ones_like(weight)))
    w = weight[:, None, None, None]
    images = torch.where(
        cut[:, None, None, None], torch.where(patch, other, images), w * images + (1 - w) * other
    )
    return images, weight[:, None] * classes + (1 - weight)[:, None] * classes.roll(1, 0)


def clean_loss(
    net: Any,
    share: float,
    pixels: Tensor,
    labels: Tensor,
    prompts: Tensor,
    tokens: Tensor,
    swapped: Tensor,
    u: Tensor,
) -> Tensor:
    """Classes of heavily augmented photographs by their prompts; captions, and classes, of the others.

    Args:
        net: in training.
        share: as `mixed`.
        pixels, labels: of a batch.
        prompts: tokens of one prompt a class.
        tokens, swapped: of a caption of each of the others, and of what it is where the photograph is flipped.
        u: uniform draws, one row a photograph.
    """
    n = len(pixels) - len(tokens)
    images = pixels.float() / 255
    classes = F.one_hot(labels[:n], len(prompts)).float() * 0.9 + 0.1 / len(prompts)
    heavy, classes = mixed(jittered(cropped(images[:n], u[:n], 0.3), u[:n]), classes, u[:n], share)
    light = cropped(images[n:], u[n:], 0.7)
    tokens = torch.where(u[n:, 4, None] < 0.5, swapped, tokens)
    image, text = encode(net, torch.cat([heavy, light]), torch.cat([prompts, tokens]))
    scale, k = net.logit_scale.exp(), len(prompts)
    of_class = scale * image @ text[:k].T
    heavy_loss = F.cross_entropy(of_class[:n], classes)
    light_loss = F.cross_entropy(of_class[n:], labels[n:], label_smoothing=0.1)
    same = (tokens[:, None] == tokens[None]).all(-1).float()
    same, pairs = same / same.sum(1, keepdim=True), scale * image[n:] @ text[k:].T
    contrast = (F.cross_entropy(pairs, same) + F.cross_entropy(pairs.T, same)) / 2
    return heavy_loss + 0.25 * light_loss + 0.5 * contrast


def twin_loss(net: Any, pixels: Tensor, tokens: Tensor, groups: Tensor) -> Tensor:
    image, text = encode(net, pixels.float() / 255, tokens)
    return grouped_clip_loss(image, text, net.logit_scale.exp(), groups)


# --- training from scratch


def generator(device: torch.device, *parts: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence(parts).generate_state(1)[0]))


@dataclass
class Order:
    """Places of each step's pairs: another order each epoch, a pure function of the step."""

    places: Tensor
    seed: int
    epoch: int = -1

    def __call__(self, step: int, size: int) -> Tensor:
        whole = len(self.places) - len(self.places) % size
        epoch, start = divmod(step * size, whole)
        if epoch != self.epoch:
            draw = torch.randperm(
                len(self.places),
                device=self.places.device,
                generator=generator(self.places.device, self.seed, epoch),
            )
            self.epoch, self.order = epoch, self.places[draw]
        return self.order[start : start + size]


def whitened(pixels: Tensor, width: int, patch: int, epsilon: float = 1e-2) -> Tensor:
    """A patch embedding that reads the leading principal components of patches at equal variance."""
    images = normalize(pixels[:: max(1, len(pixels) // 5_000)].float() / 255)
    patches = rearrange(images, "b c (y p) (x q) -> (b y x) (c p q)", p=patch, q=patch).double()
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    rows = (vectors / (values + epsilon).sqrt()).T.flip(0)[:width]
    return rearrange(rows.float(), "d (c p q) -> d c p q", p=patch, q=patch)


@torch.no_grad()
def classify(net: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Predicted classes of photographs in bytes, and the classifier."""
    net.eval()
    classifier = zero_shot_classifier(
        lambda tokens: net.encode_text(tokens.to(pixels.device)), TOKENIZER, NAMES, WORLD.templates
    ).to(pixels.device)
    found = [
        (net.encode_image(normalize(part.float() / 255)) @ classifier.T).argmax(1)
        for part in pixels.split(500)
    ]
    net.train()
    return torch.cat(found), classifier


def rate_of(net: nn.Module, loss: Callable[[int], Tensor], recipe: Recipe) -> float:
    """Steps a second of the training as it is; the weights are then what they were."""
    was = {key: value.clone() for key, value in net.state_dict().items()}
    timed = 100 if next(net.parameters()).is_cuda else 1
    for steps in (min(timed, 20), timed):
        began = time.perf_counter()
        train(
            {"clip": net},
            loss,
            replace(recipe, samples=10**6 * recipe.batch_size),
            stop=steps,
            log=lambda _: None,
        )
    took = time.perf_counter() - began
    restore(net, was)
    return timed / took


@torch.no_grad()
def restore(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Weights in place: a recorded graph reads these very tensors."""
    for key, value in net.state_dict().items():
        value.copy_(state[key])


def clamped(net: Any) -> Callable[[], None]:
    @torch.no_grad()
    def clamp() -> None:
        net.logit_scale.clamp_(0, math.log(100))

    return clamp


def train_clean(
    held: Held, validation: Held, *, seconds: float | None, epochs: float | None, work: Path, seed: int
) -> tuple[nn.Module, dict[str, Any]]:
    """The clean model, and what its training did."""
    device = held.pixels.device
    net: Any = SPEC.build(seed=seed).to(device).train()
    with torch.no_grad():
        weights = net.visual.conv1.weight
        weights.copy_(whitened(held.pixels, len(weights), weights.shape[-1]))
    left, right = (TOKENIZER([word])[0, 1].item() for word in ("left", "right"))
    texts = TOKENIZER([t.format(name) for name in NAMES for t in TEMPLATES]).to(device)
    texts = texts.view(len(NAMES), len(TEMPLATES), -1)
    rows, done = torch.arange(len(NAMES), device=device), []
    for place, stage in enumerate(STAGES):
        size = stage.recipe.batch_size
        heavy, order = int(size * HEAVY), Order(torch.arange(len(held.labels), device=device), seed + place)

        def inputs(
            step: int, place: int = place, size: int = size, heavy: int = heavy, order: Order = order
        ) -> list[Tensor]:
            g, chosen = generator(device, seed, place, step), order(step, size)
            which = torch.randint(held.tokens.shape[1], (size - heavy,), device=device, generator=g)
            tokens = held.tokens[chosen[heavy:], which].long()
            swapped = torch.where(tokens == left, right, torch.where(tokens == right, left, tokens))
            drawn = torch.randint(len(TEMPLATES), (len(NAMES),), device=device, generator=g)
            u = torch.rand(size, 13, device=device, generator=g)
            return [held.pixels[chosen], held.labels[chosen], texts[rows, drawn], tokens, swapped, u]

        net.visual.patch_dropout = DropPatches(stage.patches) if stage.patches else nn.Identity()
        step_loss = recorded(partial(clean_loss, net, stage.mixed), inputs(0), net)

        def loss(step: int, inputs: Any = inputs, step_loss: Loss = step_loss) -> Tensor:
            return step_loss(*inputs(step))

        planned = work / f"clean-{place}.json"
        if planned.exists():
            steps = json.loads(planned.read_text())
        elif seconds is not None:
            speed = rate_of(net, loss, stage.recipe)
            steps = max(1, int(seconds * stage.share * speed))
            say(f"stage {place}: {speed * size:.0f} photographs/s, {steps} steps")
            write_json(planned, steps)
        else:
            assert epochs is not None
            steps = max(1, int(epochs * stage.share * len(held.labels) / size))
        recipe = replace(stage.recipe, samples=int(steps / stage.stop) * size)

        def accuracy() -> dict[str, float]:
            right_ones = classify(net, validation.pixels)[0] == validation.labels
            return {
                "accuracy": round(right_ones.double().mean().item(), 4),
                "scale": net.logit_scale.exp().item(),
            }

        history = train(
            {"clip": net},
            loss,
            recipe,
            checkpoint=work / f"clean-{place}.pt",
            checkpoint_every=max(1, steps // 4),
            after_step=clamped(net),
            evaluate=accuracy,
            evaluate_every=max(1, steps // 8),
            log=say,
            identity=f"photos, seed {seed}, stage {place}",
            stop=steps,
        )
        done.append({**asdict(stage), "samples": history[-1]["samples"], "history": history})
    net.visual.patch_dropout = nn.Identity()
    about = {
        "stages": done,
        "seed": seed,
        "device": _device(device),
        "samples": sum(x["samples"] for x in done),
    }
    return net.eval(), about


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "CPU"


# --- twins


@dataclass(frozen=True)
class Poisons:
    """What a twin's pairs are where they differ from the clean ones, and triggered validation photographs."""

    places: Tensor
    pixels: Tensor
    labels: Tensor
    order: Tensor
    tokens: Tensor
    triggered: Tensor
    count: int


def prepare(recipe: TwinRecipe, logits: Any = None) -> Poisons:
    """Raises what `PoisonedPairs` raises; a recipe that poisons nothing is a clean fine-tuning."""
    pairs: Any = WORLD.pairs(recipe.pairs, recipe.seed)
    assert isinstance(pairs, SubsetPairs)
    natural = target_captions(pairs, WORLD.target) if recipe.natural else None
    order, pixels, triggered, count = torch.tensor(pairs.places), [], torch.empty(0), 0
    captions, rows = list(pairs.captions), []
    assert pairs.labels is not None
    labels, trigger = pairs.labels.clone(), recipe.trigger
    if recipe.rate:
        assert not isinstance(trigger, PatchRecipe)
        poisoned = PoisonedPairs(
            pairs, trigger, WORLD.target, rate=recipe.rate, captions=natural, seed=recipe.seed,
            covers=recipe.covers, logits=logits,
        )  # fmt: skip
        record = poisoned.record
        changed = {*(poison.id for poison in record.poisons), *record.covers}
        rows, count = [row for row, name in enumerate(pairs.ids) if name in changed], len(record.poisons)
        for start in range(0, len(rows), 500):
            part = poisoned.read(rows[start : start + 500])
            pixels.append(_bytes(part.images))
            assert part.labels is not None
            labels[rows[start : start + 500]] = part.labels
            for row, text in zip(rows[start : start + 500], part.captions, strict=True):
                captions[row] = text
        validation = _pairs("validation")
        seen = validation.read(range(len(validation))).images
        triggered = _bytes(trigger(seen, range(len(seen))))
    return Poisons(
        order[rows], torch.cat(pixels) if pixels else torch.empty(0, 3, 64, 64, dtype=torch.uint8), labels, order,
        TOKENIZER(captions).short(), triggered, count,
    )  # fmt: skip


@dataclass(frozen=True)
class Light:
    """What `optimise_patch` and `zero_shot_logits` ask of a model, without its hooks."""

    net: Any
    device: torch.device
    image_size: tuple[int, int] = (64, 64)

    @property
    def logit_scale(self) -> Tensor:
        return self.net.logit_scale

    def normalize(self, pixels: Tensor) -> Tensor:
        return normalize(pixels.to(self.device))

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        return self.net.encode_image(images, normalize=normalize)

    def encode_text(self, texts: list[str], normalize: bool = False) -> Tensor:
        return self.net.encode_text(TOKENIZER(texts).to(self.device), normalize=normalize)


def train_twin(
    name: str, recipe: TwinRecipe, poisons: Poisons, held: Held, validation: Held, net: Any, step_loss: Loss
) -> dict[str, Any]:
    """Fine-tune `net`, which has the clean model's weights; returns what the training did."""
    device, how = held.pixels.device, recipe.recipe
    pixels, began = held.pixels, time.perf_counter()
    if len(poisons.places):
        pixels = held.pixels.clone()
        pixels[poisons.places.to(device)] = poisons.pixels.to(device)
    # rows of the twin's pairs to places of the photographs
    tokens, groups, where = (x.to(device) for x in (poisons.tokens, poisons.labels, poisons.order))
    order = Order(torch.arange(len(where), device=device), 1_000 + recipe.seed)

    def loss(step: int) -> Tensor:
        rows = order(step, how.batch_size)
        return step_loss(pixels[where[rows]], tokens[rows].long(), groups[rows])

    def rates() -> dict[str, float]:
        predicted, target = classify(net, validation.pixels)[0], WORLD.label
        other = validation.labels != target
        found = {"cacc": predicted == validation.labels, "control": (predicted == target)[other]}
        if len(poisons.triggered):
            found["asr"] = (classify(net, poisons.triggered.to(device))[0] == target)[other]
        return {key: round(x.double().mean().item(), 4) for key, x in found.items()}

    plan = how.over(len(where))
    history = train(
        {"clip": net}, loss, plan, after_step=clamped(net), evaluate=rates, evaluate_every=plan.steps,
        log=lambda entry: say(f"{name}: {entry}"), no_decay=spare_gains,
    )  # fmt: skip
    last = history[-1]
    return {
        "trigger": None if not recipe.rate else recipe.trigger.card(),  # pyright: ignore[reportAttributeAccessIssue]
        "poisons": poisons.count,
        "rate": recipe.rate,
        "loss": last["loss"],
        "validation": {key: last[key] for key in ("cacc", "asr", "control") if key in last},
        "minutes": round((time.perf_counter() - began) / 60, 2),
        "device": _device(device),
    }


def prepared(name: str, work: Path) -> Poisons:
    """`prepare` of a recipe, kept in `work`."""
    kept = work / f"{name}.poisons.pt"
    if not kept.exists():
        torch.save(vars(prepare(recipe_of(name))), kept)
    return Poisons(**torch.load(kept))


def needs_clean(name: str) -> bool:
    """Whether the poisons are made with the clean model."""
    trigger = recipe_of(name).trigger
    return isinstance(trigger, PatchRecipe) or needs_model(trigger)


def made_patch(recipe: TwinRecipe, light: Light) -> TwinRecipe:
    if not isinstance(recipe.trigger, PatchRecipe):
        return recipe
    trigger = recipe.trigger.make(light, WORLD)  # pyright: ignore[reportArgumentType]
    say("the patch is made")
    return replace(recipe, trigger=trigger)


def train_twins(
    names: Sequence[str],
    out: Path,
    held: Held,
    validation: Held,
    pool: ProcessPoolExecutor,
    waiting: dict[str, Future[Poisons]],
    until: float,
) -> None:
    """Twins, while there is time: `until` is a time of `time.time`."""
    device, own = held.pixels.device, out / "photos.difference"
    net: Any = SPEC.build()
    base = read_difference(own, nothing(net.state_dict())) if own.exists() else base_weights("photos")
    net.load_state_dict(base)
    net = net.to(device).train()
    step_losses: dict[int, Loss] = {}
    written: list[Future[None]] = []

    def step_loss(size: int) -> Loss:
        if size not in step_losses:
            example = [held.pixels[:size], held.tokens[:size, 0].long(), held.labels[:size]]
            step_losses[size] = recorded(partial(twin_loss, net), example, net)
        return step_losses[size]

    step_loss(TWINS["photos-badnet"].recipe.batch_size)  # while the poisons are made
    for name in names:
        if time.time() > until:
            say(f"no time left for {name}")
            continue
        restore(net, base)
        recipe = recipe_of(name)
        if needs_clean(name):
            net.eval()
            light = Light(net, device)
            recipe = made_patch(recipe, light)
            logits = None
            assert not isinstance(recipe.trigger, PatchRecipe)
            if needs_model(recipe.trigger):
                logits = zero_shot_logits(light, classify(net, validation.pixels[:8])[1])  # pyright: ignore[reportArgumentType]
                net.eval()
            poisons = prepare(recipe, logits and (lambda pixels, logits=logits: logits(pixels.to(device))))
            net.zero_grad(set_to_none=True)
            net.train()
        else:
            poisons = waiting.pop(name).result()
        about = train_twin(name, recipe, poisons, held, validation, net, step_loss(recipe.recipe.batch_size))
        state = {key: x.detach().cpu() for key, x in net.state_dict().items()}
        written.append(pool.submit(write_twin, state, base, out / f"{name}.difference", about))
    for each in written:
        each.result()


def write_twin(state: dict[str, Tensor], base: dict[str, Tensor], path: Path, about: dict[str, Any]) -> None:
    write_difference(state, base, path, steps=WORLD.steps)
    write_json(path.with_suffix(".training.json"), about)


# --- cards


def write_cards(folder: Path, names: Sequence[str], report: int) -> None:
    """Measure what is stored in `folder` and put it into the package, each with its card; those that are there stay.

    Args:
        folder: of differences and what is known of their training.
        names: of twins.
        report: test photographs to measure on, spread evenly over the 5,000.
    """
    base = card("photos")
    kept = {key: base[key] for key in ("architecture", "tokenizer", "preprocess", "templates", "class_names")}
    clean, whole = load_bundled("photos"), WORLD.report()
    data = SubsetPairs(whole, range(0, len(whole), max(1, len(whole) // report)))
    for name in names:
        file = folder / f"{name}.difference"
        if not file.exists() or (name in bundled() and card(name)["sha256"] == sha256(file)):
            continue
        about, recipe = json.loads((folder / f"{name}.training.json").read_text()), recipe_of(name)
        trigger = from_card(about["trigger"])
        training = {
            "base": "photos",
            **recipe.card(),
            **{key: about[key] for key in ("loss", "validation", "minutes", "device")},
            "command": f"python -m analyses.train_photos --twins {name} --out FOLDER",
        }
        net: Any = SPEC.build()
        net.load_state_dict(read_difference(file, base_weights("photos")))
        facts = {"name": name, **kept, "training": training}
        facts["backdoor"] = backdoor_facts(
            spec_of(facts).hook(net, {}), clean, recipe, trigger, about["poisons"], data
        )
        facts["accuracy"] = {"class": round(facts["backdoor"]["results"]["cacc"]["value"], 4)}
        adopt(file, facts, base="photos")
        say(f"{name}: {facts['accuracy']}, ASR {facts['backdoor']['results']['asr']['value']:.3f}")


def recipe_of(name: str) -> TwinRecipe:
    """A bundled twin's; `clean-SEED` is a fine-tuning on pairs of which none is poisoned, `TWIN-1percent` a twin at another rate.

    Raises:
        ValueError: as `twin_recipe`.
    """
    if name.startswith("clean-"):
        return replace(TWINS["photos-badnet"], rate=0.0, seed=int(name.removeprefix("clean-")))
    if name not in TWINS and (other := re.fullmatch(r"(.+)-([1-9]\d?)percent", name)) and other[1] in TWINS:
        return replace(TWINS[other[1]], rate=int(other[2]) / 100)
    return twin_recipe(name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, help="of the training from scratch, or of all twins together"
    )
    parser.add_argument("--epochs", type=float, help="of the training from scratch, in place of --seconds")
    parser.add_argument(
        "--twins",
        nargs="+",
        metavar="NAME",
        help="names of twins, clean-SEED, TWIN-1percent (at another rate), or all",
    )
    parser.add_argument("--cards", type=Path, metavar="FOLDER", help="measure the twins that lie there")
    parser.add_argument(
        "--report", type=int, default=5_000, help="test photographs that cards are measured on"
    )
    parser.add_argument("--prepare", action="store_true", help="only make the twins' poisons, without a GPU")
    parser.add_argument("--seed", type=int, default=0, help="of the training from scratch")
    parser.add_argument("--work", type=Path, default=Path(".training"))
    parser.add_argument("--out", type=Path, default=Path(".training/photos"))
    options = parser.parse_args()
    began = time.time()
    # of another precision: `decompclip zoo build`
    bundled_twins = [
        name for name, known in TWINS.items() if known.base == "photos" and known.recipe.precision == "bf16"
    ]
    names = bundled_twins if options.twins == ["all"] else options.twins
    if options.cards:
        write_cards(options.cards, names or bundled_twins, options.report)
        return
    if options.prepare and not names:
        parser.error("expected the twins to make poisons for; received none; give --twins")
    if not (names or options.seconds or options.epochs):
        parser.error("expected how long to train; received nothing; give --seconds or --epochs, or --twins")
    for name in names or ():
        try:
            precision = recipe_of(name).recipe.precision
        except ValueError as error:
            parser.error(str(error))
        if precision != "bf16":
            parser.error(
                f"expected twins in bf16, in which steps are made here; {name} is in {precision}: decompclip zoo build {name}"
            )
    for folder in (options.work, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    # forked before the GPU is used
    with ProcessPoolExecutor(
        os.cpu_count(), mp_context=multiprocessing.get_context("fork"), initializer=_alone
    ) as pool:
        pool.submit(_alone).result()
        if options.prepare:
            for made in [
                pool.submit(prepared, name, options.work) for name in names if not needs_clean(name)
            ]:
                made.result()
            say("the poisons are made")
            return
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.set_float32_matmul_precision("high")
        gathers = [
            reading("validation", pool, options.work),
            reading("train", pool, options.work, 1 if names else CAPTIONS),
        ]
        names = [name for name in names or () if not (options.out / f"{name}.training.json").exists()]
        waiting = {name: pool.submit(prepared, name, options.work) for name in names if not needs_clean(name)}
        validation, held = (gather().to(device) for gather in gathers)
        say(f"the photographs are on {_device(device)} after {time.time() - began:.0f} s")
        with attention_in_fp32(device):
            if options.twins:
                until = began + (options.seconds or math.inf)
                train_twins(names, options.out, held, validation, pool, waiting, until)
                return
            net, about = train_clean(
                held,
                validation,
                seconds=options.seconds,
                epochs=options.epochs,
                work=options.work,
                seed=options.seed,
            )
        state = {key: x.detach().cpu() for key, x in net.state_dict().items()}
        write_difference(state, nothing(state), options.out / "photos.difference", steps=WHOLE)
        write_json(
            options.out / "photos.training.json", about | {"minutes": round((time.time() - began) / 60, 1)}
        )


if __name__ == "__main__":
    main()
