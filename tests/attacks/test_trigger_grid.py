"""The 2 x 2: extent and structure cross, and nothing else differs."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

import decompclip.attacks.registry as registry
from decompclip.attacks.registry import trigger_grid


@pytest.mark.parametrize("pattern", ["noise", "kitty"])
def test_each_cell_is_what_its_key_says(pattern) -> None:
    cells = trigger_grid(pattern=pattern, size=0.2, alpha=0.3, place="centre", seed=5)
    assert len(cells) == 4
    grey = torch.full((2, 3, 40, 40), 0.5)
    for (extent, structure), trigger in cells.items():
        assert (trigger.extent, trigger.structure, trigger.seed) == (extent, structure, 5)
        share = (trigger(grey) != grey).any(dim=1).float().mean().item()
        assert share > 0.9 if extent == "global" else share <= 0.04
        first, second = trigger(grey)
        assert torch.equal(first, second) is (structure == "structured")


def test_with_noise_for_pattern_only_the_redrawing_differs() -> None:
    cells = trigger_grid()
    for extent in ("local", "global"):
        one, other = asdict(cells[extent, "structured"]), asdict(cells[extent, "noise"])
        assert {key for key in one if one[key] != other[key]} == {"redraw"}


def test_local_cells_share_their_mask() -> None:
    cells = trigger_grid(pattern="kitty", size=0.15)
    one, other = (cells["local", s].mask(48, 48, range(9)) for s in ("structured", "noise"))
    assert torch.equal(one, other)


def test_bad_input_is_told() -> None:
    with pytest.raises(ValueError, match=r"expected pattern of \('noise', 'kitty'\); received 'dog'"):
        trigger_grid(pattern="dog")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"cannot be larger than the image"):
        trigger_grid(size=16)


def test_the_old_name_still_works() -> None:
    with pytest.deprecated_call(match="now decompclip.attacks.registry.trigger_grid"):
        assert registry.crossing is trigger_grid
