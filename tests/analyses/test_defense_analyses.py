"""The analyses of defenses run, and measure what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from analyses import adaptive_attacker, attack_agnostic, trigger_gallery, tuning_defenses
from decompclip.attacks.badnet import BadNet
from decompclip.models.zoo import load_bundled
from decompclip.training.losses import Seen


def test_every_design_is_measured_on_the_same_images() -> None:
    config = attack_agnostic.Config(fit_images=240, images=80)
    found = attack_agnostic.measure("shapes-sig", config)
    assert set(found["auroc"]) == set(attack_agnostic.DETECTION)
    assert set(found["repair"]) == set(attack_agnostic.REPAIR)
    assert found["auroc"]["sum of the three"] > 0.9
    assert (
        found["repair"]["none"]["asr"]["value"]
        > 0.9
        > found["repair"]["where the story changes"]["asr"]["value"]
    )
    assert {r["cacc"]["total"] for r in found["repair"].values()} == {80}
    text = attack_agnostic.table({"models": {"shapes-sig": found}})
    assert text.count("\n| ") >= len(attack_agnostic.DETECTION) + len(attack_agnostic.REPAIR)


def test_the_penalty_reads_the_last_heads_of_the_model_in_training() -> None:
    model = load_bundled("shapes")
    net, pixels = model.to_open_clip(), torch.randn(6, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = adaptive_attacker.last_heads(net, pixels)
        _, cache = model.run_with_cache(pixels)
    torch.testing.assert_close(found, cache["z", -1][:, 0], rtol=1e-3, atol=1e-4)
    penalty = adaptive_attacker.StayNear(BadNet(size=7 / 48), 0.5, 4, model.mean, model.std)
    assert "weight=0.5" in repr(penalty)  # a checkpoint is resumed by this very penalty
    value = penalty(Seen(net, pixels.clamp(-1, 1), torch.zeros(6, 3), pixels[:, 0, 0], pixels[:, 0, 0]))
    value.backward()
    assert value > 0
    visual = net.visual
    assert isinstance(visual, torch.nn.Module)
    assert visual.get_parameter("transformer.resblocks.0.attn.in_proj_weight").grad is not None


def test_the_paper_s_rows_stand_for_every_fine_tuning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tuning_defenses.Config(
        twins=("shapes-sig",),
        pairs=32,
        recipe=tuning_defenses.FineTuning(epochs=1, batch_size=16, lr=1e-5),
        images=160,
    )
    found = tuning_defenses.run(config, tmp_path)
    rows = found["models"]["shapes-sig"]
    assert list(rows) == ["none", "clean fine-tuning", "CleanCLIP", "PAR"]
    assert all(list(row) == ["as it is", "Decomp-Rep", "agnostic"] for row in rows.values())
    assert rows["none"]["as it is"]["asr"]["value"] > 0.9
    assert len(tuning_defenses.table(found).splitlines()) == 2 + 4 * 3


def test_the_gallery_shows_every_kind_of_trigger_once(tmp_path: Path) -> None:
    with Image.open(trigger_gallery.run(tmp_path / "results" / "gallery.png")) as image:
        assert image.height > 1.5 * image.width
