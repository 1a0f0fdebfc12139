"""Fine-tuning defenses: one shape, and what each adds to CLIP's loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from decompclip.decomposition.components import heads
from decompclip.defenses.clean_finetuning import (
    CLEAN_RECIPE,
    PAR,
    PAR_RECIPE,
    TUNING_DEFENSES,
    CleanCLIP,
    CleanFineTuning,
    Push,
)
from decompclip.defenses.decomp import DecompRep
from decompclip.models.clip import HookedCLIP
from decompclip.training.finetune import finetune
from decompclip.training.recipes import RECIPES, FineTuning, TrainingStep

from ..training.conftest import RandomPairs, small_clip

SHORT = FineTuning(epochs=1, batch_size=8, lr=1e-3)
CLEANCLIP = replace(SHORT, loss="cleanclip")


@pytest.fixture(scope="module")
def clip() -> HookedCLIP:
    return small_clip()


def weights(model: HookedCLIP) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in model.to_open_clip().state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def seen(clip: HookedCLIP, net: Any) -> TrainingStep:
    images, texts = RandomPairs().batch(0, 6)
    pixels, tokens = clip.normalize(images), clip.tokenize(texts)
    image, text = net(pixels, tokens)[:2]
    return TrainingStep(net, pixels, tokens, image, text)


@pytest.mark.parametrize("name", TUNING_DEFENSES)
def test_one_shape_for_all(clip: HookedCLIP, name: str) -> None:
    before = weights(clip)
    defense = TUNING_DEFENSES[name](recipe=CLEANCLIP if name == "cleanclip" else SHORT)
    tuned = defense.apply(clip, RandomPairs(), seed=3)
    assert tuned.seed == 3 and tuned.history[-1]["step"] == 3
    assert same(weights(clip), before) and not same(weights(tuned.model), before)
    assert same(weights(defense.apply(clip, RandomPairs(), seed=3).model), weights(tuned.model))


def test_the_simple_ones_are_plain_finetuning(clip: HookedCLIP) -> None:
    for defense in (CleanFineTuning(recipe=SHORT), CleanCLIP(recipe=CLEANCLIP)):
        plain = finetune(clip, RandomPairs(), defense.recipe)
        assert same(weights(defense.apply(clip, RandomPairs()).model), weights(plain.model))


def test_decomp_rep_fits_on_top(clip: HookedCLIP) -> None:
    tuned = CleanFineTuning(recipe=SHORT).apply(clip, RandomPairs()).model
    images = tuned.normalize(RandomPairs().batch(0, 12)[0])
    repair = DecompRep(similarity="cosine", threshold="quantile", quantile=0.3, components=heads[-1])
    d = tuned.decompose(images, normalize=True)
    assert repair.fit(d)(d).features.shape == (12, 12)
    with pytest.raises(ValueError, match="other weights"):
        repair(clip.decompose(images, normalize=True))


def test_the_push_against_a_plain_loop(clip: HookedCLIP) -> None:
    push, net = Push.from_model(clip, threshold=1.5, weight=0.5), small_clip().to_open_clip()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05
            )
    now = seen(clip, net)
    start = clip.to_open_clip()
    expected = 0.0
    for mine, theirs in ((now.image, start(now.images)[0]), (now.text, start(None, now.tokens)[1])):
        each = [
            sum((x - y) ** 2 for x, y in zip(*rows, strict=True))
            for rows in zip(mine.tolist(), theirs.tolist(), strict=True)
        ]
        expected -= 0.5 * min(sum(each) / len(each), 1.5)
    assert expected < -1e-3
    assert float(push(now)) == pytest.approx(expected, rel=1e-4)


def test_nothing_is_gained_beyond_the_threshold(clip: HookedCLIP) -> None:
    push = Push.from_model(clip, threshold=0.5)
    at = seen(clip, clip.to_open_clip())
    image, text = (x.detach().clone().requires_grad_() for x in (-at.image, at.text + 0.05))
    push(replace(at, image=image, text=text)).backward()
    assert image.grad is not None and not image.grad.any()  # at 4, the furthest there is
    assert text.grad is not None and text.grad.any()
    assert float(push(at)) == pytest.approx(0, abs=1e-10)  # at the start
    assert all(p.grad is None and not p.requires_grad for p in push.frozen.parameters())


def test_par_goes_further_than_plain_finetuning_and_stops_at_the_threshold(clip: HookedCLIP) -> None:
    images = clip.normalize(RandomPairs(seed=9).batch(0, 16)[0])
    recipe = FineTuning(epochs=8, batch_size=8, lr=3e-3)

    def moved(tuned: HookedCLIP) -> float:
        a, b = (F.normalize(m.encode_image(images), dim=-1) for m in (tuned, clip))
        return float((a - b).square().sum(1).mean())

    plain = moved(CleanFineTuning(recipe=recipe).apply(clip, RandomPairs()).model)
    near = moved(PAR(recipe=recipe, threshold=0.05, weight=5.0).apply(clip, RandomPairs()).model)
    far = moved(PAR(recipe=recipe, threshold=3.0, weight=5.0).apply(clip, RandomPairs()).model)
    assert far > 1.5 * plain
    assert far > 1.5 * near


def test_a_penalty_is_resumed_by_itself_alone(clip: HookedCLIP, tmp_path: Path) -> None:
    whole = PAR(recipe=SHORT).apply(clip, RandomPairs())

    class Killed(Exception):
        pass

    class Dying(RandomPairs):
        def batch(self, step: int, size: int) -> Any:
            if step == 2:
                raise Killed
            return super().batch(step, size)

    options: dict[str, Any] = {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 1}
    with pytest.raises(Killed):
        PAR(recipe=SHORT).apply(clip, Dying(), **options)
    with pytest.raises(ValueError, match="another model or other pairs"):
        PAR(recipe=SHORT, threshold=1.0).apply(clip, RandomPairs(), **options)
    with pytest.raises(ValueError, match="another model or other pairs"):
        finetune(clip, RandomPairs(), SHORT, **options)
    resumed = PAR(recipe=SHORT).apply(clip, RandomPairs(), **options)
    assert same(weights(resumed.model), weights(whole.model))
    assert resumed.model.provenance["fine_tuning"]["penalty"] == "Push(threshold=2.15, weight=0.5)"


def test_the_recipes_are_the_sources() -> None:
    assert CleanCLIP().recipe == "cleanclip" and RECIPES["cleanclip"].loss == "cleanclip"
    assert replace(CLEAN_RECIPE, loss="cleanclip") == RECIPES["cleanclip"]
    assert (PAR_RECIPE.batch_size, PAR_RECIPE.epochs, PAR_RECIPE.weight_decay) == (256, 10, 1e-4)
    assert (PAR().threshold, PAR().weight) == (2.15, 0.5)


def test_what_makes_no_sense_is_refused(clip: HookedCLIP) -> None:
    for make, message in (
        (lambda: CleanCLIP(recipe="paper"), "loss cleanclip for CleanCLIP; received one of 'clip'"),
        (lambda: PAR(recipe=CLEANCLIP), "loss clip or grouped for PAR; received one of 'cleanclip'"),
        (lambda: CleanFineTuning(recipe="cleanclip"), "loss clip or grouped for CleanFineTuning"),
        (lambda: CleanCLIP(recipe="none"), "expected a recipe named one of paper"),
        (lambda: Push.from_model(clip, threshold=5.0), r"threshold in \(0, 4\].*received 5.0"),
        (lambda: Push.from_model(clip, weight=0.0), "weight above 0; received 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
