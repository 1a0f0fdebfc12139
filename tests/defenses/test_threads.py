"""Fits say the same whatever the number of threads, and end: MKL's LU of a batch of matrices does neither with two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FIT = """
import sys
import open_clip, torch
import decompclip

torch.set_num_threads(1)
torch.manual_seed(0)
net = open_clip.model.CLIP(
    embed_dim=192,
    vision_cfg=dict(layers=12, width=192, head_width=16, patch_size=8, image_size=16),
    text_cfg=dict(context_length=8, vocab_size=50, width=16, heads=2, layers=1),
).eval()
model = decompclip.load(net)
kinds = torch.arange(400) % 20
images = torch.randn(20, 3, 16, 16)[kinds] + torch.randn(400, 3, 16, 16)
with torch.no_grad():
    d = model.decompose(images, normalize=True)
means = torch.stack([d.features[kinds == k].mean(0) for k in range(20)])
classifier = torch.nn.functional.normalize(means - means.mean(0), dim=1)
for threads in (1, 2):
    torch.set_num_threads(threads)
    repair = decompclip.AgnosticRep(classifier, budget=0.05).fit(d)
    torch.save(
        {
            "weights": repair.detector_.expected_.extrapolation.weights,
            "scores": repair.detector_.scores_,
            "repaired": repair(d).features,
            "threads": torch.get_num_threads(),
        },
        f"{sys.argv[1]}/{threads}.pt",
    )
"""


def test_a_repair_fitted_with_two_threads_is_that_of_one(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", FIT, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
    )
    assert run.returncode == 0, run.stderr
    assert "MKL ERROR" not in run.stdout + run.stderr
    one, two = (torch.load(tmp_path / f"{threads}.pt", weights_only=True) for threads in (1, 2))
    assert (one.pop("threads"), two.pop("threads")) == (
        1,
        2,
    )  # and the caller's number is his again afterwards
    for key, expected in one.items():
        torch.testing.assert_close(two[key], expected, rtol=1e-4, atol=1e-5, msg=key)


def test_one_thread_gives_the_number_back_after_an_error() -> None:
    from decompclip.decomposition.maps import one_thread

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="inside"), one_thread():
            assert torch.get_num_threads() == 1
            raise RuntimeError("inside")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
