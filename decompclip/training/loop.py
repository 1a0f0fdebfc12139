"""The one training loop of the project: checkpoints, the schedule, and measurements on the way."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from jaxtyping import Float
from open_clip_train.scheduler import cosine_lr
from torch import Tensor, nn

from decompclip.data.feed import Labelled
from decompclip.evaluation.evaluate import Evaluation, TriggerFunction, check_attack, evaluate
from decompclip.files import atomic_write
from decompclip.models.clip import HookedCLIP, differentiable
from decompclip.models.torchscript import check_archive
from decompclip.models.zero_shot import Template, zero_shot_classifier


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Take the place of the last one once it is on the disk.

    Raises:
        OSError: it cannot be written; the checkpoint before it is as it was.
    """
    with atomic_write(path) as partial, partial.open("wb") as file:
        torch.save(dict(state), file)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, on the CPU.

    Raises:
        ValueError: the file is broken or no checkpoint of a training.
    """
    try:
        check_archive(path)
        state = torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, UnpicklingError, ValueError) as error:
        raise ValueError(
            f"expected a checkpoint of a training in {path}; received a file that cannot be read "
            f"({(str(error) or type(error).__name__).splitlines()[0]}); delete it to start anew"
        ) from error
    if not (
        isinstance(state, dict) and {"recipe", "modules", "optimizers", "step", "history"} <= state.keys()
    ):
        raise ValueError(
            f"expected a checkpoint of a training in {path}; received another file of torch's; give another name"
        )
    return state


NoDecay = Callable[[str, Tensor], bool]
OptimizerName = Literal["adamw", "muon"]

PERCENT = {"cacc": "CACC", "asr": "ASR", "control": "control", "accuracy": "accuracy"}
"""Entries of a history that are rates, and what they are called."""


def in_words(entry: Mapping[str, float], before: Mapping[str, float] | None = None) -> str:
    """An entry of a history in a line; images a second are those since the entry before, measuring included."""
    parts = [f"step {entry['step']}", f"loss {entry['loss']:.4f}", f"rate {entry['lr']:.2g}"]
    parts += [f"{words} {100 * entry[key]:.1f} %" for key, words in PERCENT.items() if key in entry]
    known = {"step", "samples", "loss", "lr", "seconds", *PERCENT}
    parts += [f"{key} {number:g}" for key, number in entry.items() if key not in known]
    since = before or {"samples": 0, "seconds": 0.0}
    if (seconds := entry["seconds"] - since["seconds"]) > 0:
        parts.append(f"{(entry['samples'] - since['samples']) / seconds:.0f} images/s")
    return ", ".join(parts)


@dataclass(frozen=True)
class Recipe:
    """How to train: everything but the data and the loss. The learning rate falls to zero as a cosine, after a linear warm-up.

    Attributes:
        samples: pairs or images that are seen in all.
        batch_size: of them a step.
        optimizer: `muon` gives the matrices inside transformer blocks to Muon (at `lr`) and all else to AdamW (at
            `lr * adamw_ratio`); `adamw` gives everything to AdamW.
        lr, adamw_ratio, weight_decay, betas: of the optimizers.
        warmup: share of the steps in which the learning rate rises from zero.
        max_grad_norm: gradients are scaled down to this norm; None leaves them.
    """

    samples: int
    batch_size: int = 256
    optimizer: OptimizerName = "adamw"
    lr: float = 1e-3
    adamw_ratio: float = 1.0
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: float = 0.05
    max_grad_norm: float | None = 1.0

    @property
    def steps(self) -> int:
        return self.samples // self.batch_size


def spare_small(name: str, parameter: Tensor) -> bool:
    """Biases, norms, tokens and scales."""
    return parameter.ndim < 2 or "embedding" in name


def build_optimizers(
    modules: Iterable[nn.Module], recipe: Recipe, *, no_decay: NoDecay = spare_small
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Optimizers with their peak learning rates; no weight decay on what `no_decay` names."""
    matrices, others, plain = [], [], []
    for module in modules:
        for name, p in module.named_parameters():
            if not p.requires_grad:
                continue
            if no_decay(name, p):
                plain.append(p)
            elif recipe.optimizer == "muon" and p.ndim == 2 and ".resblocks." in name:
                matrices.append(p)
            else:
                others.append(p)
    adamw_lr = recipe.lr * (recipe.adamw_ratio if recipe.optimizer == "muon" else 1.0)
    groups = [
        {"params": others, "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    on_gpu = all(p.is_cuda for p in (*others, *plain))
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [
        (torch.optim.AdamW(groups, lr=adamw_lr, betas=recipe.betas, fused=on_gpu or None), adamw_lr)
    ]
    if matrices:
        # torch's own goes matrix by matrix: on a GPU its launches take longer than the training step
        kind = StackedMuon if on_gpu else torch.optim.Muon
        muon = kind(matrices, lr=recipe.lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw")
        optimizers.append((muon, recipe.lr))
    return optimizers


class StackedMuon(torch.optim.Muon):
    """`torch.optim.Muon`, with one product for all matrices of one shape; learning rates as `match_rms_adamw` alone."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in alike.items():
                for parameter in parameters:
                    state = self.state[parameter]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(parameter)
                    state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                buffers = torch.stack([self.state[parameter]["momentum_buffer"] for parameter in parameters])
                if group["nesterov"]:
                    gradients = torch.stack([parameter.grad for parameter in parameters])  # pyright: ignore[reportArgumentType]
                    buffers = gradients.lerp(buffers, group["momentum"])
                moves = _orthogonal(buffers, group["ns_coefficients"], group["ns_steps"])
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))
                for parameter, move in zip(parameters, moves, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(move, alpha=-rate)


def _orthogonal(
    stack: Float[Tensor, "matrix out in"], coefficients: tuple[float, float, float], steps: int
) -> Tensor:
    """Newton and Schulz's iteration toward the nearest orthogonal matrix, in bf16, as Muon has it."""
    a, b, c = coefficients
    x = stack.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


@differentiable
def train(
    modules: dict[str, nn.Module],
    loss: Callable[[int], Tensor],
    recipe: Recipe,
    *,
    checkpoint: Path | None = None,
    after_step: Callable[[], None] | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    evaluate_every: int = 100,
    checkpoint_every: int = 200,
    log: Callable[[str], None] = print,
    no_decay: NoDecay = spare_small,
    identity: str = "",
    main: bool = True,
    progress: Callable[[int, float], None] | None = None,
    stop: int | None = None,
) -> list[dict[str, float]]:
    """Minimise `loss(step)` over the parameters of `modules`.

    Args:
        modules: what is trained, by the names of the checkpoint.
        loss: of a step; its data must be a pure function of the step, which makes a resumed run equal to an unbroken one,
            bit for bit.
        recipe: how.
        checkpoint: file to resume from and write to.
        after_step: called after each update, for instance to clamp the logit scale.
        evaluate: numbers added to the log every `evaluate_every` steps and at the end, beside the mean loss
            since the entry before.
        evaluate_every, checkpoint_every: steps between two.
        log: gets each entry of the history, as text.
        no_decay: which parameters get no weight decay, by name.
        identity: what else a run must share with the checkpoint that it goes on from.
        main: whether this process evaluates, logs and writes; False in all but one of several.
        progress: gets the steps done and the last loss, after each.
        stop: end after so many steps of the schedule, for another recipe to go on from there.

    Returns:
        The history: losses, evaluations and seconds of each logged step.

    Raises:
        ValueError: the checkpoint is broken, or another run's.
        FloatingPointError: the loss is not finite.
        OSError: a checkpoint cannot be written; the one before it is intact.
    """
    optimizers = build_optimizers(modules.values(), recipe, no_decay=no_decay)
    schedules = [
        cosine_lr(o, lr, max(1, int(recipe.warmup * recipe.steps)), recipe.steps) for o, lr in optimizers
    ]
    history: list[dict[str, float]] = []
    start, total, count = 0, 0.0, 0
    if checkpoint is not None and checkpoint.exists():
        state = load_checkpoint(checkpoint)
        if state["recipe"] != json.dumps(asdict(recipe)):
            raise ValueError(f"{checkpoint} was written by another recipe; delete it to start anew")
        if state.get("identity", "") != identity:
            raise ValueError(
                f"{checkpoint} was written by a run on another model or other pairs; delete it to start anew"
            )
        for name, module in modules.items():
            module.load_state_dict(state["modules"][name])
        for (optimizer, _), saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start, history = state["step"], state["history"]
        total, count = state.get("since", (0.0, 0))
    parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    began = time.perf_counter()
    before = history[-1]["seconds"] if history else 0.0  # of the runs that this one goes on from
    last = recipe.steps if stop is None else min(stop, recipe.steps)
    # On a GPU the losses are read now and then: to wait for each leaves it idle while the next step is made ready.
    patience = 20 if any(p.is_cuda for p in parameters) else 1
    unread: list[Tensor] = []
    number = math.nan
    for step in range(start, last):
        for schedule in schedules:
            schedule(step)
        value = loss(step)
        value.backward()
        if recipe.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if after_step is not None:
            after_step()
        unread.append(value.detach().clone())
        done = step + 1
        evaluates = done % evaluate_every == 0 or done == last
        writes = checkpoint is not None and (done % checkpoint_every == 0 or done == last)
        if evaluates or writes or step == start or len(unread) == patience:
            for place, number in enumerate(torch.stack(unread).tolist(), done - len(unread)):
                if not math.isfinite(number):
                    raise FloatingPointError(f"loss is {number} at step {place}; lower the learning rate")
                total, count = total + number, count + 1
            unread.clear()
        if progress is not None:
            progress(done, number)
        if not main:
            continue
        if evaluates:
            entry = {"step": done, "samples": done * recipe.batch_size, "loss": round(total / count, 4)}
            entry["lr"] = optimizers[0][0].param_groups[0]["lr"]
            total, count = 0.0, 0
            entry |= evaluate() if evaluate is not None else {}
            entry["seconds"] = round(before + time.perf_counter() - began, 1)
            history.append(entry)
            log(in_words(entry, history[-2] if len(history) > 1 else None))
        if checkpoint is not None and writes:
            state = {
                "recipe": json.dumps(asdict(recipe)),
                "identity": identity,
                "modules": {name: module.state_dict() for name, module in modules.items()},
                "optimizers": [optimizer.state_dict() for optimizer, _ in optimizers],
                "step": done,
                "history": history,
                "since": (total, count),
            }
            save_checkpoint(checkpoint, state)
    return history


@dataclass(frozen=True)
class Trainee:
    """An open_clip model in training, with the tokenizer and normalisation of the `HookedCLIP` that it comes from."""

    net: nn.Module
    origin: HookedCLIP

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    def normalize(self, pixels: Tensor) -> Tensor:
        return self.origin.normalize(pixels)

    def encode_image(self, images: Tensor) -> Tensor:
        parameter = next(self.net.parameters())
        return self.net.encode_image(images.to(parameter.device, parameter.dtype))  # pyright: ignore[reportCallIssue]

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.net.encode_text(tokens.to(next(self.net.parameters()).device))  # pyright: ignore[reportCallIssue]


@dataclass(frozen=True, kw_only=True)
class Monitor:
    """What to measure during training, and how often.

    Attributes:
        data: images in [0, 1] with labels (see `evaluate`); best not those that the result is reported on.
        class_names, templates: of the zero-shot classifier, built anew each time since the text tower moves.
        trigger, target: as `evaluate`; without them only CACC is measured.
        every: steps between two measurements; by default the recipe is cut in ten.
        batch_size: images measured at a time.

    Raises:
        ValueError: a trigger without a target or the reverse, a target that is no class, or no step between
            measurements.
    """

    data: Labelled | Iterable[Any]
    class_names: Sequence[str]
    templates: Sequence[Template]
    trigger: TriggerFunction | None = None
    target: int | None = None
    every: int | None = None
    batch_size: int = 256

    def __post_init__(self) -> None:
        # now, and not when the training has come to its first measurement
        check_attack(len(self.class_names), self.trigger, self.target)
        if self.every is not None and self.every < 1:
            raise ValueError(f"expected a measurement every 1 or more steps; received {self.every}")

    def measure(self, trainee: Trainee) -> Evaluation:
        """`evaluate` of the model as it is now."""
        was = trainee.net.training
        trainee.net.eval()
        try:
            classifier = zero_shot_classifier(
                trainee.encode_text, trainee.origin.tokenizer, self.class_names, self.templates
            )
            return evaluate(
                trainee,
                self.data,
                classifier,
                self.trigger,
                self.target,
                class_names=self.class_names,
                batch_size=self.batch_size,
            )
        finally:
            trainee.net.train(was)

    def numbers(self, trainee: Trainee) -> dict[str, float]:
        """The rates for the history."""
        found = self.measure(trainee).report
        rates = {"cacc": found.cacc, "asr": found.asr, "control": found.control}
        return {name: round(rate.value, 4) for name, rate in rates.items() if rate is not None and rate.total}
