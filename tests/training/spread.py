"""Run by `test_processes`, as two processes: fine-tune a small CLIP, and write weights and gradients of each rank."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parent))
from conftest import RandomPairs, small_clip  # pyright: ignore[reportMissingImports]

from decompclip.training import finetune as module
from decompclip.training.recipes import FineTuning

RECIPES = {
    name: FineTuning(epochs=1, batch_size=8, lr=1e-3, loss=name)  # pyright: ignore[reportArgumentType]
    for name in ("clip", "grouped", "cleanclip")
}


def gradients_of_first_step(recipe: FineTuning, accelerator: Accelerator | None) -> dict[str, torch.Tensor]:
    """What the first backward pass leaves, before any update."""
    kept: dict[str, torch.Tensor] = {}

    def one_step(modules: Any, loss: Any, *_: Any, **__: Any) -> list[dict[str, float]]:
        loss(0).backward()
        kept.update({name: p.grad.clone() for name, p in modules["clip"].named_parameters()})
        return [{"step": 1, "loss": 0.0}]

    whole, module.train = module.train, one_step  # type: ignore[assignment]
    try:
        module.finetune(small_clip(), RandomPairs(), recipe, accelerator=accelerator)
    finally:
        module.train = whole
    return kept


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    found: dict[str, Any] = {"processes": accelerator.num_processes}
    for name, recipe in RECIPES.items():
        found[name] = gradients_of_first_step(recipe, accelerator)
        done = module.finetune(
            small_clip(),
            RandomPairs(),
            recipe,
            accelerator=accelerator,
            checkpoint=folder / f"{name}.pt",
            log_every=1,
        )
        found[f"{name} weights"] = done.model.to_open_clip().state_dict()
        found[f"{name} losses"] = [entry["loss"] for entry in done.history]
    try:
        odd = FineTuning(epochs=1, batch_size=7)
        module.finetune(small_clip(), RandomPairs(), odd, accelerator=accelerator)
    except ValueError as error:
        found["error"] = str(error)
    torch.save(found, folder / f"rank{accelerator.process_index}.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
