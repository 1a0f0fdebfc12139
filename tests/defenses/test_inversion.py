"""Trigger inversion: what is planted is found, what it moves sums, and a repair against it forgets it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from decompclip.defenses.clean_finetuning import INVERSION_RECIPE, InversionTuning, Unlearn
from decompclip.defenses.inversion import Inversion, InvertedTrigger, invert_classes, invert_trigger
from decompclip.evaluation.metrics import predict
from decompclip.intervals import Rate
from decompclip.models.clip import HookedCLIP
from decompclip.training.recipes import TrainingStep

from ..training.conftest import RandomPairs, small_clip

NAMES, TARGET = tuple("abcdef"), 5
SHORT: dict[str, Any] = {"steps": 30, "images": 12, "reach": 0.75}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return drawn(64, 3, 8, 8)


@pytest.fixture(scope="module")
def classifier() -> Tensor:
    return F.normalize(drawn(len(NAMES), 12, seed=1) - 0.5, dim=1)


@pytest.fixture(scope="module")
def patch() -> Tensor:
    """What a patch is to look like for the backdoor to open."""
    return F.normalize((drawn(3, 4, 4, seed=2) - 0.5).flatten(), dim=0).reshape(3, 4, 4)


@pytest.fixture(scope="module")
def backdoored(classifier: Tensor, patch: Tensor) -> HookedCLIP:
    """A channel that answers to one pattern alone, and leads from the class token's attention to the target."""
    clip = small_clip()
    net: Any = clip.to_open_clip()
    with torch.no_grad():
        net.visual.conv1.weight[0] = 12 * patch
        net.visual.positional_embedding[:, 0] = 0
        block = net.visual.transformer.resblocks[-1].attn
        block.in_proj_weight[-16] = 0
        block.in_proj_weight[-16, 0] = 1
        block.out_proj.weight[:, 0] = 0
        block.out_proj.weight[0, 0] = 4
        net.visual.proj[0] = 2 * classifier[TARGET]
    looks: dict[str, Any] = {"mean": [0.4] * 3, "std": [0.5] * 3, "size": 8}
    return HookedCLIP.from_open_clip(net, tokenizer=clip.tokenizer, preprocess=looks)


@pytest.fixture(scope="module")
def found(backdoored: HookedCLIP, pixels: Tensor, classifier: Tensor) -> Inversion:
    return invert_classes(backdoored, pixels, classifier, names=NAMES, **SHORT)


def test_a_planted_trigger_is_the_smallest_and_looks_like_it(found: Inversion, patch: Tensor) -> None:
    def likeness(trigger: InvertedTrigger) -> float:
        parts = F.unfold(trigger.pattern[None], 4, stride=4)[0].T
        return F.cosine_similarity(parts, patch.flatten()[None]).max().item()

    first = found.triggers[int(found.scores().argmax())]
    assert first.target == TARGET and first.size == min(t.size for t in found.triggers)
    assert likeness(first) == max(map(likeness, found.triggers)) > 0.8
    frame = found.to_frame()
    assert frame["class"][0] == NAMES[TARGET] and sorted(frame["class"]) == list(NAMES)
    assert (
        "'f'" in repr(found) and first.figure().data and len(first.to_frame()) == len(first.moves.parts) + 1
    )


def test_a_score_is_the_log_of_the_others_median_over_the_size(found: Inversion) -> None:
    def sized(*sizes: float) -> Inversion:
        own = zip(found.triggers[:3], sizes, strict=True)
        return Inversion(tuple(replace(t, pattern=torch.full((3, 8, 8), size)) for t, size in own))

    given, reference = sized(0.01, 0.02, 0.04), sized(0.02, 0.02, 0.04)
    medians = torch.tensor([2 * 4, 1 * 4, 1 * 2]).sqrt()  # of two logarithms, the middle
    torch.testing.assert_close(given.scores(), (medians / torch.tensor([1, 2, 4])).log())
    halved = torch.tensor([1 / 0.5, 0.5**0.5, 0.5**0.5]).log()
    torch.testing.assert_close(given.scores(reference), halved)
    torch.testing.assert_close(given.scores(given), torch.zeros(3))
    assert given.to_frame(reference)["reference size"].tolist()[0] == pytest.approx(0.02)
    two = Inversion(given.triggers[:2])  # none can stand out, and it is shown all the same
    assert two.to_frame()["score"].isna().all() and "0.01" in two._repr_html_()


@torch.no_grad()
def test_moves_of_components_sum_to_the_move_of_the_score(
    found: Inversion, backdoored: HookedCLIP, pixels: Tensor, classifier: Tensor
) -> None:
    """And both are those of the features, by the plain way."""
    held = pixels[torch.randperm(64, generator=torch.Generator().manual_seed(0))][32:]
    for trigger in found.triggers[TARGET], found.triggers[0]:
        torch.testing.assert_close(trigger.moves.values.sum(1), trigger.moves.score, atol=1e-5, rtol=1e-5)
        before, after = (
            backdoored.encode_image(backdoored.normalize(x), normalize=True) for x in (held, trigger(held))
        )
        others = predict(before, classifier) != trigger.target
        rest = [c for c in range(len(NAMES)) if c != trigger.target]
        toward = classifier[trigger.target] - classifier[rest].mean(0)
        torch.testing.assert_close(
            trigger.moves.score[:, 0], ((after - before) @ toward)[others], atol=1e-5, rtol=1e-4
        )
        assert trigger.success == Rate.of(predict(after[others], classifier) == trigger.target)


def test_a_search_is_a_function_of_its_seed_and_leaves_the_model(
    backdoored: HookedCLIP, pixels: Tensor, classifier: Tensor
) -> None:
    before = {name: x.clone() for name, x in backdoored.state_dict().items()}
    required = [p.requires_grad for p in backdoored.parameters()]
    state = torch.random.get_rng_state()
    with torch.no_grad():
        a, b, c = (
            invert_trigger(backdoored, pixels, classifier, 2, steps=4, images=6, seed=s) for s in (0, 0, 1)
        )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(a.pattern, b.pattern) and repr(a) == repr(b) != repr(c) and a.name == "2"
    assert [p.requires_grad for p in backdoored.parameters()] == required
    assert all(torch.equal(x, before[name]) for name, x in backdoored.state_dict().items())
    again = invert_trigger(backdoored, pixels, classifier, 2, pattern=a.pattern)
    assert repr(again) == repr(a) and torch.equal(again.moves.values, a.moves.values)
    stamped = a(pixels)
    assert torch.equal(stamped, (pixels + a.pattern).clamp(0, 1)) and not torch.equal(stamped, pixels)


def test_a_further_reach_takes_a_larger_trigger(
    backdoored: HookedCLIP, pixels: Tensor, classifier: Tensor, found: Inversion
) -> None:
    further: dict[str, Any] = {**SHORT, "reach": 0.97}
    larger = invert_trigger(backdoored, pixels, classifier, TARGET, **further)
    smaller = found.triggers[TARGET]
    assert larger.size > smaller.size and larger.moves.score.mean() > smaller.moves.score.mean()


def test_fine_tuning_against_a_trigger_forgets_it(backdoored: HookedCLIP, found: Inversion) -> None:
    trigger = found.triggers[TARGET]
    recipe = replace(INVERSION_RECIPE, epochs=6, batch_size=16, lr=3e-3)
    images, _ = RandomPairs(seed=3).batch(0, 64)
    tuned = InversionTuning(recipe=recipe, triggers=(trigger,)).apply(backdoored, RandomPairs(64)).model

    @torch.no_grad()
    def moved(model: HookedCLIP) -> float:
        clean, hit = (
            model.encode_image(model.normalize(x), normalize=True) for x in (images, trigger(images))
        )
        return (hit - clean).square().sum(1).mean().item()

    assert moved(tuned) < moved(backdoored) / 2


def test_the_penalty_of_the_model_itself_is_what_its_triggers_move(
    backdoored: HookedCLIP, found: Inversion
) -> None:
    images, texts = RandomPairs().batch(0, 6)
    inputs, tokens = backdoored.normalize(images), backdoored.tokenize(texts)
    net: Any = backdoored.to_open_clip()
    pair = found.triggers[:2]
    seen = TrainingStep(net, inputs, tokens, *net(inputs, tokens)[:2])
    stamped = torch.stack([pair[i % 2](images[i : i + 1])[0] for i in range(6)])
    then, now = (backdoored.encode_image(backdoored.normalize(x), normalize=True) for x in (images, stamped))
    expected = 3 * (now - then).square().sum(1).mean()
    torch.testing.assert_close(Unlearn(backdoored, pair, 3.0)(seen), expected, atol=1e-5, rtol=1e-4)
    others = (Unlearn(backdoored, found.triggers[1:3], 3.0), Unlearn(backdoored, pair, 2.0))
    assert all(repr(Unlearn(backdoored, pair, 3.0)) != repr(other) for other in others)
    assert repr(others[1]) == f"Unlearn(weight=2.0, patterns of sha256 {pair[0].digest}, {pair[1].digest})"


@pytest.mark.usefixtures("ours_alone")
def test_bad_input_is_told(
    backdoored: HookedCLIP, pixels: Tensor, classifier: Tensor, found: Inversion
) -> None:
    def refused(
        match: str, target: int = 0, given: Tensor = pixels, rows: Tensor = classifier, **options: Any
    ) -> None:
        with pytest.raises(ValueError, match=match):
            invert_trigger(backdoored, given, rows, target, **options)

    refused(r"a class in 0\.\.5; received 6", 6)
    refused("at least 32 images .* received 31", given=pixels[:31])
    refused(r"pixels in \[0, 1\]", given=2 * pixels)
    refused(r"size \(8, 8\), .*; received 64 of \(8, 4\)", given=pixels[..., :4])
    refused(r"the model's width 12; received \[6, 5\]", rows=classifier[:, :5])
    own = backdoored.encode_image(backdoored.normalize(pixels)).mean(0).detach()
    refused(
        "the model takes all 32 that measure for it",
        given=pixels[:1].expand(64, -1, -1, -1),
        rows=torch.stack([own, -own]),
    )
    refused("received 0, 16 and 0.9", steps=0)
    refused("received 50, 16 and 1.0", reach=1.0)
    with pytest.raises(ValueError, match="a name for each of 6 classes; received 3"):
        invert_classes(backdoored, pixels, classifier, names=NAMES[:3])
    with pytest.raises(ValueError, match="at least three classes"):
        Inversion(found.triggers[:2]).scores()
    with pytest.raises(ValueError, match="a reference of the same classes"):
        found.scores(Inversion(found.triggers[:3]))
    with pytest.raises(ValueError, match="expected triggers to unlearn"):
        Unlearn(backdoored, (), 1.0)


def test_a_model_without_gradients_at_its_patches_is_refused(pixels: Tensor, classifier: Tensor) -> None:
    clip = small_clip()
    with (
        clip.hooks(fwd_hooks=[("hook_embed", lambda x, hook: x.detach())]),
        pytest.raises(ValueError, match="gradients reach its pixels"),
    ):
        invert_trigger(clip, pixels, classifier, 0)
