"""Two processes that share each batch are one process with the whole of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from decompclip.training.finetune import finetune

from .conftest import RandomPairs, small_clip
from .spread import RECIPES, gradients_of_first_step


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("spread.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, str(script), str(folder)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", list(RECIPES))
def test_gradients_are_those_of_the_whole_batch(ranks: list[dict[str, Any]], name: str) -> None:
    whole = gradients_of_first_step(RECIPES[name], None)
    assert sum(gradient.abs().sum() for gradient in whole.values()) > 1
    for found in ranks:
        assert found["processes"] == 2
        assert found[name].keys() == whole.keys()
        for key, gradient in whole.items():
            torch.testing.assert_close(found[name][key], gradient, rtol=1e-4, atol=1e-6, msg=f"{name}: {key}")


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_training_ends_with_the_same_model(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (found[f"{name} weights"] for found in ranks)
    assert all(torch.equal(first[key], second[key]) for key in first)  # bit for bit
    done = finetune(small_clip(), RandomPairs(), RECIPES[name], log_every=1)
    # Not weight by weight: AdamW blows up the rounding in what has no gradient, such as the keys' biases.
    other = small_clip().to_open_clip()
    other.load_state_dict(first)
    probe, texts = RandomPairs(seed=5).batch(0, 16)
    ours, theirs = (
        model((probe - 0.4) / 0.5, done.model.tokenizer(texts))
        for model in (done.model.to_open_clip(), other)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    for found in ranks:
        assert found[f"{name} losses"] == pytest.approx([e["loss"] for e in done.history], abs=1e-3)


def test_a_batch_that_processes_do_not_divide_is_refused(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["error"] == "expected a batch that 2 processes divide; received batch_size 7"
