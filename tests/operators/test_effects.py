"""Direct against causal: both against one intervention at a time, and where they must agree."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from decompclip.decomposition.capture import decompose
from decompclip.decomposition.components import Components, embed, everything, heads, mlps
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.moments import Moments
from decompclip.operators.ablation import MeanAblate, ZeroAblate
from decompclip.operators.effects import Effects, Mode, direct_and_causal
from decompclip.operators.inputs import TextFeatures
from decompclip.operators.intervention import Composition, Intervention
from decompclip.operators.scores import ClassScore
from decompclip.tower.vit import Hook, HookedViT

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def classifier() -> Tensor:
    return torch.randn(6, 20, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def labels() -> Tensor:
    return torch.tensor([0, 3, 5, 3, 1])


@pytest.fixture(scope="module")
def moments(tower: HookedViT) -> Moments:
    clean = torch.randn(16, 3, 24, 16, generator=torch.Generator().manual_seed(5))
    return Moments.fit(tower, [clean])


@pytest.fixture(scope="module")
def effects(tower: HookedViT, images: Tensor, moments: Moments, classifier: Tensor) -> Effects:
    return direct_and_causal(
        tower, images, lambda parts: MeanAblate(parts, moments), classifier, 2, components=everything
    )


@torch.no_grad()
def causal(tower: HookedViT, images: Tensor, edit: Intervention) -> Tensor:
    with tower.hooks(fwd_hooks=edit.fwd_hooks(tower)):
        return tower(images)


@torch.no_grad()
def test_each_effect_is_that_of_its_component_alone(
    tower: HookedViT, images: Tensor, moments: Moments, classifier: Tensor, effects: Effects
) -> None:
    def logit(features: Tensor) -> Tensor:
        logits = features @ classifier.T
        return logits[:, 2] - logits[:, [0, 1, 3, 4, 5]].mean(1)

    d = decompose(tower, images)
    before = logit(tower(images))
    assert effects.baseline == pytest.approx(float(before.mean()), rel=1e-4)
    chosen = {f"heads[{i}, {h}]": heads[i, h] for i in range(3) for h in range(4)}
    chosen |= {f"mlps[{i}]": mlps[i] for i in range(3)} | {"embed": embed}
    assert [str(part) for part in effects.parts] == list(chosen)
    for name, components in chosen.items():
        edit = MeanAblate(components, moments)
        direct = logit(edit(d).features) - before
        through = logit(causal(tower, images, edit)) - before
        found = effects[name]
        assert found["direct"] == pytest.approx(float(direct.mean()), rel=1e-3, abs=1e-5)
        assert found["causal"] == pytest.approx(float(through.mean()), rel=1e-3, abs=1e-5)
        assert found["difference"] == pytest.approx(found["causal"] - found["direct"])
        i = list(chosen).index(name)
        for errors, scores in (
            (effects.direct_error, direct),
            (effects.causal_error, through),
            (effects.difference_error, through - direct),
        ):
            assert float(errors[i]) == pytest.approx(2.776 * float(scores.std()) / 5**0.5, rel=1e-3, abs=1e-5)


@dataclass(frozen=True)
class AtFrozenScale(Intervention):
    """Zero-ablation under the last LayerNorm's scale as it was."""

    components: Components
    scale: Tensor

    def __call__(self, d: Decomposition, *, where: Any = None) -> Decomposition:
        return ZeroAblate(self.components)(d)

    def fwd_hooks(self, visual: HookedViT, *, where: Any = None) -> list[Hook]:
        frozen = ("ln_final.hook_scale", lambda scale, hook: self.scale)
        return [*ZeroAblate(self.components).fwd_hooks(visual), frozen]


def test_nothing_reads_the_last_mlp_but_the_last_layernorm(
    tower: HookedViT, images: Tensor, classifier: Tensor
) -> None:
    _, cache = tower.run_with_cache(images)
    scale = cache["ln_final.hook_scale"]
    found = direct_and_causal(tower, images, lambda parts: AtFrozenScale(parts, scale), classifier, 1)
    assert abs(found["mlps[2]"]["difference"]) < 1e-4 * abs(found["mlps[2]"]["direct"])
    others = found.difference[:-1].abs() / found.direct[:-1].abs()
    assert (others > 1e-3).all()  # later parts read all others


def test_no_edit_no_effect(tower: HookedViT, images: Tensor, classifier: Tensor) -> None:
    found = direct_and_causal(tower, images, lambda parts: Composition(), classifier, 2)
    for effect in (found.direct, found.causal, found.direct_error, found.causal_error):
        torch.testing.assert_close(effect, torch.zeros(15).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("metric", ["logit", "logit_difference", "accuracy"])
def test_batches_and_their_order_change_nothing(
    tower: HookedViT, images: Tensor, classifier: Tensor, labels: Tensor, metric: Any
) -> None:
    options: dict[str, Any] = {"metric": metric, "components": heads[1:, :2] | mlps[0]}
    whole = direct_and_causal(tower, images, ZeroAblate, classifier, labels, **options)
    split = direct_and_causal(tower, images.split(2), ZeroAblate, classifier, labels, **options)
    order = torch.tensor([4, 2, 0, 1, 3])
    mixed = direct_and_causal(tower, images[order], ZeroAblate, classifier, labels[order], **options)
    for other in (split, mixed):
        assert other.n_images == 5
        assert other.baseline == pytest.approx(whole.baseline, rel=1e-5)
        torch.testing.assert_close(other.direct, whole.direct, **CLOSE)
        torch.testing.assert_close(other.causal, whole.causal, **CLOSE)
        torch.testing.assert_close(other.difference_error, whole.difference_error, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("convention", ["centred", "paper"])
def test_normalised_features_keep_the_length_of_the_unedited(
    tower: HookedViT, images: Tensor, classifier: Tensor, convention: Any
) -> None:
    moments = Moments.fit(tower, [images[:3]], convention=convention, normalize=True)
    found = direct_and_causal(
        tower,
        images,
        lambda parts: MeanAblate(parts, moments),
        classifier,
        2,
        metric="logit",
        components=mlps[1],
        convention=convention,
        normalize=True,
    )
    plain = tower(images)
    length = plain.norm(dim=1, keepdim=True)
    assert found.baseline == pytest.approx(float((plain / length @ classifier[2]).mean()), rel=1e-4)
    edited = causal(tower, images, MeanAblate(mlps[1], moments))
    expected = ((edited - plain) / length @ classifier[2]).mean()
    assert found["mlps[1]"]["causal"] == pytest.approx(float(expected), rel=1e-3)


def test_scores_are_what_they_say(classifier: Tensor, labels: Tensor) -> None:
    features = torch.randn(5, 20, generator=torch.Generator().manual_seed(6))
    logits = (features.double() @ classifier.double().T).numpy()
    rows = slice(0, 5)
    own = logits[range(5), labels]
    np.testing.assert_allclose(ClassScore(classifier, labels, metric="logit")(features, rows), own)
    others = [np.delete(row, label).mean() for row, label in zip(logits, labels, strict=True)]
    np.testing.assert_allclose(ClassScore(classifier, labels)(features, rows), own - others)
    np.testing.assert_allclose(ClassScore(classifier, labels, against=4)(features, rows), own - logits[:, 4])
    np.testing.assert_allclose(
        ClassScore(classifier, 4, against=labels)(features[2:], slice(2, 5)), (logits[:, 4] - own)[2:]
    )
    np.testing.assert_allclose(ClassScore(classifier[:2], 1)(features), logits[:, 1] - logits[:, 0])
    right = logits.argmax(1) == labels.numpy()
    np.testing.assert_allclose(ClassScore(classifier, labels, metric="accuracy")(features, rows), right)


def test_a_single_image_has_no_interval(tower: HookedViT, images: Tensor, classifier: Tensor) -> None:
    found = direct_and_causal(tower, images[:1], ZeroAblate, classifier, 0, components=mlps[0])
    assert found.direct_error.isnan().all() and not found.direct.isnan().any()


@pytest.mark.filterwarnings("error")
def test_a_single_part_has_no_correlation(tower: HookedViT, images: Tensor, classifier: Tensor) -> None:
    found = direct_and_causal(tower, images, ZeroAblate, classifier, 0, components=mlps[0])
    assert found.correlation != found.correlation
    ends = f"direct {float(found.direct[0]):.4g}, causal {float(found.causal[0]):.4g})"
    assert repr(found) == f"Effects(1 part on the logit difference, 5 images; {ends}"
    assert "nan" not in found._repr_html_()


def test_grids_hold_the_numbers_by_place(effects: Effects) -> None:
    assert float(effects.heads("causal")[1, 3]) == effects["heads[1, 3]"]["causal"]
    assert float(effects.mlps("direct")[2]) == effects["mlps[2]"]["direct"]
    assert float(effects.heads()[0, 0]) == effects["heads[0, 0]"]["difference"]
    expected = np.corrcoef(effects.direct.numpy(), effects.causal.numpy())[0, 1]
    assert effects.correlation == pytest.approx(expected)


def test_the_result_speaks(effects: Effects) -> None:
    frame = effects.to_frame()
    assert frame["part"].tolist() == [str(part) for part in effects.parts]
    assert frame["difference"].tolist() == effects.difference.tolist()
    assert {"direct_error", "causal_error", "difference_error", "layer", "head"} <= set(frame)
    assert repr(effects).startswith(
        "Effects(16 parts on the logit difference, 5 images; correlation of direct"
    )
    assert "embed" in effects._repr_html_()
    pair = dict.fromkeys(("direct_error", "causal_error", "difference_error"), torch.zeros(2))
    opposed = {"direct": torch.tensor([1.0, 2.0]), "causal": torch.tensor([4.0, 3.0])}
    two = replace(effects, parts=effects.parts[:2], **pair, **opposed)
    assert two.correlation == pytest.approx(-1)
    assert effects.intervention.startswith("MeanAblate(heads[0, 0], Moments(16 images")
    markers = [trace for trace in effects.figure().data if trace.mode == "markers+text"]  # type: ignore[union-attr]
    assert [len(trace.x) for trace in markers] == [12, 3, 1]  # type: ignore[union-attr]
    assert sum(bool(text.strip()) for trace in markers for text in trace.text) in range(5, 11)  # type: ignore[union-attr]
    modes = get_args(Mode)
    plots: list[Any] = [effects.figure(mode=mode) for mode in modes]
    (top,) = {plot.layout.coloraxis.cmax for plot in plots}  # one scale: they are to be compared
    assert plots[1].layout.coloraxis.cmin == -top
    axes: Any = effects.figure().layout
    assert axes.xaxis.title.text == "direct effect on the logit difference"
    assert axes.yaxis.title.text == "causal effect"
    units = {plot.layout.coloraxis.colorbar.title.text for plot in plots}
    assert units == {f"{m}{'' if m == 'difference' else ' effect'} (logit difference)" for m in modes}
    cells = torch.cat([x.flatten() for m in modes for x in (effects.heads(m), effects.mlps(m))])
    assert top == float(cells.abs().max())
    grid = plots[modes.index("causal")].data[0]
    np.testing.assert_array_equal(grid.z, effects.heads("causal").numpy())


@torch.no_grad()
def test_the_pool_s_mlp_is_a_part(make_tower: Any, images: Tensor) -> None:
    tower = make_tower(pool="attention", pool_heads=2, pool_mlp=24, n_prefix=0, projection=False, d_embed=32)
    texts = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    found = direct_and_causal(tower, images, ZeroAblate, texts, 0, metric="logit", components=everything)
    assert len(found.parts) == 12 + 3 + 2
    # Nothing reads it: it is added last.
    term = decompose(tower, images).pool[:, 0]
    assert found["pool"]["direct"] == pytest.approx(-float((term @ texts[0]).mean()), rel=1e-3)
    assert found["pool"]["causal"] == pytest.approx(found["pool"]["direct"], rel=1e-3)


@pytest.mark.usefixtures("ours_alone")
def test_errors_say_what_to_do(
    tower: HookedViT, images: Tensor, classifier: Tensor, labels: Tensor, effects: Effects
) -> None:
    def fails(
        kind: type[Exception], words: str, target: Any = 0, given: Any = images, **options: Any
    ) -> None:
        with pytest.raises(kind, match=words):
            direct_and_causal(tower, given, ZeroAblate, options.pop("texts", classifier), target, **options)

    fails(ValueError, "expected metric of .*received 'loss'", metric="loss")
    fails(IndexError, r"target as classes in 0\.\.5, the rows of the classifier; received 6\.\.6", 6)
    fails(IndexError, r"against as classes in 0\.\.5, .*received -1\.\.-1", against=-1)
    fails(ValueError, "received it with 'accuracy'; leave it out", metric="accuracy", against=1)
    fails(ValueError, r"a classifier \[class, 20\]; received \[6, 9\]", texts=classifier[:, :9])
    fails(ValueError, r"of at least two classes; received \[1, 20\]", texts=classifier[:1])
    fails(ValueError, "at least one image; received none", given=[])
    fails(ValueError, "one for each of the 5 images so far; received 4", labels[:4])
    fails(ValueError, "one for each of 5 images; received 10", labels.repeat(2), components=mlps[0])
    fails(IndexError, "received layer 7", components=mlps[7])
    fails(ValueError, r"text features \[class, d_embed\] beside a target; received 'a dog'", texts="a dog")
    for function in (lambda x: x[:, 0], ClassScore(classifier, 2)):
        fails(ValueError, "received it with a function; leave it out", None, texts=function, against=1)
    nothing: Any = lambda parts: None  # noqa: E731
    with pytest.raises(
        TypeError, match=r"to return an intervention; received None for mlps\[0\]; e\.g\. lambda"
    ):
        direct_and_causal(tower, images, nothing, classifier, 0, components=mlps[0])
    with pytest.raises(
        ValueError, match=r"expected mode of \('direct', 'causal', 'difference'\); received 'total'"
    ):
        effects.heads("total")  # pyright: ignore[reportArgumentType]
    with pytest.raises(KeyError, match=r"received pool; name it in components="):
        effects["pool"]


def test_a_direction_scores_as_the_classes_it_lies_between(
    tower: HookedViT, images: Tensor, classifier: Tensor
) -> None:
    of_classes = direct_and_causal(tower, images, ZeroAblate, classifier, 2, against=4, components=mlps)
    scores = ClassScore(classifier, 2, against=4)
    for toward, against in (
        (classifier[2] - classifier[4], None),
        (classifier[2], classifier[4]),
        (scores, None),
    ):
        found = direct_and_causal(tower, images, ZeroAblate, toward, against=against, components=mlps)
        for mode in ("direct", "causal"):
            torch.testing.assert_close(getattr(found, mode), getattr(of_classes, mode), atol=1e-6, rtol=1e-4)
    units = classifier / classifier.norm(dim=1, keepdim=True)
    texts = TextFeatures(tuple("abcdef"), units)
    of_texts, of_units = (
        direct_and_causal(tower, images, ZeroAblate, x, 2, against=4, components=mlps) for x in (texts, units)
    )
    assert torch.equal(of_texts.causal, of_units.causal)
    own = direct_and_causal(tower, images, ZeroAblate, lambda x: x[:, 0], components=mlps)
    assert own.metric == "score" and own.causal.abs().max() > 0
