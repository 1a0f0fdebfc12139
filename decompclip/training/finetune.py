"""Fine-tuning of a CLIP on image-text pairs: how a backdoor gets in, and how CleanCLIP takes it out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from decompclip.api import check_count
from decompclip.attacks.poisoned import PoisonedPairs
from decompclip.attacks.registry import attacks_of, distinct, poisoned_by
from decompclip.data.feed import ahead, is_pure
from decompclip.data.pairs import ALL, Pairs, PairSteps, keyed
from decompclip.data.pixels import check_pixels, onto
from decompclip.data.processes import Processes, digest_of_pairs, stable_repr
from decompclip.display import Pace, Result, meters
from decompclip.models.bundled import digest as digest_of_weights
from decompclip.models.clip import HookedCLIP, differentiable, plain
from decompclip.training.loop import Monitor, Trainee, train
from decompclip.training.recipes import (
    FineTuning,
    Penalty,
    TrainingStep,
    features_of,
    image_view,
    pair_loss,
    recipe_named,
    text_views,
)

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from accelerate import Accelerator


@dataclass(frozen=True, repr=False)
class FineTuned(Result):
    """A fine-tuned model and its history.

    Attributes:
        model: the fine-tuned copy.
        recipe, seed: as `finetune`.
        history: one entry for each logged step: `step`, `samples`, `loss` (mean since the entry before), `lr`,
            `seconds`, and with a monitor `cacc`, `asr`, `control`.
    """

    model: HookedCLIP
    recipe: FineTuning
    history: tuple[dict[str, float], ...]
    seed: int

    def to_frame(self) -> pd.DataFrame:
        """The history, one row an entry."""
        import pandas as pd

        return pd.DataFrame(list(self.history))

    def figure(self) -> go.Figure:
        """The loss above, the measured rates below."""
        from decompclip.figures.curves import Curve, LinePanel, line_panels
        from decompclip.figures.scatter import PERCENT
        from decompclip.figures.theme import ACCURACY, CONTROL, STYLES, SUCCESS

        def curve(name: str, factor: float = 1) -> Curve:
            entries = [entry for entry in self.history if name in entry]
            return Curve([e["step"] for e in entries], [factor * e[name] for e in entries])

        panels, styles = [LinePanel("", "steps", "loss", {"Loss": curve("loss")})], {"Loss": STYLES[-1]}
        rates = {"cacc": ACCURACY, "asr": SUCCESS, "control": CONTROL}
        measured = {name: style for name, style in rates.items() if any(name in e for e in self.history)}
        if measured:
            curves = {style.short: curve(name, 100) for name, style in measured.items()}
            panels.append(LinePanel("", "steps", "images, %", curves, ends=PERCENT))
            styles |= {style.short: style for style in measured.values()}
        return line_panels(panels, columns=1, shared_y=False, styles=styles)

    def __repr__(self) -> str:
        last = self.history[-1]
        rates = "".join(f", {key} {last[key]:.3f}" for key in ("cacc", "asr", "control") if key in last)
        return f"FineTuned({self.model.name!r}, {int(last['step'])} steps, loss {last['loss']:.3f}{rates})"


@runtime_checkable
class PairSource(Protocol):
    """Image-text pairs; `decompclip.data.pairs`, its streams, and `PoisonedPairs` are such.

    `batch` must be a pure function of its arguments: that makes a resumed run equal to an unbroken one. It is called
    between two steps, in the thread that trains; those of this package that are `pure` are read ahead. A source
    that knows classes also has `take(step, size)`, whose result has `images`, `captions` and `labels`. One that
    knows its length has `__len__`.
    """

    def batch(self, step: int, size: int) -> tuple[Float[Tensor, "batch 3 h w"], list[str]]: ...


@differentiable
def finetune(
    model: HookedCLIP,
    pairs: PairSource,
    recipe: FineTuning | str = "paper",
    *,
    length: int | None = None,
    monitor: Monitor | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 200,
    log_every: int | None = None,
    seed: int = 0,
    synonyms: Mapping[str, Sequence[str]] | None = None,
    penalty: Penalty | None = None,
    accelerator: Accelerator | None = None,
    progress: bool = False,
    log: Callable[[str], None] | None = None,
) -> FineTuned:
    """A fine-tuned copy of `model`, which stays as it is.

    The same model, pairs, recipe and seed give the same weights, bit for bit on one machine; a run that was killed
    goes on from its checkpoint to the same weights.

    Args:
        model: the model to start from.
        pairs: what to train on.
        recipe: how, or the name of one of `RECIPES`.
        length: pairs of an epoch; needed for a stream, which does not know how many it has.
        monitor: CACC and ASR to measure on the way.
        checkpoint: file to resume from and to write to. A kill or a full disk leaves the last one as it was.
        checkpoint_every: steps between two checkpoints.
        log_every: steps between two entries of the history; by default the monitor's, or a tenth of the run.
        seed: of the second views (`loss="cleanclip"`), and of what a tower draws itself (patch dropout).
        synonyms: for the text views; see `text_view`.
        penalty: added to the loss; its repr must show all of it, so that a checkpoint is resumed with that penalty only.
        accelerator: of Hugging Face's accelerate, to spread each batch over its processes: gradients are those of
            the whole batch. Each decodes its own part alone, but of a stream, and where code of your own reads, all. Every
            process reads the checkpoint; the first one writes it. They must agree in the model, the recipe, and what the source
            lists of all pairs (names, captions, classes, poisons); of a stream, and of a source of your own, in the captions
            of the first batch, where a checkpoint is kept. Pictures are not compared.
        progress: show a bar.
        log: gets each entry of the history, as text.

    Raises:
        ValueError: an unknown recipe, pairs of unknown length, too few pairs for a batch, images that are not the
            model's size or not in [0, 1], a batch that the processes do not divide, processes that disagree, a model
            trained with the sigmoid loss, or another run's checkpoint.
        MissingTextError: the model has no text tower.
        FloatingPointError: the loss is not finite.
        FolderInUse: another run writes this checkpoint.
        ProcessGone: another process has ended; on CPUs, as NCCL does not tell.
        TimeoutError: another process is later than their group waits; likewise.
        OSError: a checkpoint cannot be written.
    """
    recipe = recipe_named(recipe) if isinstance(recipe, str) else recipe
    for name, steps in {"checkpoint_every": checkpoint_every, "log_every": log_every}.items():
        if steps is not None:
            check_count(steps, "steps", name)
    plan = recipe.over(_length(pairs) if length is None else length)
    poisoned_by(pairs)  # raises for a damaged list of poisons before the training, not after it
    net = model.to_open_clip().float()
    if getattr(net, "logit_bias", None) is not None:
        raise ValueError(
            f"expected a CLIP with the softmax loss; received {model.name!r}, which has a logit bias of the sigmoid "
            "loss; fine-tune a CLIP"
        )
    group, size = Processes(accelerator), recipe.batch_size
    device = model.device if accelerator is None else accelerator.device
    if size % group.count:
        raise ValueError(f"expected a batch that {group.count} processes divide; received batch_size {size}")
    identity = _agreed(
        group, model, pairs, recipe, plan.samples, seed, penalty, synonyms, keeps=checkpoint is not None
    )
    net = net.to(device)
    with group.going_on():
        wrapped = net if accelerator is None else accelerator.prepare_model(net)
    mine = slice(group.rank * size // group.count, (group.rank + 1) * size // group.count)

    pace, coming, stack = Pace(), None, ExitStack()

    def loss(step: int) -> Tensor:
        nonlocal coming
        if coming is None:  # steps follow each other from the first one on
            steps = range(step, plan.steps)
            made = (_share(pairs, at, recipe, mine, model.image_size, device) for at in steps)
            coming = pace.over(stack.enter_context(closing(ahead(made))) if is_pure(pairs) else made)
        batch = next(coming)
        images, texts, groups = batch.images, batch.texts, batch.groups
        if recipe.loss == "cleanclip":  # draws of the whole batch: the same however many processes share it
            drawn: Any = {"seed": _seed(seed, step), "of": size, "rows": mine}
            images = torch.cat([images, image_view(images, **drawn)])
            texts = [*texts, *text_views(texts, synonyms=synonyms, **drawn)]
        tokens = model.tokenizer(texts).to(device)
        inputs = model.normalize(images)
        with (
            _drawing(_seed(seed, step, group.rank)),
            torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"),
        ):
            image, text, scale = features_of(wrapped(inputs, tokens))
            extra = None if penalty is None else penalty(TrainingStep(net, inputs, tokens, image, text))
        found = pair_loss(
            recipe.loss,
            image,
            text,
            scale,
            groups=None if groups is None else groups.to(device),
            ss_weight=recipe.ss_weight,
            processes=group.count,
        )
        return found if extra is None else found + extra

    logit_scale: Any = net.logit_scale

    @torch.no_grad()
    def clamp() -> None:
        logit_scale.clamp_(0, recipe.logit_scale_max)

    trainee = Trainee(net, model)
    every = log_every or (monitor.every if monitor is not None else None) or max(1, plan.steps // 10)
    net.train()
    with stack, group.going_on(), _bar(plan.steps, pace, shown=progress and group.rank == 0) as update:
        if checkpoint is not None:
            stack.enter_context(group.alone_in(Path(checkpoint).parent, name=Path(checkpoint).name))
        history = train(
            {"clip": net},
            loss,
            plan,
            checkpoint=Path(checkpoint) if checkpoint else None,
            checkpoint_every=checkpoint_every,
            after_step=clamp,
            evaluate=None if monitor is None else lambda: monitor.numbers(trainee),
            evaluate_every=every,
            log=log or (lambda _: None),
            no_decay=spare_gains,
            identity=identity,
            main=group.rank == 0,
            progress=update,
        )
    history = group.in_first(lambda: history)
    tuned = _hooked(net.eval(), model, recipe, seed, penalty)
    attacks = distinct((*attacks_of(model.backdoors, model.name), *poisoned_by(pairs)))
    tuned.backdoors = tuple(attack.to_dict() for attack in attacks)
    return FineTuned(tuned, recipe, tuple(history), seed)


def _length(pairs: PairSource) -> int:
    try:
        return len(pairs)  # pyright: ignore[reportArgumentType]
    except TypeError as error:
        raise ValueError(
            f"expected pairs that know how many they are; received a {type(pairs).__name__} that does not; pass "
            "length=, the pairs of an epoch"
        ) from error


def spare_gains(name: str, parameter: Tensor) -> bool:
    """What open_clip's training gives no weight decay: biases, norms, the logit scale, and all else of one axis."""
    return parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))


@dataclass(frozen=True)
class _Share:
    """This process's part in the batch of one step: images on the device, texts, and groups for the grouped loss."""

    images: Tensor
    texts: list[str]
    groups: Tensor | None


def _share(
    pairs: PairSource,
    step: int,
    recipe: FineTuning,
    mine: slice,
    image_size: tuple[int, int],
    device: torch.device,
) -> _Share:
    labels, take, expected = None, getattr(pairs, "take", None), recipe.batch_size
    if isinstance(pairs, PairSteps):
        if is_pure(pairs):  # others may draw as they read: what one process draws takes the whole batch
            rows, mine, expected = mine, ALL, mine.stop - mine.start
        else:
            rows = ALL
        taken = pairs.take(step, recipe.batch_size, rows=rows, device=device)
        images, texts, labels = taken.images, list(taken.captions), taken.labels
    elif recipe.loss == "grouped" and take is not None:
        taken = take(step, recipe.batch_size)
        images, texts, labels = taken.images, list(taken.captions), taken.labels
    else:
        images, texts = pairs.batch(step, recipe.batch_size)
    if not len(images) == len(texts) == expected:
        raise ValueError(
            f"expected a batch of {expected} pairs; received {len(images)} images and {len(texts)} texts at "
            f"step {step}"
        )
    if images.shape[-2:] != image_size:
        raise ValueError(
            f"expected images of the model's {image_size[0]} x {image_size[1]} pixels; received {images.shape[-2]} x "
            f"{images.shape[-1]}; resize them where they are read"
        )
    check_pixels(images, f" at step {step}")
    if recipe.loss != "grouped":
        labels = None
    elif labels is None:  # by caption; a number of 62 bits tells any two apart
        labels = torch.tensor([keyed(0, "caption", text) >> 2 for text in texts])
    return _Share(onto(plain(images[mine]), device), texts[mine], None if labels is None else labels[mine])


@contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """Let towers draw what they draw, and leave no trace of it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def _agreed(
    group: Processes,
    model: HookedCLIP,
    pairs: PairSource,
    recipe: FineTuning,
    samples: int,
    seed: int,
    penalty: Penalty | None,
    synonyms: Mapping[str, Sequence[str]] | None,
    *,
    keeps: bool,
) -> str:
    """A digest that no two runs share: weights, options, what is listed of all pairs, poisons, and the first pairs, pixel by
    pixel; empty where one process alone trains and nothing is kept.

    Raises:
        ValueError: processes that disagree.
    """
    if not keeps and group.count == 1:
        return ""
    listed = pairs.base if isinstance(pairs, PoisonedPairs) else pairs
    about = [digest_of_pairs(listed), [attack.to_dict() for attack in poisoned_by(pairs)]]
    poisons = pairs.identity if isinstance(pairs, PoisonedPairs) else ""
    reads = keeps or is_pure(pairs)  # others may draw as they read, which a look must not change
    images, texts = pairs.batch(0, recipe.batch_size) if reads else (torch.empty(0), [])
    found = {
        "the recipe, the number of pairs or the seed": json.dumps([asdict(recipe), samples, seed]),
        "the penalty": stable_repr(penalty),
        "the synonyms": stable_repr(synonyms),
        "the model": digest_of_weights(model.state_dict()),
        "the pairs": [about, poisons, texts],  # pixels of a preprocessing that draws need not agree
    }
    if group.count > 1:
        group.check_equal(found)
    if not isinstance(listed, Pairs):  # the record of a stream's poisons grows as it is read
        found["the pairs"] = [about, texts]
    digest = hashlib.sha256(json.dumps([found, repr(penalty)]).encode())
    digest.update(images.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _hooked(
    net: nn.Module, origin: HookedCLIP, recipe: FineTuning, seed: int, penalty: Penalty | None
) -> HookedCLIP:
    about = {"base": origin.name, "recipe": asdict(recipe), "seed": seed}
    about |= {} if penalty is None else {"penalty": repr(penalty)}
    of_files = ("sha256", "files", "files_not_read")
    kept = {key: value for key, value in origin.provenance.items() if key not in of_files}
    tuned = HookedCLIP.from_open_clip(
        net,
        tokenizer=origin.tokenizer,
        preprocess=asdict(origin.preprocess_cfg),
        templates=origin.templates,
        class_names=origin.class_names,
        provenance={**kept, "name": f"{origin.name}, fine-tuned", "fine_tuning": about},
        copy=False,
    )
    tuned.architecture = origin.architecture
    return tuned


@contextmanager
def _bar(steps: int, pace: Pace, *, shown: bool) -> Iterator[Callable[[int, float], None] | None]:
    if not shown:
        yield None
        return
    with meters() as begin:
        update = begin("fine-tuning", steps)
        yield lambda done, loss: update(done, f"fine-tuning, loss {loss:.3f}{pace}")
