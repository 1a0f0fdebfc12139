"""The analyses of defenses run, and measure what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from analyses.paper import table1
from analyses.questions import adaptive_attacker, attack_agnostic, trigger_gallery
from analyses.study.family import BundledFamily
from decompclip.attacks.patch import BadNet
from decompclip.attacks.whole_image import SIG
from decompclip.models.bundled import load_bundled
from decompclip.training.recipes import TrainingStep
from decompclip.zoo.recipes import TWINS

SHAPES = BundledFamily("shapes")


def test_every_design_is_measured_on_the_same_images() -> None:
    members = SHAPES.select(("shapes-sig",))
    record = attack_agnostic.run(attack_agnostic.Config(images=240), SHAPES, members)
    found = record["models"]["shapes-sig"]
    assert set(found["auroc"]) == set(attack_agnostic.DETECTION)
    assert set(attack_agnostic.REPAIR) < set(found)
    assert found["auroc"][attack_agnostic.SETTLED] > 0.9
    assert found["none"]["asr"]["value"] > 0.9 > found[attack_agnostic.REPAIRED]["asr"]["value"]
    assert {found[row]["cacc"]["total"] for row in attack_agnostic.REPAIR} == {240}
    about = {"attack": "SIG", "kind": "global, structured"}
    whole = {"models": {"shapes-sig": about}, "config": {"images": 240}, "found": record}
    text = attack_agnostic.table(whole)
    assert text.count("\n| ") >= len(attack_agnostic.DETECTION) + len(attack_agnostic.REPAIR)
    assert f"{100 * found['fpr_at_5']:.1f} % of fresh clean images" in attack_agnostic.finding(whole)


def test_the_penalty_reads_the_last_heads_of_the_model_in_training() -> None:
    model = load_bundled("shapes")
    net, pixels = model.to_open_clip(), torch.randn(6, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = adaptive_attacker.last_heads(net, pixels)
        _, cache = model.run_with_cache(pixels)
    torch.testing.assert_close(found, cache["z", -1][:, 0], rtol=1e-3, atol=1e-4)
    penalty = adaptive_attacker.StayNear(BadNet(size=7 / 48), 0.5, 4, model.mean, model.std)
    assert "weight=0.5" in repr(penalty)  # a checkpoint is resumed by this very penalty
    value = penalty(
        TrainingStep(net, pixels.clamp(-1, 1), torch.zeros(6, 3), pixels[:, 0, 0], pixels[:, 0, 0])
    )
    value.backward()
    assert value > 0
    visual = net.visual
    assert isinstance(visual, torch.nn.Module)
    assert visual.get_parameter("transformer.resblocks.0.attn.in_proj_weight").grad is not None


@pytest.mark.parametrize("attacker", adaptive_attacker.PIECES)
def test_pieces_are_the_patch_cut_up(attacker: str) -> None:
    patch = BadNet(size=7 / 48, seed=3)
    cut = adaptive_attacker.trigger_of(attacker, patch, 48)
    assert isinstance(cut, adaptive_attacker.Pieces)
    pixels = torch.full((3, 3, 48, 48), 0.5)
    whole, triggered = patch(pixels, [5, 6, 7]), cut(pixels, [5, 6, 7])
    for row, index in enumerate((5, 6, 7)):
        y, x = patch.region(48, 48, index)
        rest, places = whole[row, :, y, x], cut.places(48, 48, index)
        assert len(places) == cut.rows * cut.columns == {"halves": 2, "pieces": 16}[attacker]
        assert sum((a.stop - a.start) * (b.stop - b.start) for a, b in places) == 49
        left = triggered[row].clone()
        last = rest[
            :, -(places[-1][0].stop - places[-1][0].start) :, -(places[-1][1].stop - places[-1][1].start) :
        ]
        assert torch.equal(
            triggered[(row, slice(None), *places[-1])], last
        )  # pasted last, so that it is whole
        for place in places:
            left[(slice(None), *place)] = 0.5
        assert torch.equal(left, pixels[row])
    assert not torch.equal(triggered[0], triggered[1])  # each image has places of its own
    assert torch.equal(cut(pixels[:1], [6])[0], triggered[1])
    assert adaptive_attacker.trigger_of("heads", patch, 48) is patch


def test_the_paper_s_rows_stand_for_every_fine_tuning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = SHAPES.select(("shapes-sig",))
    config = table1.Config(images=120, tuned="shapes-sig", pairs=32, epochs=1, batch_size=16, lr=1e-5)
    record = {
        "models": {"shapes-sig": {"attack": "SIG", "kind": "global, structured"}},
        "found": table1.run(config, SHAPES, members, tmp_path),
    }
    rows = record["found"]["models"]["shapes-sig"]
    assert set(rows) == set(table1.settings())
    assert rows["Base-Decomp"] == rows["No Defense"]  # an exact sum answers as the tower does
    assert rows["CleanCLIP + Base-Decomp"] == rows["CleanCLIP"]
    assert {path.name for path in tmp_path.glob("*.pt")} == {
        f"tuned-shapes-sig-{name}.pt" for name in ("clean-fine-tuning", "cleanclip", "par")
    }
    assert table1.table(record).count("| SIG |") == len(table1.settings())
    assert "after CleanCLIP" in table1.finding(record)
    assert "No model was fine-tuned" in table1.finding(
        record | {"found": table1.run(table1.Config(images=120, tuned="none"), SHAPES, members)}
    )
    with pytest.raises(ValueError, match=r"expected models to tune among shapes-sig; received 'x'"):
        table1.run(table1.Config(tuned="x"), SHAPES, members)
    assert table1.chosen(table1.Config(), SHAPES.members) == {"shapes-badnet", "shapes-blended"}


def test_an_attacker_adapts_a_twin_of_its_own_family() -> None:
    config = adaptive_attacker.Config
    for wrong, message in (
        (
            config(twin="cifar10-badnet"),
            r"expected a twin of shapes .*: shapes-badnet, .*; received 'cifar10-badnet'",
        ),
        (
            config(attackers="plain,tails"),
            "expected attackers among plain, heads, halves, pieces; received 'tails'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            adaptive_attacker.run(wrong, SHAPES, SHAPES.members)
    with pytest.raises(
        ValueError, match="expected a twin of BadNet, whose patch 'halves' cuts; received one of sig"
    ):
        adaptive_attacker.trigger_of("halves", SIG(), 48)


def test_attackers_of_photographs_train_on_fewer_pairs() -> None:
    short, own = adaptive_attacker.short_recipe("photos-badnet"), TWINS["photos-badnet"]
    assert (short.trigger, short.rate, short.seed) == (own.trigger, own.rate, own.seed)
    assert short.pairs < own.pairs and short.recipe == TWINS["photos-badclip"].recipe
    assert adaptive_attacker.short_recipe("shapes-badnet") == TWINS["shapes-badnet"]


def test_attackers_who_were_not_asked_are_left_out() -> None:
    rates = {rate: {"value": 0.5, "low": 0.4, "high": 0.6} for rate in ("asr", "cacc", "control")}
    repairs = dict.fromkeys(("none", "Decomp-Rep, paper", "agnostic", "token", "token, then agnostic"), rates)
    detectors = {name: {"value": 0.9, "low": 0.8, "high": 0.95} for name in ("agnostic", "token")}
    found = {who: {"repairs": repairs, "detectors": detectors} for who in ("plain", "pieces")}
    record = {"found": {"models": {"photos-badnet": found}}}
    assert adaptive_attacker.table(record).startswith("| defense | plain | pieces |")
    assert "pieces: succeeds on 50.0 %" in adaptive_attacker.finding(record)
    assert set(adaptive_attacker.plot(record)) == {"repair", "detection"}


def test_the_gallery_shows_every_kind_of_trigger_once(tmp_path: Path) -> None:
    with Image.open(trigger_gallery.run(tmp_path / "results" / "gallery.png")) as image:
        assert image.height > 1.5 * image.width
