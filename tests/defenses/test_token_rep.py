"""TokenRep: local triggers are found where they lie and taken out; clean images stay as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError
from sklearn.metrics import roc_auc_score
from torch import Tensor

import decompclip
from decompclip.attacks.patch import BadNet
from decompclip.attacks.registry import from_card
from decompclip.data.shapes import Shapes
from decompclip.decomposition.components import mlps
from decompclip.defenses.agnostic import AgnosticRep
from decompclip.defenses.detectors.token_rep import TokenRep, fill_patches
from decompclip.defenses.guard import AtRandom, Guard, save_guard
from decompclip.evaluation.evaluate import evaluate
from decompclip.models.bundled import card, load_bundled
from decompclip.models.clip import HookedCLIP
from decompclip.operators.ablation import ZeroAblate

N = 600


@pytest.fixture(scope="module")
def twin() -> HookedCLIP:
    return load_bundled("shapes-badnet")


@pytest.fixture(scope="module")
def classifier(twin: HookedCLIP) -> Tensor:
    return twin.zero_shot_classifier(twin.class_names, card("shapes")["templates"]["shape"])


@pytest.fixture(scope="module")
def fitted(twin: HookedCLIP, classifier: Tensor) -> TokenRep:
    return TokenRep(twin, classifier).fit(Shapes(N, seed=61))


def test_the_trigger_goes_and_the_class_comes_back(
    twin: HookedCLIP, classifier: Tensor, fitted: TokenRep
) -> None:
    trigger, target = from_card(card("shapes-badnet")["backdoor"]["trigger"]), twin.class_names.index("star")
    data = Shapes(300, seed=62)
    before = evaluate(twin, data, classifier, trigger, target, class_names=twin.class_names)
    after = evaluate(fitted, data, classifier, trigger, target, class_names=twin.class_names)
    assert before.asr is not None and after.asr is not None
    assert before.asr.value > 0.9
    assert after.asr.value <= 0.05
    assert after.cacc.value >= before.cacc.value - 0.015
    assert after.triggered_predictions is not None
    others = after.labels != target
    own = (after.triggered_predictions == after.labels)[others].float().mean()
    assert own >= 0.9 * before.cacc.value


def answers_of(model: HookedCLIP, classifier: Tensor, pixels: Tensor) -> Tensor:
    return (model.encode_image(model.normalize(pixels)) @ classifier.T).argmax(1)


def images_of(n: int, seed: int, model: HookedCLIP) -> Tensor:
    return model.normalize(next(iter(Shapes(n, seed=seed).batches(n))).images)


@torch.no_grad()
def test_the_strongest_patch_lies_on_the_trigger(
    twin: HookedCLIP, classifier: Tensor, fitted: TokenRep
) -> None:
    trigger = from_card(card("shapes-badnet")["backdoor"]["trigger"])
    pixels = next(iter(Shapes(100, seed=63).batches(100))).images
    triggered = trigger(pixels, range(100))
    clean, found = fitted.repair(twin.normalize(pixels)), fitted.repair(twin.normalize(triggered))
    sent = answers_of(twin, classifier, triggered) == twin.class_names.index("star")
    scores = torch.cat([clean.scores, found.scores[sent]])
    assert roc_auc_score([0] * 100 + [1] * int(sent.sum()), scores.numpy()) >= 0.98
    side, patch = twin.image_size[0], twin.cfg.patch_size[0]
    covered = (
        torch.nn.functional.max_pool2d(trigger.mask(side, side, range(100)).float()[:, None], patch).flatten(
            1
        )
        > 0
    )
    first = found.filled & covered
    assert first[found.flagged].any(1).float().mean() >= 0.95
    assert torch.equal(fitted.score(triggered), found.scores)


def test_images_that_are_not_flagged_are_the_models_own(twin: HookedCLIP, fitted: TokenRep) -> None:
    images = twin.normalize(next(iter(Shapes(200, seed=64).batches(200))).images)
    found = fitted.repair(images)
    assert 0 <= found.flagged.float().mean() <= 0.05
    assert found.passes < 1.3
    own = twin.encode_image(images)
    assert torch.allclose(found.features[~found.flagged], own[~found.flagged], atol=1e-5)
    assert (
        not torch.allclose(found.features[found.flagged], own[found.flagged], atol=1e-3)
        or not found.flagged.any()
    )


def test_a_filled_patch_cannot_be_seen(twin: HookedCLIP) -> None:
    images = twin.normalize(next(iter(Shapes(2, seed=65).batches(2))).images)
    size = twin.cfg.patch_size[0]
    changed = images.clone()
    changed[:, :, :size, :size] = 3.0
    filled = torch.zeros(2, (images.shape[-1] // size) ** 2, dtype=torch.bool)
    filled[:, 0] = True
    with twin.hooks(fwd_hooks=fill_patches(twin.visual, filled)):
        assert torch.allclose(twin.encode_image(images), twin.encode_image(changed), atol=1e-5)
    assert not torch.allclose(twin.encode_image(images), twin.encode_image(changed), atol=1e-3)


def test_shapes_are_checked_in_tests(twin: HookedCLIP) -> None:
    with pytest.raises(TypeCheckError):
        fill_patches(twin.visual, torch.zeros(2, 3, 4, dtype=torch.bool))


def test_what_it_cannot_take_is_refused(twin: HookedCLIP, classifier: Tensor) -> None:
    with pytest.raises(ValueError, match="expected text features"):
        TokenRep(twin, classifier[:, :3])
    with pytest.raises(ValueError, match="most of at least 1"):
        TokenRep(twin, classifier, most=0)
    with pytest.raises(ValueError, match="that TokenRep learns from"):
        TokenRep(twin, classifier).fit(Shapes(40, seed=1))
    with pytest.raises(Exception, match="fit"):
        TokenRep(twin, classifier).repair(torch.zeros(1, 3, 48, 48))


@torch.no_grad()
def test_a_guard_edits_what_filling_has_not_settled(
    twin: HookedCLIP, classifier: Tensor, fitted: TokenRep
) -> None:
    trigger = decompclip.backdoor("shapes-badnet").trigger
    pixels = next(iter(Shapes(60, seed=66).batches(60))).images
    images = twin.normalize(torch.cat([trigger(pixels[:40], range(40)), pixels[40:]]))
    edit = ZeroAblate(mlps[-1])
    once = TokenRep(twin, classifier, most=1).fit(next(iter(Shapes(200, seed=64).batches(200))).images)
    for fill in (fitted, once):
        found = fill.repair(images)
        assert torch.equal(Guard(twin, fill=fill).encode_image(images), found.features)
        assert torch.allclose(Guard(twin, fill=fill).check(images).features, found.features, atol=1e-5)
        expected = torch.where(found.settled[:, None], found.features, edit(twin.decompose(images)).features)
        guard = Guard(twin, edit, fill=fill)
        assert torch.allclose(guard.encode_image(images), expected, atol=1e-5)
        assert torch.allclose(guard.check(images).features, expected, atol=1e-5)
        assert found.settled.any() and not found.settled[~found.flagged].any()
    assert (found.flagged & ~found.settled).any()  # a second patch stands out where one may be filled
    assert "fill=TokenRep" in repr(guard)
    with pytest.raises(ValueError, match="TokenRep of this model"):
        Guard(load_bundled("shapes-badnet"), fill=fitted)


def test_the_answers_that_filling_gave_back_stay() -> None:
    twin, attack = load_bundled("shapes-badnet"), decompclip.backdoor("shapes-badnet")
    classifier, batch = twin.zero_shot_classifier(), next(iter(Shapes(150, seed=71).batches(150)))
    others = batch.labels != attack.target_index
    images = twin.normalize(attack.trigger(batch.images, range(150))[others])
    token = TokenRep(twin, classifier).fit(next(iter(Shapes(200, seed=64).batches(200))).images)
    agnostic = AgnosticRep(classifier, budget=0.05).fit(
        twin.decompose(images_of(200, 68, twin), normalize=True)
    )
    settled, answers = token.repair(images).settled, {}
    for name, guard in {
        "token": Guard(twin, fill=token),
        "agnostic": Guard(twin, agnostic),
        "both": Guard(twin, agnostic, fill=token),
    }.items():
        answers[name] = (guard.encode_image(images) @ classifier.T).argmax(1)
    assert torch.equal(answers["both"][settled], answers["token"][settled])
    assert torch.equal(answers["both"][~settled], answers["agnostic"][~settled])
    right = {name: (found == batch.labels[others]).double().mean() for name, found in answers.items()}
    assert settled.double().mean() > 0.8 and right["both"] > right["agnostic"] + 0.3


def test_it_is_written_and_read_with_its_model(
    twin: HookedCLIP, classifier: Tensor, fitted: TokenRep, tmp_path: Path
) -> None:
    images = twin.normalize(BadNet()(next(iter(Shapes(30, seed=67).batches(30))).images, range(30)))
    assert fitted.repair(images).flagged.any()
    read = TokenRep.load(fitted.save(tmp_path / "token.safetensors"), twin)
    assert repr(read) == repr(fitted) and torch.equal(read.encode_image(images), fitted.encode_image(images))
    with pytest.raises(ValueError, match="expected the model that the TokenRep"):
        TokenRep.load(tmp_path / "token.safetensors", load_bundled("shapes"))
    terms = twin.decompose(images_of(200, 68, twin), normalize=True)
    both = Guard(twin, AgnosticRep(classifier, budget=0.05).fit(terms), fill=fitted)
    opened = decompclip.load(save_guard(both, tmp_path / "both"))
    assert torch.equal(opened.encode_image(images), both.encode_image(images))
    assert {path.name for path in (tmp_path / "both").iterdir()} == {
        *("guard.json", "model", "AgnosticRep.safetensors", "TokenRep.safetensors")
    }


def test_the_control_fills_as_many_patches_elsewhere(twin: HookedCLIP, fitted: TokenRep) -> None:
    control = AtRandom(Guard(twin, fill=fitted), seed=3)
    filled = fitted.repair(images_of(40, 69, twin)).filled | (torch.arange(36) < 2)
    drawn, again = (AtRandom(control.guard, seed=3)._elsewhere(filled) for _ in range(2))
    assert torch.equal(drawn.sum(1), filled.sum(1)) and not torch.equal(drawn, filled)
    assert torch.equal(drawn, again)
    trigger = from_card(card("shapes-badnet")["backdoor"]["trigger"])
    images = twin.normalize(trigger(next(iter(Shapes(100, seed=70).batches(100))).images, range(100)))
    star = twin.class_names.index("star")
    sent = [
        ((model.encode_image(images) @ fitted.classifier.T).argmax(1) == star).float().mean()
        for model in (fitted, control)
    ]
    assert sent[0] < 0.3 and sent[1] > 0.7
