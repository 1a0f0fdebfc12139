"""Maps of weights are those multiplied out by hand; differences are where weights were changed, and nowhere else."""

from __future__ import annotations

import copy
from itertools import combinations
from typing import Any

import pytest
import torch
from scipy.optimize import nnls
from torch import Tensor
from torch.nn import functional as F

from decompclip.decomposition.components import embed, heads, mlps
from decompclip.decomposition.maps import frozen
from decompclip.models.bundled import load_bundled
from decompclip.models.clip import HookedCLIP
from decompclip.models.text import ImageOnly, MissingTextError
from decompclip.operators.checkpoints import MovedClasses, compare_checkpoints
from decompclip.operators.inputs import default_texts, encode_texts
from decompclip.operators.weights import (
    COHERENCE,
    TextPool,
    layer_maps,
    pursue,
    show_words,
    text_pool,
    weight_directions,
    words_of,
)
from decompclip.tower.layers import blocks
from decompclip.tower.vit import HookedViT
from tests.conftest import MakeTower
from tests.decomposition.test_families import FAMILIES

FEW = ("a star", "a ring", "a circle", "a square", "a red star", "a blue ring")
CLASSES = ("circle", "square", "star", "ring")


@pytest.fixture(scope="module")
def clean() -> HookedCLIP:
    return load_bundled("shapes")


@pytest.fixture(scope="module")
def twin() -> HookedCLIP:
    return load_bundled("shapes-badnet")


def changed(model: HookedCLIP) -> HookedCLIP:
    """A copy whose head 3 of layer 2 writes a tenth more."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        blocks(other.visual)[2].attn.W_V[3] *= 1.1
    return other


# --- maps


def slow_maps(visual: HookedViT, layer: int) -> tuple[Tensor, Tensor]:
    """A layer's heads and MLP, one unit vector of the stream and one neuron after another; the pool's heads attend alike."""
    block = blocks(visual)[layer]
    of_heads, of_neurons = [], []

    def normed(x: Tensor, ln: Any) -> Tensor:
        """LayerNorm without its scale and its bias."""
        return x if ln is None else (x - x.mean(-1, keepdim=True)) * ln.w.double()

    def ends(x: Tensor) -> Tensor:
        x = normed(x, visual.ln_final)
        if visual.pool is not None:
            values = torch.einsum("...d,qdm->...qm", x, visual.pool.W_V.double())
            x = torch.einsum("...qm,qmd->...d", values, visual.pool.W_O.double())
            x = normed(x, visual.pool.ln_post)
        return x if visual.proj is None else x @ visual.proj.double()

    for unit in torch.eye(visual.cfg.d_model).double():
        z = torch.einsum(
            "d,hde->he", normed(unit, None if block.post_norm else block.ln1), block.attn.W_V.double()
        )
        wrote = torch.einsum("he,hed->hd", z, block.attn.W_written.double())
        wrote = wrote if block.ls1 is None else wrote * block.ls1.double()
        of_heads.append(ends(normed(wrote, block.ln1 if block.post_norm else None)))
    for unit in torch.eye(visual.cfg.d_mlp).double():
        wrote = normed(unit, block.mlp.ln) @ block.mlp.W_out.double().T
        wrote = wrote if block.ls2 is None else wrote * block.ls2.double()
        of_neurons.append(ends(normed(wrote, block.ln2 if block.post_norm else None)))
    return torch.stack(of_heads, 1), torch.stack(of_neurons)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_maps_and_factors_keep_their_products(name: str, make_tower: MakeTower) -> None:
    visual, other = (make_tower(seed=seed, **FAMILIES[name]) for seed in (0, 1))
    along = torch.randn(5, visual.cfg.d_embed, generator=torch.Generator().manual_seed(2)).double()
    pairs = list(zip(layer_maps(visual), layer_maps(other), strict=True))
    assert len(pairs) == visual.cfg.n_layers
    of_heads, of_mlp = slow_maps(visual, 1)
    torch.testing.assert_close(pairs[1][0].read @ pairs[1][0].write, of_heads, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pairs[1][0].out, of_mlp, atol=1e-5, rtol=1e-5)
    for mine, theirs in pairs:
        difference = mine.less(theirs)
        for maps, whole, out in (
            (mine, mine.read @ mine.write, mine.out),
            (difference, mine.read @ mine.write - theirs.read @ theirs.write, mine.out - theirs.out),
        ):
            factors = maps.factors()
            of_heads, of_mlp = factors.lengths
            torch.testing.assert_close(of_heads, whole.flatten(1).norm(dim=1))
            torch.testing.assert_close(of_mlp, out.norm())
            squares = (whole @ along.T).square().sum((0, 1)) + (out @ along.T).square().sum(0)
            torch.testing.assert_close(factors.along(along), squares)
    if visual.pool is None:  # the rest of a head's way is that of its terms
        for layer, (mine, _) in enumerate(pairs):
            theirs = frozen(visual, "centred").maps.heads[layer].double()  # multiplied in fp32
            torch.testing.assert_close(mine.write, theirs, atol=1e-6, rtol=1e-5)


# --- words


def best_of_all(direction: Tensor, texts: Tensor, n_texts: int) -> float:
    """The cosine that the best set of texts reaches, by trying every one."""
    best = 0.0
    for chosen in combinations(range(len(texts)), n_texts):
        weights, left = nnls(texts[list(chosen)].T.numpy(), direction.numpy())
        if weights.any():
            best = max(best, float((1 - left**2) ** 0.5))
    return best


def test_pursuit_finds_combinations_and_no_negative_weights() -> None:
    draws = torch.Generator().manual_seed(0)
    texts = F.normalize(torch.randn(12, 40, generator=draws).double(), dim=1)
    made = torch.tensor([[2.0, 1.0, 0.5]]).double() @ texts[[3, 7, 1]]
    picks, weights = pursue(made, texts, 3, coherence=0.0)
    assert dict(zip(picks[0].tolist(), weights[0].tolist(), strict=True)) == pytest.approx(
        {3: 2, 7: 1, 1: 0.5}
    )
    directions = F.normalize(torch.randn(20, 40, generator=draws).double(), dim=1)
    picks, weights = pursue(directions, texts, 3, coherence=0.0)
    assert (weights >= 0).all()
    reached = (weights[..., None] * texts[picks.clamp_min(0)]).sum(1)
    for direction, found in zip(directions, F.normalize(reached, dim=1), strict=True):
        assert float(found @ direction) > 0.85 * best_of_all(direction, texts, 3)
        assert float(found @ direction) <= best_of_all(direction, texts, 3) + 1e-9


def test_pursuit_step_by_step() -> None:
    """Beside the rule as it is written, one direction at a time."""
    draws = torch.Generator().manual_seed(3)
    texts = F.normalize(torch.randn(12, 8, generator=draws).double(), dim=1)
    directions = F.normalize(torch.randn(24, 8, generator=draws).double(), dim=1)
    for coherence in (-0.5, 0.0, 0.3, 2.0):
        picks, _ = pursue(directions, texts, 4, coherence=coherence)
        for direction, found in zip(directions, picks.tolist(), strict=True):
            chosen: list[int] = []
            left = direction
            for pick in found:
                scores = {
                    i: float(left @ t) + (coherence * float(texts[chosen].mean(0) @ t) if chosen else 0)
                    for i, t in enumerate(texts)
                    if i not in chosen and float(left @ t) > 1e-9
                }
                assert pick == (max(scores, key=lambda i: scores[i]) if scores else -1)
                if pick < 0:
                    break
                chosen.append(pick)
                fitted, _ = nnls(texts[chosen].T.numpy(), direction.numpy())
                left = direction - torch.from_numpy(fitted) @ texts[chosen]


def test_a_direction_is_named_by_its_texts_the_heaviest_first() -> None:
    texts = torch.eye(4, 6).double()
    made = [0.6 * texts[0] + 0.8 * texts[3], 0.8 * texts[0] + 0.6 * texts[1], texts[2], -texts[1]]
    directions = torch.stack(made)
    named, cosines = words_of(directions, TextPool(("a", "b", "c", "d"), texts), 5, 0.0)
    assert [[text for text, _ in one] for one in named] == [["d", "a"], ["a", "b"], ["c"], []]
    assert [weight for _, weight in named[0]] == pytest.approx([0.8, 0.6])
    assert cosines.tolist() == pytest.approx([1, 1, 1, 0])
    picks, _ = pursue(directions, texts, 5, coherence=0.0)
    assert picks.tolist() == [[3, 0, -1, -1, -1], [0, 1, -1, -1, -1], [2, *[-1] * 4], [-1] * 5]


def test_texts_that_the_refit_leaves_no_weight_are_no_words() -> None:
    draws = torch.Generator().manual_seed(3)
    texts = F.normalize(1 + torch.randn(12, 4, generator=draws).double(), dim=1)
    directions = F.normalize(torch.rand(24, 4, generator=draws).double(), dim=1)
    picks, weights = pursue(directions, texts, 4, coherence=2.0)
    assert ((picks >= 0) & (weights == 0)).any()
    pool = TextPool(tuple(map(str, range(12))), texts)
    for words, own in zip(words_of(directions, pool, 4, 2.0)[0], weights, strict=True):
        assert [weight for _, weight in words] == sorted((w for w in own.tolist() if w), reverse=True)


def test_the_pool_has_classes_in_a_template_and_the_usual_texts(
    clean: HookedCLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features are about the mean of all; of texts that the text tower does not tell apart there is one."""
    usual = default_texts(clean)
    for given, own in (
        ({}, [next(iter(clean.templates.values()))[0].replace("{}", name) for name in clean.class_names]),
        ({"class_names": CLASSES, "templates": ["the {}"]}, [f"the {name}" for name in CLASSES]),
        ({"class_names": ()}, []),
    ):
        wanted = tuple(dict.fromkeys((*own, *usual)))
        features = encode_texts(clean, wanted).features.double()
        features = features - features.mean(0)
        pool = text_pool(clean, None, 5, **given)  # pyright: ignore[reportArgumentType]
        at = [wanted.index(text) for text in pool.texts]
        assert at == sorted(at) and pool.texts[: len(own)] == tuple(own)
        torch.testing.assert_close(pool.features, F.normalize(features[at], dim=1))
        apart = torch.cdist(features, features[at]).min(1)
        assert apart.values.max() < 1e-4  # whoever is left out has a double

    def none(model: HookedCLIP) -> None:
        raise ValueError("no words for any")

    monkeypatch.setattr("decompclip.operators.weights.default_texts", none)
    assert text_pool(clean, None, 2, class_names=CLASSES).texts == CLASSES
    with pytest.raises(ValueError, match="no words for any"):
        text_pool(clean, None, 2, class_names=())


def test_coherence_prefers_texts_alike() -> None:
    draws = torch.Generator().manual_seed(4)
    texts = F.normalize(torch.randn(200, 16, generator=draws).double(), dim=1)
    directions = F.normalize(torch.randn(20, 16, generator=draws).double(), dim=1)

    def likeness(coherence: float) -> float:
        picks, _ = pursue(directions, texts, 4, coherence=coherence)
        chosen = texts[picks]
        return float((chosen @ chosen.mT).mean())

    assert likeness(-0.5) < likeness(0.0) < likeness(0.5)


def test_directions_are_singular_vectors(clean: HookedCLIP) -> None:
    found = weight_directions(clean, heads[5] | mlps[0], n_directions=2)
    pool = text_pool(clean, None, 5)
    assert len(found) == 9
    of_heads, of_mlp = slow_maps(clean.visual, 5)[0], slow_maps(clean.visual, 0)[1]
    for row, matrix in enumerate((*of_heads, of_mlp)):
        _, values, vectors = torch.linalg.svd(matrix.detach(), full_matrices=False)
        torch.testing.assert_close(
            found.share[row], values[:2].square() / values.square().sum(), atol=1e-5, rtol=1e-4
        )
        assert (found.directions[row] * vectors[:2]).sum(1).abs().min() > 0.999
    frame = found.to_frame()
    assert list(frame.columns) == [
        "part", "kind", "layer", "head", "direction", "share", "fidelity", "texts"
    ]  # fmt: skip
    assert frame["part"].tolist() == [str(part) for part in found.parts for _ in range(2)]
    assert frame["direction"].tolist() == [0, 1] * 9
    for name in ("share", "fidelity"):
        assert frame[name].tolist() == getattr(found, name).flatten().tolist()
    assert frame["texts"].tolist() == [show_words(words) for part in found.words for words in part]
    plot: Any = found.figure()
    torch.testing.assert_close(torch.tensor(plot.data[0].z)[5], found.share[:8, 0])
    assert ((found.fidelity > 0) & (found.fidelity <= 1)).all()
    few = found.select([8, 1])
    assert (few.parts, few.words) == ((found.parts[8], found.parts[1]), (found.words[8], found.words[1]))
    for name in ("directions", "share", "fidelity"):
        assert torch.equal(getattr(few, name), getattr(found, name)[[8, 1]])
    shown = f"heads[5, 0]: {', '.join(found.of('heads[5, 0]')[:2])}; heads[5, 1]: "
    assert repr(found).startswith(f"NamedDirections(9 parts, 2 directions each: {shown}")
    assert found.of(heads[5, 0]) == tuple(text for text, _ in found.words[0][0])
    assert words_of(found.directions[:, 0], pool, 5, COHERENCE)[0] == [words[0] for words in found.words]
    turned = words_of(-found.directions.flatten(0, 1), pool, 5, COHERENCE)[1]
    # the sign that texts explain better
    assert (turned <= found.fidelity.flatten()).all() and (turned < found.fidelity.flatten()).any()
    picks, weights = pursue(found.directions[:, 0], pool.features, 5)
    first = [pool.texts[i] for i in picks[:, 0].tolist()]
    heaviest = [pool.texts[int(p[int(w.argmax())])] for p, w in zip(picks, weights, strict=True)]
    assert (
        [words[0][0][0] for words in found.words] == heaviest != first
    )  # the refit makes later picks the heaviest
    for words in (own for part in found.words for own in part):
        assert [w for _, w in words] == sorted((w for _, w in words), reverse=True)


# --- differences


def test_one_changed_head_is_the_one_difference(clean: HookedCLIP) -> None:
    found = compare_checkpoints(changed(clean), clean)
    where = [str(part) for part in found.parts].index("heads[2, 3]")
    expected = torch.zeros(len(found.parts), dtype=torch.float64)
    expected[where] = 0.1
    torch.testing.assert_close(found.change, expected, atol=1e-6, rtol=1e-5)
    assert found.text_change == 0
    own = weight_directions(clean, heads[2, 3], n_directions=1)
    assert abs(float((own.directions[0, 0] * found.directions.directions[where, 0]).sum())) > 0.9999
    (row,) = found.top(1).to_frame().to_dict("records")
    assert row["part"] == "heads[2, 3]" and row["change"] == pytest.approx(0.1)
    for name in ("share", "fidelity"):
        assert row[name] == float(getattr(found.directions, name)[where, 0])
    plot: Any = found.figure()
    assert float(plot.data[0].z[2, 3]) == float(found.change[where])
    # the text tower is the same: classes are ranked by the image tower alone
    assert found.classes is not None
    assert (found.classes.text == 0).all()
    torch.testing.assert_close(found.classes.score, found.classes.image / found.classes.image.median())


def test_the_same_weights_differ_in_nothing(clean: HookedCLIP) -> None:
    found = compare_checkpoints(copy.deepcopy(clean), clean)
    assert found.change.abs().max() < 1e-9 and not found.directions.share.any()
    assert not any(words for part in found.directions.words for words in part)
    assert found.classes is not None
    assert (found.classes.score == 1).all()
    assert found.classes.rank("star") == len(found.classes)
    assert found.classes.lead == 1


def test_the_text_tower_s_change_is_that_of_its_weights(clean: HookedCLIP) -> None:
    other = copy.deepcopy(clean)
    with torch.no_grad():
        for x in other.text.parameters():
            x.mul_(1.1 if x.ndim else 3)  # a scale is none of the weights
    assert compare_checkpoints(other, clean).text_change == pytest.approx(0.1, rel=1e-5)


def test_a_backdoored_twin_names_its_target(clean: HookedCLIP, twin: HookedCLIP) -> None:
    found = compare_checkpoints(twin, clean)
    assert found.classes is not None
    assert found.classes.order[0] == "star"
    assert found.classes.rank("star") == 1
    assert any("star" in text for text in found.top(1).directions.of(found.top(1).parts[0]))
    frame = found.classes.to_frame()
    assert frame["class"].tolist() == list(found.classes.order)
    assert frame["rank"].tolist() == [*range(1, len(frame) + 1)] and frame["score"].is_monotonic_decreasing
    at = [found.classes.names.index(name) for name in frame["class"]]
    for column in ("score", "image", "text"):
        assert frame[column].tolist() == getattr(found.classes, column)[at].tolist()
    assert found.classes.lead == pytest.approx(frame["score"][0] / frame["score"][1])
    assert "star" in repr(found)
    assert "star" in repr(found.classes)
    assert found._repr_html_().count("<tr") == 21  # the largest changes of 54 parts
    for figure in (found.figure(), found.classes.figure(), found.directions.figure()):
        assert figure.data


def test_classes_are_scored_as_written(clean: HookedCLIP, twin: HookedCLIP) -> None:
    found = compare_checkpoints(twin, clean, class_names=CLASSES, templates=["a {}", "the {}"]).classes
    assert found is not None
    before, after = (m.zero_shot_classifier(CLASSES, ["a {}", "the {}"]).double() for m in (clean, twin))
    centred = F.normalize(after - after.mean(0), dim=1)
    changed = written = torch.zeros(4).double()
    for layer in range(clean.cfg.n_layers):
        for mine, theirs in zip(slow_maps(twin.visual, layer), slow_maps(clean.visual, layer), strict=True):
            changed = changed + ((mine - theirs) @ centred.T).square().flatten(0, -2).sum(0)
            written = written + (theirs @ centred.T).square().flatten(0, -2).sum(0)
    image = (changed / written).sqrt().detach()
    text = ((after - before) - (after - before).mean(0)).norm(dim=1)
    torch.testing.assert_close(found.image, image, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.text, text)
    torch.testing.assert_close(
        found.score, image / image.median() * text / text.median(), atol=1e-4, rtol=1e-4
    )


def test_features_of_texts_are_the_references(clean: HookedCLIP, twin: HookedCLIP) -> None:
    texts = encode_texts(clean)
    given = compare_checkpoints(twin, clean, texts=texts).directions
    assert given.words == compare_checkpoints(twin, clean, texts=list(texts.texts)).directions.words
    with pytest.raises(ValueError, match="encode_texts"):
        compare_checkpoints(twin, clean, texts=encode_texts(twin))


def test_three_classes_are_ranked_and_lend_their_words(
    clean: HookedCLIP, twin: HookedCLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools: list[TextPool] = []

    def kept(*given: Any, **more: Any) -> TextPool:
        pools.append(text_pool(*given, **more))
        return pools[-1]

    monkeypatch.setattr("decompclip.operators.checkpoints.text_pool", kept)
    found = compare_checkpoints(twin, clean, class_names=CLASSES[1:], templates=["the {}"])
    assert found.classes is not None and found.classes.names == CLASSES[1:]
    assert pools[0].texts[:3] == ("the square", "the star", "the ring")


def test_a_lead_is_over_the_second_where_there_is_one() -> None:
    for scores, lead in (([1.0, 4.0, 2.0], 2), ([0.2, 0.1, 0.8], 4), ([0.0, 3.0, 0.0], 1)):
        of = torch.tensor(scores)
        found = MovedClasses(("a", "b", "c"), of, of, of)
        assert found.lead == pytest.approx(lead)
        assert repr(found.top(1)).endswith("lead 1.00)")


def test_classes_are_those_that_either_brings(clean: HookedCLIP, twin: HookedCLIP) -> None:
    nameless = copy.deepcopy(clean)
    nameless.class_names = ()
    for pair in ((nameless, twin), (twin, nameless)):
        found = compare_checkpoints(*pair).classes
        assert found is not None and found.names == tuple(clean.class_names)
    assert compare_checkpoints(nameless, nameless).classes is None


# --- what is refused


def test_two_architectures_are_refused(clean: HookedCLIP) -> None:
    with pytest.raises(
        ValueError,
        match=r"one architecture; received 'shapes' and 'cifar10', which differ in (?!vocab).*fine-tuned",
    ):
        compare_checkpoints(load_bundled("cifar10"), clean)


def test_a_text_tower_with_more_in_it_is_refused(clean: HookedCLIP) -> None:
    more = copy.deepcopy(clean)
    more.text.register_buffer("scale", torch.ones(2))
    with pytest.raises(ValueError, match=r"scale of the text tower missing and \(2,\)"):
        compare_checkpoints(more, clean)
    with pytest.raises(ValueError, match=r"scale of the text tower \(2,\) and missing"):
        compare_checkpoints(clean, more)


def test_two_vocabularies_are_refused(clean: HookedCLIP) -> None:
    other = copy.deepcopy(clean)
    other.tokenizer = type(clean.tokenizer)(tuple(reversed(clean.tokenizer.words)), clean.context_length)  # pyright: ignore
    with pytest.raises(ValueError, match="one architecture.*vocabularies"):
        compare_checkpoints(other, clean)


def test_too_few_texts_name_nothing(clean: HookedCLIP, twin: HookedCLIP) -> None:
    with pytest.raises(
        ValueError, match="more than 5 texts that the text tower tells apart.*received 5, of which 5"
    ):
        compare_checkpoints(twin, clean, texts=FEW[:5])
    unknown = [f"a zebra{i}" for i in range(9)]  # one unknown word to this vocabulary
    with pytest.warns(UserWarning, match="unknown"), pytest.raises(ValueError, match="of which 0 are apart"):
        weight_directions(twin, heads[-1], texts=unknown)


@pytest.mark.usefixtures("ours_alone")
def test_bad_numbers_and_parts_are_refused(clean: HookedCLIP, twin: HookedCLIP) -> None:
    with pytest.raises(ValueError, match="at least 3 classes to rank; received 2"):
        compare_checkpoints(twin, clean, class_names=["star", "ring"])
    for name in ("n_directions", "n_texts"):
        for odd in (0, 2.5, "3", True):
            with pytest.raises(
                ValueError, match=f"{name} to be a whole number of .*, at least 1; received {odd!r}"
            ):
                weight_directions(clean, heads[0, 0], texts=FEW, **{name: odd})  # pyright: ignore[reportArgumentType]
    for odd in (float("nan"), "x"):
        with pytest.raises(ValueError, match=f"a finite coherence, 0.3 by default; received {odd!r}"):
            weight_directions(clean, heads[0, 0], texts=FEW, coherence=odd)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="heads and MLPs, which write by a matrix; received embed"):
        weight_directions(clean, heads[0] | embed)
    found = compare_checkpoints(twin, clean, class_names=())
    assert found.classes is None
    for few in (lambda: found.top(0), lambda: compare_checkpoints(twin, clean).classes.top(0)):  # pyright: ignore
        with pytest.raises(ValueError, match="at least 1; received 0"):
            few()
    with pytest.raises(LookupError, match="class"):
        compare_checkpoints(twin, clean).classes.rank("zebra")  # pyright: ignore


@pytest.mark.usefixtures("ours_alone")
def test_what_is_no_clip_or_not_finite_is_refused(clean: HookedCLIP) -> None:
    given: list[tuple[Any, str]] = [
        ("shapes", "received str: 'shapes'; load"),
        (clean.visual, "image tower; pass the model"),
    ]
    for odd, words in given:
        for call in (
            lambda x: compare_checkpoints(clean, x),
            lambda x: compare_checkpoints(x, clean),
            weight_directions,
        ):
            with pytest.raises(TypeError, match=words):
                call(odd)
    for part in ("visual.blocks.2.attn.W_out", "text.ln_final.weight"):
        torn = copy.deepcopy(clean)
        with torch.no_grad():
            torn.get_parameter(part).view(-1)[3] = torch.nan
        for pair in ((torn, clean), (clean, torn)):
            with pytest.raises(
                ValueError, match=f"finite weights; received nan or inf in {part} of 'shapes'"
            ):
                compare_checkpoints(*pair)


def test_classes_that_are_one_text_are_not_ranked(clean: HookedCLIP, twin: HookedCLIP) -> None:
    names = ["zebra", "gnu", "yak", "star"]  # three of them one unknown word
    with (
        pytest.warns(UserWarning, match="unknown"),
        pytest.raises(
            ValueError, match="3 classes that the text tower tells apart; received 4, of which 2 are apart"
        ),
    ):
        compare_checkpoints(twin, clean, class_names=names)


def test_a_head_that_the_reference_has_not(clean: HookedCLIP) -> None:
    """A baked head writes nothing: all that the other has of it is the change, and of two such heads there is none."""
    without = copy.deepcopy(clean)
    with torch.no_grad():
        blocks(without.visual)[2].attn.W_O[3] = 0
    silent = weight_directions(without, heads[2, 3], texts=FEW, n_texts=2)
    assert not silent.directions.any() and not silent.of("heads[2, 3]")
    small = copy.deepcopy(clean)
    with torch.no_grad():
        blocks(small.visual)[2].attn.W_O[3] *= 1e-3
    pairs = (
        ((clean, without), 1.0),
        ((without, clean), 1.0),
        ((without, without), 0.0),
        ((small, without), 1.0),  # however little that is
        ((changed(small), small), 0.1),
    )
    for pair, expected in pairs:
        found = compare_checkpoints(*pair, class_names=(), texts=FEW, n_texts=2)
        place = [str(part) for part in found.parts].index("heads[2, 3]")
        assert found.change.isfinite().all()
        assert float(found.change[place]) == pytest.approx(expected, rel=1e-4)
        assert str(found.top(1).parts[0]) == "heads[2, 3]" or not expected
        assert bool(found.directions.of("heads[2, 3]")) == bool(expected)


def test_rounding_to_half_precision_is_no_change(clean: HookedCLIP) -> None:
    """Weights and text features of bfloat16 differ by its rounding, of which nothing is said."""
    found = compare_checkpoints(copy.deepcopy(clean).bfloat16(), clean, texts=FEW, n_texts=2)
    assert found.classes is not None and found.classes.lead == 1 and found.change.max() > 1e-4
    assert not any(any(words) for words in found.directions.words) and "first classes" not in repr(found)
    assert not found.directions.share.any()
    half, other = (copy.deepcopy(clean).bfloat16() for _ in range(2))
    with torch.no_grad():
        blocks(other.visual)[2].attn.W_V[3, 0, 0] += 2**-6  # of one precision, what differs is a change
    found = compare_checkpoints(other, half, class_names=(), texts=FEW, n_texts=2).top(1)
    assert str(found.parts[0]) == "heads[2, 3]" and found.change[0] < 1e-2 and found.directions.share.all()


def test_an_image_tower_alone_is_refused(clean: HookedCLIP) -> None:
    alone = copy.deepcopy(clean)
    alone.text = ImageOnly(torch.nn.Identity(), torch.tensor(1.0), why="loaded with text=False")
    with pytest.raises(MissingTextError, match="text=False"):
        compare_checkpoints(alone, copy.deepcopy(alone))
