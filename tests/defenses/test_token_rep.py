"""TokenRep: local triggers are found where they lie and taken out; clean images stay as they are."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from decompclip.attacks.badnet import BadNet
from decompclip.attacks.registry import from_card
from decompclip.data.shapes import Shapes
from decompclip.defenses.agnostic import AgnosticRep
from decompclip.defenses.guard import Guard
from decompclip.defenses.token_rep import TokenRep, fill_patches
from decompclip.evaluation.evaluate import evaluate
from decompclip.models.bundled import card, load_bundled
from decompclip.models.clip import HookedCLIP

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


def test_what_it_cannot_take_is_refused(twin: HookedCLIP, classifier: Tensor) -> None:
    with pytest.raises(ValueError, match="expected text features"):
        TokenRep(twin, classifier[:, :3])
    with pytest.raises(ValueError, match="most of at least 1"):
        TokenRep(twin, classifier, most=0)
    with pytest.raises(ValueError, match="that TokenRep learns from"):
        TokenRep(twin, classifier).fit(Shapes(40, seed=1))
    with pytest.raises(Exception, match="fit"):
        TokenRep(twin, classifier).repair(torch.zeros(1, 3, 48, 48))


def test_a_trigger_without_a_place_is_for_what_comes_then(twin: HookedCLIP, classifier: Tensor) -> None:
    from decompclip.decomposition.components import mlps
    from decompclip.operators.ablation import ZeroAblate

    images = twin.normalize(BadNet()(next(iter(Shapes(20, seed=66).batches(20))).images, range(20)))
    plain = TokenRep(twin, classifier).fit(Shapes(N, seed=61))
    both = TokenRep(twin, classifier, then=ZeroAblate(mlps[-1])).fit(Shapes(N, seed=61))
    calm = ~plain.repair(images).flagged
    unit = AgnosticRep(classifier, budget=0.05).fit(twin.decompose(images_of(200, 67, twin), normalize=True))
    behind = TokenRep(twin, classifier, then=unit).fit(Shapes(N, seed=61)).repair(images).features
    assert torch.allclose(behind[calm], Guard(twin, unit).encode_image(images)[calm], atol=1e-5)
    edited = ZeroAblate(mlps[-1])(twin.decompose(images)).features
    assert torch.allclose(both.repair(images).features[calm], edited[calm], atol=1e-5)
