"""Shares and hits equal plain loops; chance and the clean model stand beside what a backdoored model shows."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from decompclip.attacks.registry import from_card
from decompclip.data.shapes import Shapes
from decompclip.decomposition.components import heads
from decompclip.models.bundled import card, load_bundled
from decompclip.operators.attention import attention_maps, contribution_maps
from decompclip.operators.mask_scores import MEASURES, box_masks, score_masks, segment
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
    shares, hits, others, other_hits, line, bars = plot.data
    assert bars.name == "95 % interval over images"
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
    assert whole.layout.xaxis.title.text == f"%; dotted: chance, {chance:.1f} %" and len(whole.data) == 4
    assert (shares.marker.symbol, hits.marker.symbol) == ("circle", "diamond")
    assert (others.marker.symbol, other_hits.marker.symbol) == ("circle-open", "diamond-open")
    # of one image there is no error, and no interval; of two far apart it ends at 0 and 1
    single: Any = score_masks(maps.select(images=[0]), masks[:1]).figure(count=1).data[0]
    assert np.isnan(single.error_x.array).all() and np.isnan(single.error_x.arrayminus).all()
    patches = torch.zeros(1, 2, ROWS, COLUMNS)
    patches[0, 0, 0, 0] = patches[0, 1, -1, -1] = 0.5  # at the mask, and away from it
    apart = score_masks(maps_of(patches), masks[[0, 0]])
    ends: Any = apart.figure().data[0]
    assert apart.hit.tolist() == [[True, False]] and list(ends.x) == [50.0]
    assert list(ends.error_x.array) == list(ends.error_x.arrayminus) == pytest.approx([50.0])
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


# Objects


def test_segmentation_by_hand() -> None:
    """Two masks of 4 x 4 pixels and maps of the same size, which need no enlarging: counted on paper."""
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[0, :2, :2] = True  # 4 pixels
    masks[1, :, 3] = True  # 4 pixels
    maps = torch.zeros(2, 4, 4)
    maps[0, :2, :] = 3.0  # 8 pixels above the mean, 4 of them right
    maps[1, :, 3] = 1.0  # as the mask
    found = segment({"a": maps}, masks)
    accuracy, iou, precision = found.scores[0].tolist()
    assert accuracy == (12 + 16) / 32
    # object: 4 + 4 of 8 + 4 pixels; background: 8 + 12 of 12 + 12
    assert iou == pytest.approx((8 / 12 + 20 / 24) / 2)
    # image 0 at level 1: 8 pixels as object (4 right), 8 as background (8 right): 12 of 16; at level 0 all 16 of 32
    assert precision == pytest.approx(((12 / 16 * 12 / 16 + 4 / 16 * 16 / 32) + 1) / 2)
    one = torch.zeros(1, 4, 4)
    one[0, 1, 2] = 1.0
    ends = segment(
        {"itself": one, "flat": torch.ones(1, 4, 4)}, one > 0
    )  # a flat map calls nothing the object
    assert ends.scores[0].tolist() == [1, 1, 1]
    assert ends.scores[1].tolist() == pytest.approx([15 / 16, 15 / 32, (15 / 16) ** 2 + 1 / 32])


def test_segmentation_beside_plain_loops() -> None:
    draws = torch.Generator().manual_seed(3)
    masks = torch.rand(5, 12, 8, generator=draws) > 0.6
    maps = torch.randn(5, 3, 2, generator=draws)
    found = segment({"x": maps, "y": -maps}, masks)
    right, both, either, precision = 0, [0, 0], [0, 0], []
    for one, mask in zip(maps, masks, strict=True):
        large = torch.nn.functional.interpolate(one[None, None].double(), (12, 8), mode="bilinear")[0, 0]
        level = (large - large.min()) / (large.max() - large.min())
        pairs = []
        for y in range(12):
            for x in range(8):
                said, true = bool(level[y, x] > level.mean()), bool(mask[y, x])
                right += said == true
                for side in (0, 1):
                    both[side] += said == true == bool(side)
                    either[side] += said == bool(side) or true == bool(side)
                pairs += [(float(1 - level[y, x]), not true), (float(level[y, x]), true)]
        total = 0.0
        for rank in {rank for rank, _ in pairs}:  # equal ranks stand or fall together
            above = [true for other, true in pairs if other >= rank]
            total += sum(true for other, true in pairs if other == rank) * sum(above) / len(above)
        precision.append(total / sum(true for _, true in pairs))
    expected = [
        right / (5 * 96),
        sum(b / e for b, e in zip(both, either, strict=True)) / 2,
        sum(precision) / 5,
    ]
    torch.testing.assert_close(found.scores[0].tolist(), expected, rtol=1e-9, atol=1e-9)


def test_intervals_of_segmentation_are_over_images() -> None:
    draws = torch.Generator().manual_seed(4)
    masks = torch.rand(40, 6, 6, generator=draws) > 0.5
    good = masks.float() + torch.rand(40, 6, 6, generator=draws)
    found = segment({"good": good, "noise": torch.rand(40, 6, 6, generator=draws)}, masks)
    low, high = found.intervals(draws=500)
    assert (low < found.scores).all() and (found.scores < high).all()
    spread = found.precision.std(1) / 40**0.5
    torch.testing.assert_close((high - low)[:, 2], 2 * 1.96 * spread, rtol=0.2, atol=0.0)
    chosen = torch.randint(40, (500, 40), generator=torch.Generator().manual_seed(0))
    drawn = found.precision.numpy()[:, chosen].mean(2)  # [map draw]
    np.testing.assert_allclose(np.percentile(drawn, [2.5, 97.5], axis=1), torch.stack([low, high])[..., 2])
    for given in (("x", "good"), ("good", "x")):
        with pytest.raises(ValueError, match=r"expected [ab] of \('good', 'noise'\); received 'x'"):
            found.difference(*given)
    value, least, most = found.difference("good", "noise", draws=500)
    ends = np.percentile(drawn[0] - drawn[1], [2.5, 97.5])
    np.testing.assert_allclose(ends, [float(least[2]), float(most[2])])
    assert (
        (least > 0).all() and torch.equal(value, found.scores[0] - found.scores[1]) and (most > value).all()
    )
    frame, (low, high) = found.to_frame(), found.intervals()
    assert list(zip(frame["map"], frame["measure"], strict=True)) == list(product(found.labels, MEASURES))
    for name, numbers in (("score", found.scores), ("low", low), ("high", high)):
        assert frame[name].tolist() == numbers.flatten().tolist()
    assert "highest AP good)" in repr(found)
    plot: Any = found.figure()
    *panels, _ = plot.data  # a measure each, and the legend's word on intervals
    assert len(panels) == len(MEASURES)
    assert [note.text for note in plot.layout.annotations] == [
        f"({letter}) {measure}" for letter, measure in zip("abc", MEASURES, strict=True)
    ]
    assert plot.layout.xaxis2.title.text == "%"
    for place, panel in enumerate(panels):
        score, least, most = (100 * x[:, place] for x in (found.scores, low, high))
        assert list(panel.x) == pytest.approx(score.tolist())
        assert list(panel.error_x.array) == pytest.approx((most - score).tolist())
        assert list(panel.error_x.arrayminus) == pytest.approx((score - least).tolist())


@pytest.mark.usefixtures("ours_alone")
def test_boxes_and_what_segmentation_refuses() -> None:
    masks = box_masks(torch.tensor([[0, 0, 0, 0], [1, 2, 3, 2]]), 3, 4)
    assert masks[0].nonzero().tolist() == [[0, 0]] and masks[1].nonzero().tolist() == [[2, 1], [2, 2], [2, 3]]
    whole = [0, 0, 3, 2]
    assert box_masks(torch.tensor([whole]), 3, 4).all()
    for box in ([0, 0, 4, 1], [0, 0, 1, 3], [2, 0, 1, 1], [0, 2, 1, 1], [0, -1, 1, 1], [-1, 0, 1, 1]):
        for place, boxes in ((0, [box, whole]), (1, [whole, box, box])):
            with pytest.raises(ValueError, match=rf"within 3 x 4 pixels; received .* of image {place};"):
                box_masks(torch.tensor(boxes), 3, 4)
    for boxes in (torch.tensor([0, 0, 1, 1]), torch.tensor([[0, 0, 1, 1, 1]])):
        with pytest.raises(ValueError, match=r"expected boxes \[batch, 4\]; received"):
            box_masks(boxes, 3, 4)
    maps = torch.rand(2, 2, 2)
    odd_masks = (masks.byte(), 255 * masks.byte(), masks.float(), masks[:, None], masks[0])
    for odd in odd_masks:  # of bytes `~` is no "not": numbers were wrong, and nothing said so
        with pytest.raises(ValueError, match=r"boolean masks \[batch, h, w\]; received .* masks > 0"):
            segment({"a": maps}, odd)
    for odd in (maps, {"a": maps[None]}, {"a": [1, 2]}):
        with pytest.raises(
            ValueError, match=r"maps \[batch, row, column\] by name; received {.*maps\.patches"
        ):
            segment(odd, masks)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="draws to be a whole number of draws, at least 1; received 0"):
        segment({"a": maps}, masks).intervals(draws=0)
    with pytest.raises(ValueError, match="a map for each of 2 masks"):
        segment({"a": torch.rand(3, 2, 2)}, masks)
    with pytest.raises(ValueError, match="no maps"):
        segment({}, masks)
    with pytest.raises(ValueError, match="nan or inf in 'a'"):
        segment({"a": torch.full((2, 2, 2), torch.nan)}, masks)
