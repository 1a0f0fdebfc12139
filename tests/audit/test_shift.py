"""Differences of means in head coordinates against a plain computation on the terms themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from decompclip.audit.collect import open_source
from decompclip.audit.components import shift
from decompclip.data.shapes import PROPERTIES
from decompclip.decomposition.decomposition import Decomposition
from decompclip.models.clip import HookedCLIP


@pytest.fixture
def pair(model: HookedCLIP) -> tuple[Decomposition, Decomposition]:
    clean, suspect = (
        model.decompose(
            next(open_source(spec, model, PROPERTIES["shape"], limit=40).batches(40)).images, normalize=True
        )
        for spec in ("shapes", "shapes:badnet")
    )
    return clean, suspect


def plain(clean: Tensor, suspect: Tensor, paired: bool) -> tuple[Tensor, Tensor]:
    """Difference of means and its standard error, number by number."""
    difference = suspect.mean(0) - clean.mean(0)
    if paired:
        return difference, (suspect - clean).std(0) / len(clean) ** 0.5
    return difference, (clean.var(0) / len(clean) + suspect.var(0) / len(suspect)).sqrt()


@pytest.mark.parametrize("paired", [True, False])
def test_it_is_what_the_terms_say(pair: tuple[Decomposition, Decomposition], paired: bool) -> None:
    clean, suspect = pair
    if not paired:
        suspect = suspect[:25]
    toward = torch.randn(16, generator=torch.Generator().manual_seed(0))
    found = shift(clean, suspect, toward, paired=paired)
    for kind in ("heads", "mlps"):
        a, b = (getattr(d, kind).double() for d in (clean, suspect))
        mean, error = plain(a, b, paired)
        torch.testing.assert_close(
            getattr(found, f"{kind}_distance"), mean.norm(dim=-1), rtol=1e-4, atol=1e-8
        )
        torch.testing.assert_close(getattr(found, f"{kind}_floor"), error.norm(dim=-1), rtol=1e-4, atol=1e-8)
        push, width = plain(a @ toward.double(), b @ toward.double(), paired)
        torch.testing.assert_close(getattr(found, f"{kind}_contribution"), push, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(getattr(found, f"{kind}_error"), 1.959964 * width, rtol=1e-4, atol=1e-7)
    whole, parts = found.totals["all"][0], [found.totals[name][0] for name in ("heads", "mlps", "rest")]
    assert whole == pytest.approx(sum(parts), abs=1e-6)
    assert found.totals["heads"][0] == pytest.approx(float(found.heads_contribution.sum()), abs=1e-6)


def test_paired_images_that_are_equal_do_not_differ(pair: tuple[Decomposition, Decomposition]) -> None:
    clean, _ = pair
    found = shift(clean, clean, torch.ones(16), paired=True)
    assert found.heads_distance.max() == found.mlps_floor.max() == 0
    assert found.totals["all"] == (0, 0)


def test_one_image_has_an_unknown_error(pair: tuple[Decomposition, Decomposition]) -> None:
    clean, suspect = pair
    found = shift(clean[:1], suspect[:1], torch.ones(16), paired=False)
    assert found.heads_floor.isnan().all() and found.mlps_error.isnan().all()
