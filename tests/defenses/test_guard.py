"""Guard: the defense's own features, in the scale of the plain ones, where a model is expected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.exceptions import NotFittedError
from torch import Tensor
from torch.nn import functional as F

from decompclip.decomposition.components import heads, mlps
from decompclip.decomposition.moments import Moments
from decompclip.defenses.agnostic import AgnosticRep
from decompclip.defenses.decomp import DecompDet, DecompRep
from decompclip.defenses.guard import AtRandom, Guard, load, save_guard
from decompclip.models.clip import HookedCLIP
from decompclip.models.zero_shot import zero_shot_classifier
from decompclip.operators.ablation import MeanAblate, ZeroAblate
from decompclip.operators.intervention import Composition

from ..training.conftest import CLASSES, SIDE, small_clip

RULE: Any = {"similarity": "cosine", "threshold": "quantile", "quantile": 0.3}


@pytest.fixture(scope="module")
def clip() -> HookedCLIP:
    return small_clip().double()


def drawn(n: int, seed: int) -> Tensor:
    return torch.randn(n, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("convention", ["centred", "paper"])
@pytest.mark.parametrize("normalized", [True, False])
def test_features_are_the_defenses_in_the_scale_of_the_plain_ones(
    clip: HookedCLIP, convention: Any, normalized: bool
) -> None:
    clean = clip.decompose(drawn(30, 1), convention=convention, normalize=normalized)
    repairs = (
        DecompRep(**RULE, convention=convention).fit(clean),
        MeanAblate(mlps[-1], Moments.of(clean)) | DecompRep(**RULE, convention=convention).fit(clean),
    )
    images = drawn(9, 2)
    plain = clip.encode_image(images)
    for repair in repairs:
        expected = repair(clip.decompose(images, convention=convention, normalize=normalized)).features
        assert (expected - clip.decompose(images, normalize=normalized).features).abs().max() > 1e-3
        guard = Guard(clip, repair)
        assert (guard.convention, guard.normalized) == (convention, normalized)
        scale = plain.norm(dim=1, keepdim=True) if normalized else 1
        torch.testing.assert_close(guard.encode_image(images), expected * scale, rtol=0, atol=1e-12)
        unit = guard.encode_image(images, normalize=True)
        torch.testing.assert_close(unit, F.normalize(expected, dim=1), rtol=0, atol=1e-12)


def test_what_is_not_repaired_is_the_models_own(clip: HookedCLIP) -> None:
    images = drawn(4, 2)
    none = Guard(clip, Composition()).encode_image(images)
    torch.testing.assert_close(none, clip.encode_image(images), rtol=0, atol=1e-14)
    repair = DecompRep(similarity="cosine", epsilon=-1.0).fit(clip.decompose(drawn(30, 1), normalize=True))
    torch.testing.assert_close(
        Guard(clip, repair).encode_image(images), clip.encode_image(images), rtol=0, atol=1e-12
    )


def test_an_image_is_repaired_alike_in_any_batch(clip: HookedCLIP) -> None:
    guard = Guard(clip, DecompRep(**RULE).fit(clip.decompose(drawn(30, 1), normalize=True)))
    images = drawn(6, 2)
    whole = guard.encode_image(images)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(guard.encode_image(images[order]), whole[order], rtol=0, atol=1e-12)
    one_by_one = torch.cat([guard.encode_image(image[None]) for image in images])
    torch.testing.assert_close(one_by_one, whole, rtol=0, atol=1e-12)


def test_check_says_which_images_the_detector_rejects(clip: HookedCLIP) -> None:
    clean, images = clip.decompose(drawn(30, 1), normalize=True), drawn(12, 2)
    repair, detector = DecompRep(**RULE).fit(clean), DecompDet(**RULE, zeta=0.0).fit(clean)
    d = clip.decompose(images, normalize=True)
    found = Guard(clip, repair, reject=detector).check(images)
    assert found.scores is not None
    torch.testing.assert_close(found.scores, detector.score(d).to(found.scores))
    assert torch.equal(found.rejected, detector.predict(d))
    assert 0 < int(found.rejected.sum()) < 12
    assert repr(found) == f"GuardResult(12 images, {int(found.rejected.sum())} rejected)"
    frame = found.to_frame()
    assert frame["rejected"].tolist() == found.rejected.tolist()
    assert frame["score"].tolist() == found.scores.tolist()
    assert "12 images" in found._repr_html_() and found._repr_html_().count("<tr>") == 12
    torch.testing.assert_close(found.features, Guard(clip, repair).encode_image(images))
    alone = Guard(clip, reject=detector).check(images)
    assert torch.equal(alone.rejected, found.rejected)
    torch.testing.assert_close(alone.features, clip.encode_image(images), rtol=0, atol=1e-12)
    quiet = Guard(clip, repair).check(images)
    assert quiet.scores is None and not quiet.rejected.any()


def test_zero_shot_code_runs_unchanged(clip: HookedCLIP) -> None:
    """As open_clip's readme has it, with the guard in the model's place."""
    guard: Any = Guard(clip, ZeroAblate(heads[-1]))
    assert (guard.convention, guard.normalized) == ("centred", True)  # which such an edit does not know
    images, tokens = drawn(4, 2), guard.tokenizer(["cat", "cup"])
    assert torch.equal(guard.encode_text(tokens), clip.encode_text(tokens))
    assert torch.equal(guard.logit_scale, clip.logit_scale)
    assert guard.preprocess is clip.preprocess and guard.device == clip.device
    image, text, scale = guard(images, tokens)
    torch.testing.assert_close(image, guard.encode_image(images, normalize=True))
    torch.testing.assert_close(text, clip.encode_text(tokens, normalize=True))
    torch.testing.assert_close(scale, clip.logit_scale.exp())
    classifier = zero_shot_classifier(guard.encode_text, guard.tokenizer, CLASSES, ["a {}"])
    torch.testing.assert_close(classifier, clip.zero_shot_classifier(CLASSES, ["a {}"]))
    with pytest.raises(
        AttributeError, match="a Guard has no 'decompose'; what it passes through: .*guard.model's"
    ):
        guard.decompose


def test_half_precision_gives_the_models_dtype() -> None:
    clip = small_clip().bfloat16()
    images = drawn(3, 1).bfloat16()
    assert Guard(clip, ZeroAblate(mlps[-1])).encode_image(images).dtype == torch.bfloat16


def test_a_saved_guard_is_what_loading_its_folder_gives(tmp_path: Path) -> None:
    model = load("shapes")
    images = model.normalize(torch.rand(30, 3, *model.image_size, generator=torch.Generator().manual_seed(1)))
    repair = DecompRep(**RULE).fit(model.decompose(images, normalize=True))
    guard = Guard(model, repair)
    save_guard(guard, tmp_path / "a")
    again = load(tmp_path / "a")
    assert isinstance(again, Guard) and isinstance(load(str(tmp_path / "a")), Guard)
    torch.testing.assert_close(again.encode_image(images[:4]), guard.encode_image(images[:4]))
    assert not torch.allclose(again.encode_image(images[:4]), model.encode_image(images[:4]))
    assert not isinstance(load(model.to_open_clip(), tokenizer=model.tokenizer), Guard)


def drawn_for(model: HookedCLIP) -> Tensor:
    return torch.randn(30, 3, *model.image_size, generator=torch.Generator().manual_seed(1))


def test_a_guard_is_written_again_and_again_and_not_where_it_repairs_by_other_things(tmp_path: Path) -> None:
    model = load("shapes")
    terms = model.decompose(drawn_for(model), normalize=True)
    out = tmp_path / "new" / "folder"
    for repair in (DecompRep(**RULE).fit(terms), DecompRep(similarity="cosine", epsilon=0.5).fit(terms)):
        save_guard(Guard(model, repair), out)
        again: Any = load(name=out)
        assert torch.equal(again.defense.selector_.thresholds_, repair.selector_.thresholds_)
    with pytest.raises(TypeError, match="positional argument"):
        load(out, "random")  # pyright: ignore[reportCallIssue]
    detector = DecompDet(**RULE).fit(terms)
    for guard in (Guard(model, repair, reject=detector), Guard(model, ZeroAblate(mlps[-1]))):
        with pytest.raises(ValueError, match="repairs by AgnosticRep, DecompRep or TokenRep alone; received"):
            save_guard(guard, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_guard_s_file_is_not_taken_at_its_word(tmp_path: Path) -> None:
    model = load("shapes")
    terms = model.decompose(drawn_for(model), normalize=True)
    file = save_guard(Guard(model, DecompRep(**RULE).fit(terms)), tmp_path / "a") / "guard.json"
    about = json.loads(file.read_text(encoding="utf-8"))
    digest = about["repairs"]["DecompRep"]
    for changes in (
        {"format": "decompclip.guard/0"},
        {"repairs": []},
        {"repairs": {}},
        {"repairs": {"DecompRep": digest, "Other": digest}},
    ):
        file.write_text(json.dumps(about | changes), encoding="utf-8")
        with pytest.raises(ValueError, match="expected a guard of format .* with repairs among DecompRep, "):
            load(tmp_path / "a")
    for repairs in ({"DecompRep": "0" * 64}, {"AgnosticRep": digest}):
        file.write_text(json.dumps(about | {"repairs": repairs}), encoding="utf-8")
        with pytest.raises(ValueError, match="is missing, or was changed since; repair the model again"):
            load(tmp_path / "a")


@pytest.mark.parametrize("convention", ["centred", "paper"])
def test_the_control_of_a_guard_replaces_as_many_heads_at_random(clip: HookedCLIP, convention: Any) -> None:
    options: dict[str, Any] = {"convention": convention, "normalize": True}
    clean, images = clip.decompose(drawn(30, 1), **options), drawn(12, 2)
    d, state = clip.decompose(images, **options), torch.get_rng_state()

    def control(seed: int = 3, **rule: Any) -> Tensor:
        repair = DecompRep(similarity="cosine", convention=convention, **rule).fit(clean)
        return AtRandom(Guard(clip, repair), seed=seed).encode_image(images)

    torch.testing.assert_close(control(epsilon=-1.0), d.features)  # no head is flagged, and none replaced
    every = MeanAblate(heads[-1], Moments.of(clean))(d).features
    torch.testing.assert_close(control(epsilon=1.0), every)  # all that are judged
    some = control(threshold="quantile", quantile=0.3)
    assert torch.equal(some, control(threshold="quantile", quantile=0.3))
    assert not torch.allclose(some, control(4, threshold="quantile", quantile=0.3))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_control_of_a_guard_takes_the_answer_out_of_as_many_images(clip: HookedCLIP) -> None:
    clean, images = clip.decompose(drawn(60, 1), normalize=True), drawn(40, 2)
    means = torch.stack([clean.features[k::4].mean(0) for k in range(4)])
    repair = AgnosticRep(F.normalize(means - means.mean(0), dim=1), budget=0.3).fit(clean)
    own = clip.decompose(images, normalize=True)
    flags, without = repair.flags(own), repair.without_answer(own.features)
    found = [AtRandom(Guard(clip, repair), seed=seed).encode_image(images) for seed in (3, 3, 4)]
    touched = [(features - own.features).norm(dim=1) > 1e-9 for features in found]
    assert 0 < flags.sum() == touched[0].sum() == touched[2].sum() < 40
    torch.testing.assert_close(found[0], torch.where(touched[0][:, None], without, own.features))
    assert torch.equal(touched[0], touched[1]) and not torch.equal(touched[0], touched[2])
    assert not torch.equal(touched[0], flags)


def test_bad_input_is_refused(clip: HookedCLIP) -> None:
    unit, plain = (clip.decompose(drawn(30, 1), normalize=flag) for flag in (True, False))
    repair, detector = DecompRep(**RULE).fit(unit), DecompDet(**RULE).fit(plain)
    with pytest.raises(
        ValueError,
        match="a defense, a TokenRep to fill patches by, a detector to reject by, or several; received none",
    ):
        Guard(clip)
    with pytest.raises(ValueError, match="of one normalization of terms"):
        Guard(clip, repair, reject=detector)
    paper = DecompDet(**RULE).fit(clip.decompose(drawn(30, 1), convention="paper", normalize=True))
    with pytest.raises(ValueError, match="of one convention of terms"):
        Guard(clip, repair, reject=paper)
    with pytest.raises(NotFittedError):
        Guard(clip, DecompRep()).encode_image(drawn(2, 1))
    other = Guard(small_clip(width=24).double(), repair)
    with pytest.raises(ValueError, match="fit"):
        other.encode_image(drawn(2, 1))
    with pytest.raises(ValueError, match="expected images"):
        Guard(clip, repair).encode_image(torch.zeros(2, 3, 5, 5))


def test_a_detector_is_no_defense(clip: HookedCLIP, ours_alone: None) -> None:
    wrong: Any = DecompDet()
    with pytest.raises(TypeError, match="an intervention that repairs; received a DecompDet; .* reject="):
        Guard(clip, wrong)
    with pytest.raises(
        TypeError, match="a detector of terms, with fit, score and predict; received a Composition"
    ):
        Guard(clip, reject=Composition())  # pyright: ignore[reportArgumentType]
