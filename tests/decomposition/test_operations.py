"""What a GPU pays for: operations and arithmetic of a decomposition, and of maps, beside those of a plain run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from analyses.benchmarks.benchmark_towers import counts
from decompclip.decomposition import decomposition, maps
from decompclip.decomposition.capture import _held, decompose
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.terms import AttentionCapture, Rows
from decompclip.operators.attention import contribution_maps
from decompclip.tower.vit import HookedViT

MakeTower = Callable[..., HookedViT]
TOWERS = {
    "ViT-B-32": {},
    "SigLIP": {"pool": "attention", "pool_heads": 4, "pool_mlp": 40, "n_prefix": 0, "projection": False, "d_embed": 32},
    "EVA02": {"rope": "half", "attn_norm": True, "gated": True, "mlp_norm": True},
}  # fmt: skip


@pytest.fixture(params=TOWERS)
def visual(request: pytest.FixtureRequest, make_tower: MakeTower) -> HookedViT:
    return make_tower(n_layers=12, **TOWERS[request.param]).requires_grad_(False)


@torch.no_grad()
def test_a_decomposition_takes_half_as_many_operations_again(visual: HookedViT, images: torch.Tensor) -> None:
    plain, _ = counts(lambda: visual(images))
    taken, _ = counts(lambda: decompose(visual, images))
    assert taken <= 1.5 * plain


@torch.no_grad()
def test_maps_of_all_heads_toward_many_texts_take_twice_as_many(
    visual: HookedViT, images: torch.Tensor
) -> None:
    texts = torch.randn(100, visual.cfg.d_embed, generator=torch.Generator().manual_seed(3))
    plain, _ = counts(lambda: visual(images))
    taken, _ = counts(lambda: list(contribution_maps(decompose(visual, images, tokens=True), texts)))
    assert taken <= 2 * plain


def test_little_memory_makes_parts_and_changes_nothing(
    visual: HookedViT, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = torch.randn(7, visual.cfg.d_embed, generator=torch.Generator().manual_seed(3))
    budgets: list[tuple[int, int]] = []
    of_pieces = decomposition.pieces

    def pieces(count: int, size: int, budget: int) -> Any:
        budgets.append((count, size))
        return of_pieces(count, size, budget)

    def found() -> tuple[Decomposition, torch.Tensor]:
        d = decompose(visual, images, tokens=True)
        return d, torch.stack([maps.patches for maps in contribution_maps(d, texts)])

    whole, maps = found()
    for where in ("capture", "decomposition"):
        monkeypatch.setattr(f"decompclip.decomposition.{where}.pieces", pieces)
    for where in ("capture.room", "decomposition.temporary"):
        monkeypatch.setattr(f"decompclip.decomposition.{where}", lambda device: 1)
    monkeypatch.setattr("decompclip.operators.attention.room", lambda device: 1)
    parts, again = found()
    torch.testing.assert_close(parts.coords, whole.coords)
    torch.testing.assert_close(again, maps, rtol=1e-4, atol=1e-5)
    assert whole.token_terms is not None
    # Of the 48 heads, what the products of one take with all images.
    one = whole.token_terms.scale.shape[2] * whole.token_terms.values[:, 0].nbytes
    assert (48, one) in budgets
    monkeypatch.setattr("decompclip.decomposition.decomposition.temporary", lambda device: 24 * one)
    torch.testing.assert_close(found()[1], maps, rtol=1e-4, atol=1e-5)  # two parts
    # And the batch, where a run holds something of each of its images.
    held = _held(visual, images, whole.token_terms.kept)
    assert ((len(images), held) in budgets) == (held > 0)


@torch.no_grad()
def test_what_a_run_holds_of_an_image_is_told(visual: HookedViT, images: torch.Tensor) -> None:
    kept = torch.rand(12, 4, generator=torch.Generator().manual_seed(1)) < 0.3
    rows, attention = Rows(visual, with_mean=False), AttentionCapture(visual, kept)
    with visual.hooks(fwd_hooks=rows.hooks() + attention.hooks()):
        visual(images)
    streams = [rows.seen["blocks.0.hook_resid_pre"], *(x for kind in rows._writes.values() for x in kind)]
    held = sum(x.nbytes for x in streams) if rows.each else 0
    assert _held(visual, images, None) == held / len(images)
    if not attention.single:
        held += attention.seen["q"].nbytes + attention.seen["k"].nbytes
    assert _held(visual, images, kept) == held / len(images)
    if not rows.each:  # a row alone, and no view that keeps all of them
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in rows.seen.values())


def test_a_batch_stays_whole_under_hooks_that_hold_something_of_each_image(
    make_tower: MakeTower, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    visual = make_tower(pool="mean").requires_grad_(False)
    monkeypatch.setattr("decompclip.decomposition.capture.room", lambda device: 1)
    sizes: list[int] = []

    def seen(activation: torch.Tensor, hook: object) -> None:
        sizes.append(len(activation))

    with visual.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", seen)]):
        decompose(visual, images, tokens=True)
    assert sizes == [len(images)]


def test_a_quarter_of_what_a_gpu_has_free_may_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch holds of it without use is free too."""
    told = {"mem_get_info": (1000, 8000), "memory_reserved": 400, "memory_allocated": 100}
    for name, answer in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    assert maps.room(torch.device("cuda")) == maps.temporary(torch.device("cuda")) == (1000 + 300) // 4
    told["mem_get_info"] = (2**40, 2**41)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: told["mem_get_info"])
    assert maps.temporary(torch.device("cuda")) == (2**40 + 300) // 4


def test_a_quarter_of_the_memory_that_a_container_leaves_may_be_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cpu, memory = torch.device("cpu"), SimpleNamespace(available=2**40)
    monkeypatch.setattr(maps.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(maps, "Path", lambda folder: tmp_path)
    assert (maps.room(cpu), maps.temporary(cpu)) == (2**38, maps.CACHED)  # no container
    for limit, used, left in (("1000", "300", 175), ("1000", "1001", 0), ("max", "300", 2**38)):
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text(used)
        assert maps.room(cpu) == left
    memory.available = 400
    assert maps.room(cpu) == maps.temporary(cpu) == 100


def test_pieces_are_few_alike_and_whole() -> None:
    assert [*maps.pieces(10, 3, 12)] == [slice(0, 3), slice(3, 6), slice(6, 10)]
    assert [*maps.pieces(3, 5, 1)] == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert [*maps.pieces(4, 0, 8)] == [*maps.pieces(4, 1, 4)] == [slice(0, 4)]
