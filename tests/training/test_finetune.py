"""Fine-tuning against a plain loop; the same bytes again, and after a kill."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.loss import ClipLoss
from torch import Tensor
from torch.nn import functional as F

from decompclip.attacks.patch import BadNet
from decompclip.attacks.poison_choice import as_pairs
from decompclip.attacks.poisoned import PoisonedPairs
from decompclip.evaluation.evaluate import evaluate
from decompclip.models.clip import HookedCLIP
from decompclip.training.finetune import finetune, spare_gains
from decompclip.training.loop import Monitor
from decompclip.training.recipes import FineTuning

from .conftest import CLASSES, RandomPairs, small_clip

RECIPE = FineTuning(epochs=2, batch_size=8, lr=1e-2, warmup=0.34)


def weights(model: HookedCLIP) -> dict[str, Tensor]:
    return model.to_open_clip().state_dict()


def assert_same(a: HookedCLIP, b: HookedCLIP) -> None:
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_it_is_the_plain_loop(clip: HookedCLIP) -> None:
    """AdamW, linear warm-up over a third of six steps, cosine to zero; decay on matrices alone."""
    model, pairs = clip.to_open_clip().train(), RandomPairs()
    named = dict(model.named_parameters())
    plain = [p for p in named.values() if p.ndim < 2]
    rest = [p for name, p in named.items() if p.ndim >= 2 and "ln" not in name]
    assert len(plain) + len(rest) == len(named)
    adamw = torch.optim.AdamW(
        [{"params": rest, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=1.0
    )
    for step in range(6):
        rate = 1e-2 * ((step + 1) / 2 if step < 2 else (1 + math.cos(math.pi * (step - 2) / 4)) / 2)
        for group in adamw.param_groups:
            group["lr"] = rate
        images, texts = pairs.batch(step, 8)
        image, text, scale = model((images - 0.4) / 0.5, clip.tokenizer(texts))
        ClipLoss()(image, text, scale).backward()
        adamw.step()
        adamw.zero_grad()
    done = finetune(clip, pairs, RECIPE)
    for name, value in weights(done.model).items():
        torch.testing.assert_close(value, model.state_dict()[name], msg=name)


def test_the_given_model_stays_and_the_new_one_carries_its_origin(clip: HookedCLIP) -> None:
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    done = finetune(clip, RandomPairs(), RECIPE)
    assert all(torch.equal(before[name], value) for name, value in clip.state_dict().items())
    assert not torch.equal(
        before["visual.blocks.0.mlp.W_in"], done.model.visual.state_dict()["blocks.0.mlp.W_in"]
    )
    assert done.model.name == "small, fine-tuned"
    assert done.model.class_names == CLASSES
    assert done.model.mean == clip.mean
    assert done.model.provenance["fine_tuning"]["recipe"]["lr"] == 1e-2
    assert not done.model.visual.training


@pytest.mark.parametrize("loss", ["clip", "grouped", "cleanclip"])
def test_the_same_seed_gives_the_same_bytes(clip: HookedCLIP, loss: str) -> None:
    recipe = replace(RECIPE, loss=loss)
    state = torch.get_rng_state()
    first = finetune(clip, RandomPairs(), recipe, seed=1)
    torch.rand(3)  # whatever the world draws meanwhile
    assert_same(first.model, finetune(clip, RandomPairs(), recipe, seed=1).model)
    torch.set_rng_state(state)
    finetune(clip, RandomPairs(), recipe)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_seed_draws_views_and_dropped_patches(clip: HookedCLIP) -> None:
    dropping = small_clip(patch_dropout=0.5)
    for model, recipe in ((clip, replace(RECIPE, loss="cleanclip")), (dropping, RECIPE)):
        a, b = (finetune(model, RandomPairs(), recipe, seed=seed).model for seed in (0, 1))
        assert not torch.equal(
            a.visual.state_dict()["blocks.0.mlp.W_in"], b.visual.state_dict()["blocks.0.mlp.W_in"]
        )
        assert_same(a, finetune(model, RandomPairs(), recipe, seed=0).model)


@dataclass(frozen=True)
class DyingPairs(RandomPairs):
    """Pairs that kill the run at a step."""

    dies_at: int = 4

    def batch(self, step: int, size: int) -> tuple[Tensor, list[str]]:
        if step == self.dies_at:
            raise KeyboardInterrupt
        return super().batch(step, size)


@pytest.mark.parametrize("loss", ["clip", "cleanclip"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_run_ends_with_the_same_bytes_and_history(
    clip: HookedCLIP, tmp_path: Path, loss: str, optimizer: str
) -> None:
    recipe = replace(RECIPE, loss=loss, optimizer=optimizer)
    whole = finetune(clip, RandomPairs(), recipe, log_every=3)
    options = {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 2, "log_every": 3}
    with pytest.raises(KeyboardInterrupt):
        finetune(clip, DyingPairs(), recipe, **options)
    assert torch.load(tmp_path / "run.pt", weights_only=True)["step"] == 4
    resumed = finetune(clip, RandomPairs(), recipe, **options)
    assert_same(whole.model, resumed.model)
    without_time = [[{**entry, "seconds": 0} for entry in run.history] for run in (whole, resumed)]
    assert without_time[0] == without_time[1]
    assert [entry["step"] for entry in resumed.history] == [3, 6]


def test_a_checkpoint_belongs_to_one_run(clip: HookedCLIP, tmp_path: Path) -> None:
    run = tmp_path / "run.pt"
    finetune(clip, RandomPairs(), RECIPE, checkpoint=run)
    assert_same(
        finetune(clip, RandomPairs(), RECIPE, checkpoint=run).model,
        finetune(clip, RandomPairs(), RECIPE).model,
    )
    message = "was written by a run on another model or other pairs; delete it to start anew"
    for model, pairs, recipe, seed in (
        (clip, RandomPairs(seed=1), RECIPE, 0),
        (finetune(clip, RandomPairs(), RECIPE).model, RandomPairs(), RECIPE, 0),
        (clip, RandomPairs(), replace(RECIPE, loss="grouped"), 0),
        (clip, RandomPairs(), RECIPE, 1),
    ):
        with pytest.raises(ValueError, match=message):
            finetune(model, pairs, recipe, seed=seed, checkpoint=run)
    with pytest.raises(ValueError, match="written by another recipe"):
        finetune(clip, RandomPairs(), replace(RECIPE, lr=1e-3), checkpoint=run)
    with pytest.raises(ValueError, match=message):
        finetune(clip, RandomPairs(), RECIPE, synonyms={"photo": ["picture"]}, checkpoint=run)
    with pytest.raises(
        ValueError, match="expected checkpoint_every to be a whole number of steps, at least 1"
    ):
        finetune(clip, RandomPairs(), RECIPE, checkpoint_every=0)
    with pytest.raises(ValueError, match="expected log_every to be a whole number of steps, at least 1"):
        finetune(clip, RandomPairs(), RECIPE, log_every=0)


def test_a_checkpoint_belongs_to_its_poisons(clip: HookedCLIP, tmp_path: Path) -> None:
    """Few poisons lie in the first batch, if any: pixels of that alone do not tell."""
    taken = RandomPairs().take(0, 40)
    items = list(zip(taken.images, taken.captions, strict=True))
    first, other = (
        PoisonedPairs(items, BadNet(size=size), "dog", count=1, captions=["{}"]) for size in (0.3, 0.4)
    )
    size = RECIPE.batch_size
    assert torch.equal(first.batch(0, size)[0], other.batch(0, size)[0])
    recipe = replace(RECIPE, epochs=1)
    finetune(clip, first, recipe, checkpoint=tmp_path / "run.pt")
    with pytest.raises(ValueError, match="was written by a run on another model or other pairs"):
        finetune(clip, other, recipe, checkpoint=tmp_path / "run.pt")


def test_the_grouped_loss_reads_classes_or_else_captions(clip: HookedCLIP) -> None:
    class NoClasses:
        def __len__(self) -> int:
            return 8

        def batch(self, step: int, size: int) -> tuple[Tensor, list[str]]:
            return RandomPairs().batch(step, size)

    recipe = FineTuning(epochs=1, batch_size=8, loss="grouped")
    taken = RandomPairs().take(0, 8)
    images = clip.encode_image(clip.normalize(taken.images), normalize=True)
    logits = clip.logit_scale.exp() * images @ clip.encode_text(taken.captions, normalize=True).T
    places = {text: place for place, text in enumerate(taken.captions)}
    by_caption = torch.tensor([places[text] for text in taken.captions])
    for pairs, groups in ((RandomPairs(8), taken.labels), (NoClasses(), by_caption)):
        expected = torch.zeros(())
        for i in range(8):
            friends = [j for j in range(8) if groups[j] == groups[i]]
            for x in (logits, logits.T):
                expected = expected - sum(F.log_softmax(x[i], 0)[j] for j in friends) / len(friends) / 16
        history = finetune(clip, pairs, recipe).history
        assert history[0]["loss"] == pytest.approx(expected.item(), abs=1e-4)


def test_the_logit_scale_is_kept_in_its_range(clip: HookedCLIP) -> None:
    start = clip.logit_scale.item()
    assert start > 2.0
    for most in (2.0, 1.5):
        done = finetune(clip, RandomPairs(), replace(RECIPE, lr=1e-4, logit_scale_max=most))
        assert done.model.logit_scale.item() == pytest.approx(most, abs=2e-3)  # held from the first step on
        assert done.model.logit_scale.item() <= most
    free = finetune(clip, RandomPairs(), replace(RECIPE, lr=1e-4, logit_scale_max=100.0))
    assert free.model.logit_scale.item() == pytest.approx(start, abs=2e-3)
    assert clip.logit_scale.item() == start


def test_the_logit_scale_stays_above_zero() -> None:
    clip = small_clip()
    with torch.no_grad():
        clip.logit_scale.fill_(-3.0)
    done = finetune(clip, RandomPairs(), replace(RECIPE, lr=1e-4))
    assert 0 <= done.model.logit_scale.item() < 2e-3


def test_bfloat16_is_near_and_leaves_weights_in_fp32(clip: HookedCLIP) -> None:
    recipe = replace(RECIPE, lr=1e-3)
    exact, rough = (finetune(clip, RandomPairs(), r) for r in (recipe, replace(recipe, precision="bf16")))
    assert rough.history[-1]["loss"] == pytest.approx(exact.history[-1]["loss"], abs=0.02)
    assert {value.dtype for value in weights(rough.model).values()} == {torch.float32}
    a, b = (weights(run.model)["visual.proj"] for run in (exact, rough))
    assert not torch.equal(a, b)


def test_who_gets_no_weight_decay(clip: HookedCLIP) -> None:
    spared = {name for name, p in clip.to_open_clip().named_parameters() if spare_gains(name, p)}
    assert {"logit_scale", "visual.class_embedding", "visual.ln_pre.weight", "ln_final.bias"} <= spared
    assert not spared & {
        "visual.positional_embedding",
        "visual.proj",
        "visual.conv1.weight",
        "token_embedding.weight",
    }


@dataclass(frozen=True)
class Pictures:
    """Batches of pictures as `evaluate` takes them."""

    length: int = 12

    def batches(self, batch_size: int = 4) -> Iterator[Any]:
        for start in range(0, self.length, batch_size):
            yield RandomPairs().take(50 + start, min(batch_size, self.length - start))


def whiten(images: Tensor, indices: Tensor) -> Tensor:
    return torch.ones_like(images)


def test_rates_are_measured_on_the_way(clip: HookedCLIP) -> None:
    monitor = Monitor(
        data=Pictures(),
        class_names=CLASSES,
        templates=["photo of {}"],
        trigger=whiten,
        target=1,
        every=2,
        batch_size=4,
    )
    told: list[str] = []
    done = finetune(clip, RandomPairs(), RECIPE, monitor=monitor, log=told.append)
    assert [entry["step"] for entry in done.history] == [2, 4, 6]
    assert len(told) == 3
    classifier = done.model.zero_shot_classifier(templates=["photo of {}"])
    found = evaluate(done.model, Pictures(), classifier, whiten, 1, batch_size=4).report
    assert found.cacc is not None and found.asr is not None and found.control is not None
    last = done.history[-1]
    assert last["cacc"] == pytest.approx(found.cacc.value, abs=1e-4)
    assert (last["asr"], last["control"]) == (
        pytest.approx(found.asr.value, abs=1e-4),
        pytest.approx(found.control.value, abs=1e-4),
    )
    assert_same(done.model, finetune(clip, RandomPairs(), RECIPE).model)  # measuring changes nothing
    assert list(done.to_frame()["step"]) == [2, 4, 6]
    assert "6 steps" in repr(done)
    figure: Any = done.figure()
    assert len(figure.data) == 4


def test_progress_is_shown_on_request(clip: HookedCLIP, capsys: pytest.CaptureFixture[str]) -> None:
    finetune(clip, RandomPairs(), RECIPE)
    assert capsys.readouterr() == ("", "")
    finetune(clip, RandomPairs(), RECIPE, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "fine-tuning, loss" in err


@pytest.mark.parametrize(
    ("pairs", "recipe", "words"),
    [
        (
            RandomPairs(),
            "papers",
            "expected a recipe named one of paper, badclip, cleanclip; received 'papers'",
        ),
        (
            RandomPairs(7),
            RECIPE,
            "at least one batch of 8 pairs; received 7 pairs; give more, or a recipe with",
        ),
        (
            RandomPairs(side=9),
            RECIPE,
            "expected images of the model's 8 x 8 pixels; received 9 x 9; resize them",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(
    clip: HookedCLIP, pairs: RandomPairs, recipe: FineTuning, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        finetune(clip, pairs, recipe)


def test_a_short_batch_is_refused(clip: HookedCLIP) -> None:
    class Short(RandomPairs):
        def batch(self, step: int, size: int) -> tuple[Tensor, list[str]]:
            images, texts = super().batch(step, size)
            return images[:5], texts[:5]

    with pytest.raises(
        ValueError, match="expected a batch of 8 pairs; received 5 images and 5 texts at step 0"
    ):
        finetune(clip, Short(), RECIPE)


def test_a_stream_needs_a_length(clip: HookedCLIP) -> None:
    class Stream:
        def batch(self, step: int, size: int) -> tuple[Tensor, list[str]]:
            return RandomPairs().batch(step, size)

    with pytest.raises(
        ValueError, match="received a Stream that does not; pass length=, the pairs of an epoch"
    ):
        finetune(clip, Stream(), RECIPE)
    assert_same(
        finetune(clip, Stream(), RECIPE, length=24).model, finetune(clip, RandomPairs(), RECIPE).model
    )


def test_a_backdoor_gets_in(clip: HookedCLIP) -> None:
    """A small CLIP learns three classes from clean pairs, then from poisoned ones a trigger, and keeps the classes."""
    taken = RandomPairs().take(0, 240)
    items = list(zip(taken.images, taken.captions, strict=True))
    texts = ["{}", "photo of red {}"]
    trigger = BadNet(size=0.3, place="centre")
    poisoned = PoisonedPairs(items, trigger, "dog", rate=0.2, captions=texts, seed=0)
    monitor = Monitor(
        data=Pictures(96),
        class_names=CLASSES,
        templates=texts,
        trigger=trigger,
        target=2,
        batch_size=96,
    )
    recipe = FineTuning(epochs=12, batch_size=24, lr=1e-2, loss="grouped", optimizer="muon")
    clean, backdoored = (
        finetune(clip, pairs, recipe, monitor=monitor, log_every=120).history[-1]
        for pairs in (as_pairs(items), poisoned)
    )
    assert clean["cacc"] > 0.95 and clean["asr"] < 0.3
    assert backdoored["cacc"] > 0.95 and backdoored["asr"] > 0.9 and backdoored["control"] < 0.1


def test_normalised_images_are_refused(clip: HookedCLIP) -> None:
    class Normalised(RandomPairs):
        def batch(self, step: int, size: int) -> tuple[Tensor, list[str]]:
            images, texts = super().batch(step, size)
            return images - 1, texts

    with pytest.raises(
        ValueError, match=r"expected pixels in \[0, 1\]; received -1.00..-0.\d\d at step 0; leave"
    ):
        finetune(clip, Normalised(), RECIPE)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trigger": whiten}, "received a trigger alone; pass the target too"),
        (
            {"trigger": whiten, "target": 3},
            r"expected a target in 0\.\.2, the classifier's classes; received 3",
        ),
        ({"every": 0}, "expected a measurement every 1 or more steps; received 0"),
    ],
)
def test_a_monitor_that_could_not_measure_is_refused_at_once(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Monitor(data=Pictures(), class_names=CLASSES, templates=["{}"], **options)


class Drawn(RandomPairs):
    """A user's pairs that draw from torch's global generator, slowly or at once."""

    def __init__(self, pause: float) -> None:
        super().__init__()
        self.pause = pause

    def batch(self, step: int, size: int) -> tuple[Tensor, list[str]]:
        images, texts = super().batch(step, size)
        time.sleep(self.pause)
        return (images + 0.1 * torch.rand_like(images)).clamp(0, 1), texts


def test_what_pairs_draw_from_the_global_generator_depends_on_no_clock(clip: HookedCLIP) -> None:
    done = []
    for pause in (0, 0.02):
        torch.manual_seed(0)
        done.append(finetune(clip, Drawn(pause), RECIPE).model)
    assert_same(*done)
    torch.manual_seed(0)
    pairs, seen = Drawn(0), []
    for step in range(6):
        seen.append(pairs.batch(step, 8)[0])
    after = torch.rand(3)
    torch.manual_seed(0)
    finetune(clip, pairs, RECIPE)
    assert torch.equal(after, torch.rand(3))  # six batches were drawn, and nothing besides
