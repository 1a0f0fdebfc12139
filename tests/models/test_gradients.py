"""Functions that need gradients have them whatever mode their caller is in."""

from __future__ import annotations

import pytest
import torch

import decompclip
from decompclip.attacks.patch import BadNet, adversarial, optimise_patch, zero_shot_logits
from decompclip.data.shapes import Shapes, ShapesPairs
from decompclip.operators.patching import attribution_patching
from decompclip.training.finetune import finetune
from decompclip.training.recipes import FineTuning

MODES = [torch.no_grad, torch.inference_mode]


@pytest.mark.parametrize("mode", MODES)
def test_attribution(mode: type) -> None:
    def run() -> torch.Tensor:
        model = decompclip.load("shapes")
        images = Shapes(4, seed=7).draw(range(4)).images
        other = BadNet(size=7 / 48)(images, range(4))
        star = model.zero_shot_classifier()[3]
        found = attribution_patching(
            model, model.normalize(images), model.normalize(other), star, sites=["z"]
        )
        return found.effects["z"]

    plain = run()
    with mode():
        torch.testing.assert_close(run(), plain)


@pytest.mark.parametrize("mode", MODES)
def test_attacks_and_training(mode: type) -> None:
    def run() -> list[torch.Tensor]:
        model = decompclip.load("shapes")
        images = Shapes(4, seed=7).draw(range(4)).images
        logits = zero_shot_logits(model, model.zero_shot_classifier())
        moved = adversarial(images, torch.zeros(4, dtype=torch.long), logits, steps=1)
        patch = optimise_patch(model, images, images[:2], ["a star"] * 2, steps=2, batch_size=2)
        tuned = finetune(model, ShapesPairs(8), FineTuning(epochs=1, batch_size=4))
        return [moved, torch.tensor(patch.losses), tuned.model.visual.W_E.detach()]  # pyright: ignore

    plain = run()
    with mode():
        torch.testing.assert_close(run(), plain)
