"""Two processes that share each batch are one process with the whole of it."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from decompclip.training import finetune as module
from decompclip.training.finetune import finetune
from decompclip.training.recipes import FineTuning
from tests.commands import in_processes

from .conftest import RandomPairs, small_clip

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="forks processes"),
    pytest.mark.usefixtures("single_thread"),
]

RECIPES = {
    name: FineTuning(epochs=1, batch_size=8, lr=1e-3, loss=name)  # pyright: ignore[reportArgumentType]
    for name in ("clip", "grouped", "cleanclip")
}


def gradients_of_first_step(
    recipe: FineTuning, accelerator: Accelerator | None = None
) -> dict[str, torch.Tensor]:
    """What the first backward pass leaves, before any update."""
    kept: dict[str, torch.Tensor] = {}

    def one_step(modules: Any, loss: Any, *_: Any, **__: Any) -> list[dict[str, float]]:
        loss(0).backward()
        kept.update({name: p.grad.clone() for name, p in modules["clip"].named_parameters()})
        return [{"step": 1, "loss": 0.0}]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "train", one_step)
        finetune(small_clip(), RandomPairs(), recipe, accelerator=accelerator)
    return kept


@pytest.fixture(scope="module")
def ranks(single_thread: None, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")

    def work(_: int) -> dict[str, Any]:
        accelerator = Accelerator(cpu=True)
        found: dict[str, Any] = {"processes": accelerator.num_processes}
        for name, recipe in RECIPES.items():
            checkpoint = folder / f"{name}.pt"
            found[name] = gradients_of_first_step(recipe, accelerator)
            done = finetune(
                small_clip(),
                RandomPairs(),
                recipe,
                accelerator=accelerator,
                checkpoint=checkpoint,
                log_every=1,
            )
            found[f"{name} weights"] = done.model.to_open_clip().state_dict()
            found[f"{name} losses"] = [entry["loss"] for entry in done.history]
        with pytest.raises(ValueError, match="expected a batch") as refused:
            finetune(small_clip(), RandomPairs(), FineTuning(epochs=1, batch_size=7), accelerator=accelerator)
        return found | {"error": str(refused.value)}

    return in_processes(2, work, grace=60)


@pytest.mark.parametrize("name", list(RECIPES))
def test_gradients_are_those_of_the_whole_batch(ranks: list[dict[str, Any]], name: str) -> None:
    whole = gradients_of_first_step(RECIPES[name])
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
