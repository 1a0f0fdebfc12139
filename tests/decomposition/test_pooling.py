"""Heads of an attention pool: their terms against a slow sum, and all that reads a decomposition reads this one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from decompclip.decomposition.capture import decompose, decompose_pool
from decompclip.decomposition.components import heads, mlps
from decompclip.decomposition.maps import fingerprint
from decompclip.decomposition.moments import Moments
from decompclip.decomposition.terms import DecompositionError
from decompclip.operators.attention import contribution_maps
from decompclip.operators.attribution import attribute
from decompclip.operators.inputs import TextFeatures
from decompclip.operators.retrieval import nearest
from decompclip.operators.textspan import fit_textspans, textspan
from decompclip.tower.vit import HookedViT
from tests.conftest import MakeTower
from tests.decomposition.test_families import FAMILIES

POOLS = [name for name, config in FAMILIES.items() if config.get("pool") == "attention"]


@pytest.fixture(params=POOLS)
def visual(request: pytest.FixtureRequest, make_tower: MakeTower) -> HookedViT:
    return make_tower(dtype=torch.float64, **FAMILIES[request.param])


@torch.no_grad()
@pytest.mark.parametrize("normalize", [False, True])
def test_terms_and_tokens_of_the_pools_heads(visual: HookedViT, images: Tensor, normalize: bool) -> None:
    images = images.double()
    features, cache = visual.run_with_cache(images)
    length = features.norm(dim=1) if normalize else torch.ones(5, dtype=torch.float64)
    d = decompose_pool(visual, images, normalize=normalize, tokens=True)
    assert d.sum_error < 1e-13 and (d.n_layers, d.n_heads) == (1, visual.cfg.pool_heads)
    torch.testing.assert_close(d.features, features / length[:, None])
    pool: Any = visual.pool
    rows = cache["resid_post", -1][:, visual.cfg.pooled_rows]
    bare = F.layer_norm(rows, rows.shape[-1:], eps=visual.cfg.ln_eps) * visual.ln_final.w
    scale = cache["pool.ln_post.hook_scale"][:, 0] if pool.ln_post is not None else torch.ones(5, 1)
    for head in range(visual.cfg.pool_heads):
        pattern = cache["pool.hook_pattern"][:, head, 0]
        written = (bare @ pool.W_V[head]) @ pool.W_O[head]
        if pool.ln_post is not None:
            written = (written - written.mean(-1, keepdim=True)) / scale[:, None] * pool.ln_post.w
        written = written if visual.proj is None else written @ visual.proj
        tokens = pattern[..., None] * written / length[:, None, None]
        torch.testing.assert_close(d.tokens(0, head), tokens)
        torch.testing.assert_close(d.heads[:, 0, head], tokens.sum(1))
        torch.testing.assert_close(d.attention(0, head), pattern)
    kept, mark = d.token_terms, d.maps.fingerprint
    assert kept is not None and kept.kept.tolist() == [[True] * d.n_heads]
    assert (kept.image_size, kept.patch_size) == ((24, 16), (8, 8))
    assert (
        mark is not None
        and torch.equal(mark, fingerprint(visual))
        and (d.maps.d_head, d.maps.extras) == (pool.d_head, 0)
    )
    if pool.mlp is not None:
        torch.testing.assert_close(d.mlps[:, 0], decompose(visual, images, normalize=normalize).pool[:, 0])
    assert not d.embed.any()


@torch.no_grad()
def test_what_reads_a_decomposition_reads_the_pools(visual: HookedViT, images: Tensor) -> None:
    images = images.double()
    d = decompose_pool(visual, images, normalize=True, tokens=True)
    texts = F.normalize(
        torch.randn(30, d.d_embed, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), dim=1
    )
    found = attribute(d, texts, tokens=True)
    unit = F.normalize(visual(images), dim=1)
    torch.testing.assert_close(found.values.sum(1) + found.rest, unit @ texts.T)
    torch.testing.assert_close(found.rest, d.bias @ texts.T)
    maps = next(contribution_maps(d, texts[:1]))
    torch.testing.assert_close(maps.total.T.double(), d.heads[:, 0] @ texts[0], rtol=1e-4, atol=1e-6)
    assert maps.patches.shape[2:] == (3, 2)
    x = F.normalize(d.heads[:, 0, 1], dim=1)
    near = nearest(d, heads[0, 1], 2, k=1)
    alike = x @ x[2]
    alike[2] = -2
    assert int(near.indices[0, 0]) == int(alike.argmax())
    many = torch.randn(64, 3, 24, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    moments = Moments.of(decompose_pool(visual, many, normalize=True))
    pool_texts = TextFeatures(tuple(map(str, range(30))), texts)
    span = fit_textspans(moments, pool_texts, heads[0, 1], n_texts=5).spans[0]
    terms = decompose_pool(visual, many, normalize=True).heads[:, 0, 1]
    model: Any = SimpleNamespace(visual=visual, cfg=visual.cfg)
    again = textspan(model, 0, 1, images=moments, texts=pool_texts, n_texts=5)
    assert again.texts == span.texts
    best = (terms @ torch.linalg.pinv(terms) @ terms @ texts.T).std(0)
    assert span.indices[0] == int(best.argmax()) and span.explained > 0
    edited = d.edit(coords=d.coords * 0, mlps=d.mlps)
    torch.testing.assert_close(edited.features, d.bias + d.mlps[:, 0])
    assert attribute(d, texts[0], components=heads[0] | mlps[0]).values.shape[1] == visual.cfg.pool_heads + 1


def test_mistakes_are_told(make_tower: MakeTower, tower: HookedViT, images: Tensor) -> None:
    with pytest.raises(
        ValueError, match="pools by attention, such as SigLIP's or PE's; received one with pool='cls'"
    ):
        decompose_pool(tower, images)
    visual = make_tower(**FAMILIES["PE"])
    with (
        visual.hooks(fwd_hooks=[("pool.hook_attn_out", lambda x, hook: x + 1)]),
        pytest.raises(DecompositionError, match=r"edit pool.hook_z or .*capture\.decompose_pool"),
    ):
        decompose_pool(visual, images)
    with pytest.raises(DecompositionError, match="finite features; received infinite ones or nan"):
        decompose_pool(visual, images * torch.nan)


def test_a_miss_as_large_as_the_tolerance_is_allowed(make_tower: MakeTower, images: Tensor) -> None:
    visual = make_tower(**FAMILIES["PE"])
    for decomposed in (decompose, decompose_pool):
        miss = decomposed(visual, images).sum_error
        assert decomposed(visual, images, tolerance=miss).sum_error == miss > 0
        with pytest.raises(DecompositionError, match="a miss of"):
            decomposed(visual, images, tolerance=0.9 * miss)
