"""Shares and hits equal plain loops; chance and the clean twin stand beside what a backdoored model shows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from decompclip.attacks.registry import from_card
from decompclip.data.shapes import Shapes
from decompclip.decomposition.components import heads
from decompclip.models.bundled import card, load_bundled
from decompclip.operators.attention import attention_maps, contribution_maps
from decompclip.operators.mask_scores import score_masks
from decompclip.operators.tokens import TokenMaps

ROWS, COLUMNS, SIDE = 3, 4, 5
SIZE = (ROWS * SIDE + 2, COLUMNS * SIDE + 1)  # a margin that no patch sees


def maps_of(patches: Tensor) -> TokenMaps:
    return TokenMaps(
        patches=patches,
        prefix=torch.full((*patches.shape[:2], 1), 9.0),
        kind="contribution",
        heads=tuple((0, head) for head in range(len(patches))),
        image_size=SIZE,
        patch_size=(SIDE, SIDE),
        names=tuple(map(str, range(patches.shape[1]))),
        toward="x",
    )


@pytest.fixture
def maps() -> TokenMaps:
    return maps_of(torch.randn(2, 6, ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def masks() -> Tensor:
    found = torch.zeros(6, *SIZE, dtype=torch.bool)
    for i in range(6):
        found[i, i : i + 6, 2 * i : 2 * i + 7] = True
    return found


@pytest.mark.parametrize("inside", ["touched", "covered"])
def test_scores_equal_plain_loops(maps: TokenMaps, masks: Tensor, inside: str) -> None:
    scores = score_masks(maps, masks, inside=inside)  # pyright: ignore[reportArgumentType]
    for m in range(2):
        for i in range(6):
            within = whole = 0.0
            best, hit, weights = -math.inf, False, []
            for r in range(ROWS):
                for c in range(COLUMNS):
                    patch = masks[i, r * SIDE : (r + 1) * SIDE, c * SIDE : (c + 1) * SIDE].float()
                    weight = float(patch.mean()) if inside == "covered" else float(patch.any())
                    value = float(maps.patches[m, i, r, c])
                    within, whole = within + weight * max(value, 0), whole + max(value, 0)
                    weights.append(weight)
                    if value > best:
                        best, hit = value, bool(patch.any())
            assert float(scores.share[m, i]) == pytest.approx(within / whole, rel=1e-5)
            assert bool(scores.hit[m, i]) == hit
            assert float(scores.chance[i]) == pytest.approx(sum(weights) / len(weights))
    torch.testing.assert_close(scores.mean_share, scores.share.mean(1))
    torch.testing.assert_close(scores.hit_rate, scores.hit.float().mean(1))


def test_the_scale_of_a_map_is_of_no_matter(maps: TokenMaps, masks: Tensor) -> None:
    scores, scaled = score_masks(maps, masks), score_masks(maps_of(7 * maps.patches), masks)
    torch.testing.assert_close(scaled.share, scores.share)
    assert torch.equal(scaled.hit, scores.hit)


def test_a_map_that_knows_nothing_scores_chance(masks: Tensor) -> None:
    flat = maps_of(torch.ones(1, 6, ROWS, COLUMNS))
    for inside in ("touched", "covered"):
        scores = score_masks(flat, masks, inside=inside)
        torch.testing.assert_close(scores.share[0], scores.chance)
    everywhere = score_masks(flat, torch.ones(6, *SIZE, dtype=torch.bool))
    assert torch.equal(everywhere.share, torch.ones(1, 6)) and torch.equal(everywhere.chance, torch.ones(6))


def test_inside_and_outside_share_it_all(maps: TokenMaps, masks: Tensor) -> None:
    shares = [score_masks(maps, m, inside="covered").share for m in (masks, ~masks)]
    torch.testing.assert_close(shares[0] + shares[1], torch.ones(2, 6))


def test_nothing_positive_has_no_share_and_no_hit(maps: TokenMaps, masks: Tensor) -> None:
    patches = maps.patches.clone()
    patches[0, 2] = -1.0
    patches[1] = 0.0
    scores = score_masks(maps_of(patches), masks)
    assert scores.share[0].isnan().nonzero().tolist() == [[2]] and scores.share[1].isnan().all()
    assert not scores.hit[0, 2] and not scores.hit[1].any()
    assert float(scores.mean_share[0]) == pytest.approx(float(scores.share[0, [0, 1, 3, 4, 5]].mean()))
    assert scores.order == [0, 1]
    frame = scores.to_frame()
    assert frame["images_with_share"].tolist() == [5, 0] and frame["images"].tolist() == [6, 6]
    expected = float(scores.share[0, [0, 1, 3, 4, 5]].std() / math.sqrt(5))
    assert frame["share_error"][0] == pytest.approx(expected, rel=1e-5)


def test_a_figure_has_the_best_maps_with_intervals_and_the_control(maps: TokenMaps, masks: Tensor) -> None:
    scores = score_masks(maps, masks)
    control = score_masks(maps_of(maps.patches.flip(1)), masks)
    plot: Any = scores.figure(control=control, control_name="turned", count=1)
    shares, hits, others, other_hits, line = plot.data
    best, frame = scores.order[0], scores.to_frame()
    assert list(plot.layout.yaxis.ticktext) == [scores.labels[best]]
    assert list(shares.x) == pytest.approx([100 * float(scores.mean_share[best])])
    assert list(hits.x) == pytest.approx([100 * float(scores.hit_rate[best])])
    assert list(others.x) == pytest.approx([100 * float(control.mean_share[best])])
    assert list(other_hits.x) == pytest.approx([100 * float(control.hit_rate[best])])
    chance = 100 * float(scores.chance.mean())
    assert list(line.x) == pytest.approx([chance] * 2)
    assert plot.layout.xaxis.title.text == (
        f"% (not shown: 1 maps of lower share); dotted: chance, {chance:.1f} %"
    )
    half = 1.96 * frame["share_error"][best]
    share = float(scores.mean_share[best])
    assert shares.error_x.array[0] == pytest.approx(100 * (min(1, share + half) - share), rel=1e-3)
    assert shares.error_x.arrayminus[0] == pytest.approx(100 * (share - max(0, share - half)), rel=1e-3)
    whole: Any = scores.figure()
    assert whole.layout.xaxis.title.text == f"%; dotted: chance, {chance:.1f} %" and len(whole.data) == 3
    with pytest.raises(ValueError, match="a control of the same maps"):
        scores.figure(control=score_masks(maps.select([0]), masks))


def test_a_backdoored_models_heads_find_the_trigger() -> None:
    model, facts = load_bundled("shapes-badnet"), card("shapes-badnet")["backdoor"]
    trigger, batch = from_card(facts["trigger"]), Shapes(100, seed=3).draw(range(100))
    masks = trigger.mask(*model.image_size, indices=batch.indices)
    clean, triggered = (
        score_masks(contribution_maps(model, model.normalize(x), facts["target"], heads[-2:]), masks)
        for x in (batch.images, trigger(batch.images, batch.indices))
    )
    assert triggered.mean_share.max() > 0.9 and triggered.hit_rate.max() > 0.9
    assert clean.mean_share.max() < 0.25  # the control: the same places without a trigger
    assert triggered.mean_share.min() < 0.1  # and not every head is infected (Finding 3)
    attention = score_masks(
        attention_maps(model, model.normalize(trigger(batch.images, batch.indices)), heads[-2:]), masks
    )
    best = triggered.order[0]
    assert attention.mean_share[best] > 0.8
    assert triggered.labels[best] in repr(triggered) and "hit_rate" in triggered._repr_html_()


@pytest.mark.usefixtures("ours_alone")
def test_errors_say_what_to_do(maps: TokenMaps, masks: Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"boolean masks \[batch, h, w\] = \[6, 17, 21\]; .*\[6, 17, 20\]; give one"
    ):
        score_masks(maps, masks[..., :-1])
    with pytest.raises(ValueError, match=r"boolean masks .*received torch\.float32"):
        score_masks(maps, masks.float())
    unseen = masks.clone()
    unseen[[1, 4]] = False
    unseen[1, -1] = True  # in the margin alone
    with pytest.raises(
        ValueError, match=r"touch none, first of image 1 \(2 in all\); leave those images out"
    ):
        score_masks(maps, unseen)
    with pytest.raises(ValueError, match=r"expected inside of \('touched', 'covered'\); received 'near'"):
        score_masks(maps, masks, inside="near")  # pyright: ignore[reportArgumentType]
