"""Terms sum to the feature and equal those of a plain, slow reference written from docs/method.md, section 1's formulas."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from decompclip.decomposition.capture import TOLERANCE, decompose, dtype_of
from decompclip.decomposition.components import heads, mlps
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.maps import Convention, term_maps
from decompclip.decomposition.terms import DecompositionError
from decompclip.tower.layers import blocks
from decompclip.tower.vit import HookedViT

FORMS: list[tuple[Convention, bool]] = [
    (convention, normalize) for convention in ("centred", "paper") for normalize in (False, True)
]
forms = pytest.mark.parametrize(("convention", "normalize"), FORMS)


def layer_norm(x: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * w + b


class Reference:
    """One image through the tower and into its terms, in fp64, by loops over its parameters."""

    def __init__(self, visual: HookedViT, image: Tensor) -> None:
        self.cfg = visual.cfg
        self.p = p = {name: x.detach().double() for name, x in visual.named_parameters()}
        rows, columns = self.cfg.patch_size
        patches = [
            torch.einsum("dcij,cij->d", p["W_E"], image[:, i : i + rows, j : j + columns].double())
            for i in range(0, rows * self.cfg.grid[0], rows)
            for j in range(0, columns * self.cfg.grid[1], columns)
        ]
        x = torch.cat([p["prefix"], torch.stack(patches)]) + p["W_pos"]
        if self.cfg.ln_pre:
            x = self.norm(x, "ln_pre")
        self.embed, self.writes, self.value_bias, self.mlps = x[0], [], [], []
        self.by_token: list[list[Tensor]] = []
        for layer in range(self.cfg.n_layers):
            x = x + self.attention(self.norm(x, f"blocks.{layer}.ln1"), layer)
            x = x + self.mlp(self.norm(x, f"blocks.{layer}.ln2"), layer)
        self.x = x[0]
        self.sigma = ((self.x - self.x.mean()).square().mean() + self.cfg.ln_eps).sqrt()
        self.feature = self.norm(self.x, "ln_final") @ p["proj"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        return layer_norm(x, self.p[f"{name}.w"], self.p[f"{name}.b"], self.cfg.ln_eps)

    def scale(self, layer: int, which: int) -> Tensor | float:
        return self.p.get(f"blocks.{layer}.ls{which}", 1.0)

    def attention(self, x: Tensor, layer: int) -> Tensor:
        p, d, e = self.p, self.cfg.d_model, self.cfg.d_head
        W, b = p[f"blocks.{layer}.attn.W_QKV"], p[f"blocks.{layer}.attn.b_QKV"]
        W_out, scale = p[f"blocks.{layer}.attn.W_out"], self.scale(layer, 1)
        total = p[f"blocks.{layer}.attn.b_O"] * scale
        writes, value_bias, by_token = [], [], []
        for head in range(self.cfg.n_heads):
            q, k, v = (x @ W[i + head * e :][:e].T + b[i + head * e :][:e] for i in (0, d, 2 * d))
            alpha = (q @ k.T / math.sqrt(e)).softmax(-1)
            W_O = W_out[:, head * e :][:, :e].T
            total = total + alpha @ v @ W_O * scale
            bias = b[2 * d + head * e :][:e]
            writes.append(alpha[0] @ v @ W_O * scale)
            value_bias.append(bias @ W_O * scale)
            by_token.append((alpha[0][:, None] * (v - bias)) @ W_O * scale)
        self.writes.append(writes)
        self.value_bias.append(value_bias)
        self.by_token.append(by_token)
        return total

    def mlp(self, x: Tensor, layer: int) -> Tensor:
        p, name = self.p, f"blocks.{layer}.mlp"
        pre = x @ p[f"{name}.W_in"].T + p[f"{name}.b_in"]
        post = (
            pre * torch.sigmoid(1.702 * pre)
            if self.cfg.activation == "quick_gelu"
            else pre * torch.special.ndtr(pre)
        )
        written = (post @ p[f"{name}.W_out"].T + p[f"{name}.b_out"]) * self.scale(layer, 2)
        self.mlps.append(written[0])
        return written

    def read(self, write: Tensor, share_of_mean: Tensor | None = None) -> Tensor:
        """`gamma * (w - mean) / sigma @ proj`."""
        mean = write.mean(-1, keepdim=True) if share_of_mean is None else share_of_mean
        return self.p["ln_final.w"] * (write - mean) / self.sigma @ self.p["proj"]

    def terms(self, convention: Convention, normalize: bool) -> dict[str, Tensor]:
        beta = self.p["ln_final.b"] @ self.p["proj"]
        L, H = self.cfg.n_layers, self.cfg.n_heads
        if convention == "centred":
            head = [
                [self.read(w - b) for w, b in zip(*pair, strict=True)]
                for pair in zip(self.writes, self.value_bias, strict=True)
            ]
            mlp, embed = [self.read(m) for m in self.mlps], self.read(self.embed)
            biases = [
                self.read(sum(self.value_bias[l], self.p[f"blocks.{l}.attn.b_O"] * self.scale(l, 1)))
                for l in range(L)
            ]
            biases.append(beta)
        else:
            n, mean = 2 * L + 1, self.x.mean()
            out = [self.p[f"blocks.{l}.attn.b_O"] * self.scale(l, 1) / H for l in range(L)]
            head = [
                [self.read(w + out[l], mean / n / H) + beta / n / H for w in self.writes[l]] for l in range(L)
            ]
            mlp = [self.read(m, mean / n) + beta / n for m in self.mlps]
            embed = self.read(self.embed, mean / n) + beta / n
            biases = [torch.zeros_like(beta)]
        length = self.feature.norm() if normalize else 1
        parts = {
            "heads": torch.stack([torch.stack(row) for row in head]),
            "mlps": torch.stack(mlp),
            "embed": embed,
            "bias": torch.stack(biases).sum(0),
        }
        return {name: x / length for name, x in parts.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_scale": True},
        {"ln_pre": False, "activation": "quick_gelu"},
        {"n_layers": 1, "n_heads": 1, "d_head": 32, "image_size": (8, 16)},
    ],
    ids=["layer_scale", "no_ln_pre", "one_head"],
)
@forms
def test_terms_equal_the_slow_reference(
    make_tower: Callable[..., HookedViT],
    images: Tensor,
    changes: dict[str, object],
    convention: Convention,
    normalize: bool,
) -> None:
    visual = make_tower(dtype=torch.float64, **changes)
    images = images[..., : visual.cfg.image_size[0], :].double()
    d = decompose(visual, images, convention=convention, normalize=normalize)
    for i in range(2):
        reference = Reference(visual, images[i])
        torch.testing.assert_close(visual(images)[i], reference.feature, rtol=1e-10, atol=1e-12)
        for name, expected in reference.terms(convention, normalize).items():
            torch.testing.assert_close(getattr(d, name)[i], expected, rtol=1e-9, atol=1e-11)


@forms
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_terms_sum_to_the_feature(
    make_tower: Callable[..., HookedViT],
    images: Tensor,
    convention: Convention,
    normalize: bool,
    dtype: torch.dtype,
    bound: float,
) -> None:
    visual = make_tower(dtype=dtype, n_layers=6, layer_scale=True)
    d = decompose(visual, images.to(dtype), convention=convention, normalize=normalize)
    feature = visual(images.to(dtype)).detach()
    length = feature.norm(dim=-1, keepdim=True)
    target = feature / length if normalize else feature
    summed = d.heads.sum((1, 2)) + d.mlps.sum(1) + d.embed + d.bias
    size = 1 if normalize else length
    assert float(((summed - target) / size).abs().max()) <= bound
    assert float(((d.features - target) / size).abs().max()) <= bound
    assert d.sum_error <= 10 * bound
    if normalize:
        torch.testing.assert_close(d.features.norm(dim=-1), torch.ones(len(d), dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_tower_has_terms_in_fp32(
    make_tower: Callable[..., HookedViT], images: Tensor, dtype: torch.dtype
) -> None:
    visual = make_tower(dtype=dtype)
    d = decompose(visual, images.to(dtype))
    assert d.coords.dtype == d.mlps.dtype == torch.float32


def test_the_last_block_runs_the_pooled_row_alone_unless_others_listen(
    tower: HookedViT, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    last = blocks(tower)[-1]
    forward = last.forward

    def spy(*args: Any, **options: Any) -> Tensor:
        out = forward(*args, **options)
        rows.append(out.shape[1])
        return out

    monkeypatch.setattr(last, "forward", spy)
    decompose(tower, images)
    with tower.hooks(fwd_hooks=[("blocks.2.hook_resid_post", lambda x, hook: None)]):
        decompose(tower, images)
    assert rows == [1, 7]


def test_a_pool_need_not_be_given(tower: HookedViT, images: Tensor) -> None:
    d = decompose(tower, images)
    plain = Decomposition(**{f.name: getattr(d, f.name) for f in fields(d) if f.name != "pool"})
    assert plain.pool.shape == d.pool.shape == (5, 0, 20) and not plain.has_pool
    assert torch.equal(plain.features, d.features)


def test_named_constants(tower: HookedViT, images: Tensor) -> None:
    d = decompose(tower, images)
    assert d.maps.bias_names == ("attn_bias 0", "attn_bias 1", "attn_bias 2", "ln_final bias")
    assert tower.proj is not None
    beta = tower.ln_final.b @ tower.proj
    torch.testing.assert_close(d.bias_coords[:, -1:] * d.maps.bias[-1], beta.expand(5, -1))
    paper = decompose(tower, images, convention="paper")
    assert paper.maps.bias_names == ()
    assert torch.equal(paper.bias, torch.zeros_like(paper.embed))


@forms
def test_tokens_sum_to_the_head(
    tower: HookedViT, images: Tensor, convention: Convention, normalize: bool
) -> None:
    d = decompose(tower, images, convention=convention, normalize=normalize, tokens=True)
    text = torch.randn(3, d.d_embed, generator=torch.Generator().manual_seed(3))
    for layer, head in [(0, 0), (1, 3), (-1, -2)]:
        tokens = d.tokens(layer, head)
        assert tokens.shape == (5, tower.cfg.n_tokens, d.d_embed)
        torch.testing.assert_close(tokens.sum(1), d.heads[:, layer, head], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(d.token_logits(text, layer, head), tokens @ text.T, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(d.attention(layer, head).sum(-1), torch.ones(5))


def test_tokens_equal_the_slow_reference(make_tower: Callable[..., HookedViT], images: Tensor) -> None:
    visual = make_tower(dtype=torch.float64, layer_scale=True)
    d = decompose(visual, images.double(), tokens=heads[1:, 2] | heads[0, 3])
    reference = Reference(visual, images[4])
    for layer, head in [(0, 3), (1, 2), (2, 2)]:
        expected = reference.read(reference.by_token[layer][head])
        torch.testing.assert_close(d.tokens(layer, head)[4], expected, rtol=1e-9, atol=1e-11)


def test_attention_is_the_towers_pattern(tower: HookedViT, images: Tensor) -> None:
    d = decompose(tower, images, tokens=heads[:, 1])
    _, cache = tower.run_with_cache(images)
    for layer in range(3):
        torch.testing.assert_close(d.attention(layer, 1), cache["pattern", layer][:, 1, 0])


def test_a_permuted_batch_gives_permuted_terms(tower: HookedViT, images: Tensor) -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    d, permuted = decompose(tower, images, tokens=True), decompose(tower, images[order], tokens=True)
    for a, b in [(d[order], permuted), (d[[3, 0]], permuted[:2]), (d[3], permuted[0])]:
        torch.testing.assert_close(a.coords, b.coords)
        torch.testing.assert_close(a.mlps, b.mlps)
        torch.testing.assert_close(a.tokens(1, 1), b.tokens(1, 1))
    mask = torch.tensor([True, False, False, True, False])
    assert torch.equal(d[mask].embed, d.embed[[0, 3]])
    assert len(d[mask]) == 2
    assert len(d[:0]) == d[:0].sum_error == 0
    with pytest.raises(IndexError, match=r"expected an image in 0\.\.4; received 5"):
        d[5]


@pytest.mark.parametrize("tokens", [None, heads[-1]])
@forms
def test_a_saved_decomposition_stands_alone(
    tower: HookedViT, images: Tensor, tmp_path: Path, convention: Convention, normalize: bool, tokens: object
) -> None:
    d = decompose(tower, images, convention=convention, normalize=normalize, tokens=tokens)[1:4]  # pyright: ignore
    again = Decomposition.load(d.save(tmp_path / "deep" / "d.safetensors"))
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["d.safetensors"]
    assert torch.equal(again.features, d.features)
    assert (again.convention, again.normalized, again.sum_error) == (convention, normalize, d.sum_error)
    assert (again.maps.bias_names, again.maps.extras) == (d.maps.bias_names, d.maps.extras)
    if tokens:
        assert torch.equal(again.tokens(-1, 2), d.tokens(-1, 2))
    else:
        assert again.token_terms is None


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"received .*none\.safetensors, which is no file"):
        Decomposition.load(tmp_path / "none.safetensors")
    broken, other = tmp_path / "broken", tmp_path / "other"
    broken.write_bytes(b"no tensors")
    with pytest.raises(
        ValueError, match="expected a safetensors file; received .*broken, which cannot be read"
    ):
        Decomposition.load(broken)
    save_file({"x": torch.ones(1)}, other)
    with pytest.raises(ValueError, match="format unknown; write it with Decomposition.save"):
        Decomposition.load(other)


def test_one_flipped_bit_is_seen(tower: HookedViT, images: Tensor, tmp_path: Path) -> None:
    """In the numbers, in a name, in what is said about them; files of before, without a digest, are read."""
    path = decompose(tower, images).save(tmp_path / "d.safetensors")
    content = path.read_bytes()
    for at in (len(content) - 5, content.index(b'"coords"') + 2, content.index(b"normalized")):
        broken = bytearray(content)
        broken[at] ^= 1
        path.write_bytes(broken)
        with pytest.raises(
            ValueError, match="as it was written; received other numbers than its digest is of"
        ):
            Decomposition.load(path)
    path.write_bytes(content.replace(b'"sha256"', b'"digest"'))
    assert torch.equal(Decomposition.load(path).features, decompose(tower, images).features)


def test_to_another_dtype(tower: HookedViT, images: Tensor) -> None:
    d = decompose(tower, images, tokens=True)
    wide = d.to(torch.float64)
    assert wide.features.dtype == wide.tokens(0, 0).dtype == torch.float64
    torch.testing.assert_close(wide.features.float(), d.features)
    assert d.to("cpu").maps is d.maps


def test_maps_are_shared_while_the_weights_stay(make_tower: Callable[..., HookedViT], images: Tensor) -> None:
    visual = make_tower(seed=7)
    d = decompose(visual, images)
    assert decompose(visual, images).maps is d.maps
    with torch.no_grad():
        visual.get_parameter("proj").mul_(2)
    again = decompose(visual, images)
    assert again.maps is not d.maps
    assert not d.maps.matches(again.maps)
    torch.testing.assert_close(again.features, 2 * d.features)
    torch.testing.assert_close(
        d.maps.grams[1, 2], d.maps.heads[1, 2] @ d.maps.heads[1, 2].T, rtol=1e-5, atol=1e-6
    )


def test_no_gradient_no_hook_and_no_edit_is_left(tower: HookedViT, images: Tensor) -> None:
    before = tower(images)
    d = decompose(tower, images, tokens=True)
    assert not any(point.has_hooks() for point in tower.hook_dict.values())
    assert not d.coords.requires_grad
    assert torch.equal(tower(images), before)
    assert d.edit() is d
    edited = d.edit(mlps=2 * d.mlps)
    assert edited.target is None
    assert edited.token_terms is d.token_terms
    assert d.edit(coords=2 * d.coords).token_terms is None  # they would no longer sum to the heads
    torch.testing.assert_close(edited.features, d.features + d.mlps.sum(1))


def test_it_reads_well(make_tower: Callable[..., HookedViT], tower: HookedViT, images: Tensor) -> None:
    d = decompose(tower, images, normalize=True, tokens=heads[0])
    words = (
        "Decomposition(images: 5, heads: 3 x 4, MLPs: 3, width: 20, convention: centred, sums to: unit features, "
        "tokens: of 4 heads, sum error: "
    )
    assert repr(d) == f"{words}{d.sum_error:.1e})" and repr(d.edit(embed=d.embed)) == f"{words}edited)"
    assert "<th>convention</th><td>centred</td>" in d._repr_html_()
    pooled = decompose(make_tower(pool="attention", pool_heads=2, pool_mlp=24), images)
    assert (
        "MLPs: 3, 1 of the pool, width: 20, convention: centred, sums to: features, tokens: none kept"
        in repr(pooled)
    )
    assert repr(d.maps) == "TermMaps(centred: 3 layers x 4 heads, 8 -> 20)"


def test_the_precision_is_that_of_the_weights_or_of_autocast(
    make_tower: Callable[..., HookedViT], tower: HookedViT
) -> None:
    exact = make_tower(dtype=torch.float64)
    assert (dtype_of(tower), dtype_of(exact)) == (torch.float32, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert (dtype_of(tower), dtype_of(exact)) == (torch.bfloat16, torch.float64)


@pytest.mark.usefixtures("ours_alone")
def test_errors_say_what_to_do(tower: HookedViT, images: Tensor) -> None:
    d = decompose(tower, images)
    with pytest.raises(LookupError, match=r"kept its tokens; .* decompose\(images, tokens=heads\[2, 1\]\)"):
        d.tokens(-1, 1)
    some = decompose(tower, images, tokens=heads[0])
    for given in ({"layer": 1}, {"head": 1}):
        with pytest.raises(ValueError, match="a layer and a head, or neither for all kept heads; received"):
            some.attention(**given)
    with pytest.raises(LookupError, match=r"decompose\(images, tokens=True\) \(an edit"):
        d.attention()
    with pytest.raises(
        LookupError, match=r"the tokens of heads\[1, 3\]; .*other heads; .*tokens=heads\[1, 3\]"
    ):
        some.attention(1, 3)
    for ask in (lambda: some.tokens(3, 0), lambda: decompose(tower, images, tokens=heads[3])):
        with pytest.raises(IndexError, match=r"a layer in 0\.\.2 .*received layer 3"):
            ask()
    with pytest.raises(IndexError, match=r"a head in 0\.\.3 .*received head 4"):
        some.tokens(0, 4)
    with pytest.raises(
        ValueError, match=r"text features \[text, 20\]; received \[3, 21\]; encode the texts with"
    ):
        some.token_logits(torch.zeros(3, 21), 0, 0)
    with pytest.raises(
        ValueError, match=r"expected convention of \('centred', 'paper'\); received 'gandelsman'"
    ):
        term_maps(tower, "gandelsman")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"mlps of shape \[5, 3, 20\], .* received \[4, 3, 20\]"):
        d.edit(mlps=d.mlps[:4])
    with pytest.raises(ValueError, match="as the tower gave it; received an edited one"):
        d.edit(mlps=d.mlps).sum_error


def test_a_write_past_the_components_is_caught(tower: HookedViT, images: Tensor) -> None:
    for name in ("blocks.1.hook_attn_out", "blocks.2.hook_resid_mid", "ln_final.hook_normalized"):
        with (
            tower.hooks(fwd_hooks=[(name, lambda x, hook: x * 1.5)]),
            pytest.raises(
                DecompositionError,
                match=r"a miss of .*: a hook edits the stream where no .*capture\.decompose\(",
            ),
        ):
            decompose(tower, images)
    with tower.hooks(fwd_hooks=[("blocks.1.hook_attn_out", lambda x, hook: x * 1.5)]):
        assert decompose(tower, images, tolerance=1e9).sum_error > 1e-3
    with pytest.raises(DecompositionError, match="finite features; received infinite ones or nan"):
        decompose(tower, images * torch.nan)


def test_an_edited_run_is_decomposed_as_edited(tower: HookedViT, images: Tensor) -> None:
    edits = {
        "hook_ln_pre": lambda x, hook: x * 1.1,
        "blocks.0.attn.hook_z": lambda z, hook: z.flip(1),
        "blocks.1.attn.hook_v": lambda v, hook: v * 0.5,
        "blocks.1.attn.hook_pattern": lambda p, hook: p.roll(1, -1),
        "blocks.2.hook_mlp_out": lambda x, hook: x * 1.5,
        "ln_final.hook_scale": lambda s, hook: s * 2,
    }
    clean = tower(images)
    for name, hook in edits.items():
        with tower.hooks(fwd_hooks=[(name, hook)]):
            edited = tower(images)
            d = decompose(tower, images)
        assert not torch.allclose(edited, clean)
        torch.testing.assert_close(d.features, edited.detach(), rtol=1e-4, atol=1e-5)


def test_tokens_of_an_edited_run(tower: HookedViT, images: Tensor) -> None:
    with tower.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", lambda p, hook: p.roll(1, -1))]):
        d = decompose(tower, images, tokens=heads[1])
    torch.testing.assert_close(d.tokens(1, 2).sum(1), d.heads[:, 1, 2], rtol=1e-5, atol=1e-6)
    with (
        tower.hooks(fwd_hooks=[("blocks.1.attn.hook_z", lambda z, hook: z + 1)]),
        pytest.raises(DecompositionError, match="hook edits hook_z; decompose that run without tokens"),
    ):
        decompose(tower, images, tokens=heads[1])
    with tower.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", lambda p, hook: p / 2)]):
        with pytest.raises(DecompositionError, match=r"attention that sums to one .* hook_pattern changed"):
            decompose(tower, images, tokens=heads[1])
        paper = decompose(tower, images, tokens=heads[1], convention="paper")
    torch.testing.assert_close(paper.tokens(1, 0).sum(1), paper.heads[:, 1, 0], rtol=1e-5, atol=1e-6)


def test_how_far_tokens_may_miss_their_heads(make_tower: Callable[..., HookedViT], images: Tensor) -> None:
    """By a share of the largest number that the layer's heads put out; attention, by half of one."""
    visual, seen = make_tower(dtype=torch.float64), list[Tensor]()

    def shifted(z: Tensor, hook: object) -> Tensor:
        seen.append(z[:, 0] + 0.01)
        return z + 0.01

    with visual.hooks(fwd_hooks=[("blocks.1.attn.hook_z", shifted)]):
        decompose(visual, images.double())
        miss = 0.01 / float(seen[0].abs().max())
        decompose(visual, images.double(), tokens=heads[1], tolerance=1.001 * miss)
        with pytest.raises(DecompositionError, match=f"a miss of {miss:.1e}: a hook edits hook_z"):
            decompose(visual, images.double(), tokens=heads[1], tolerance=0.999 * miss)

    def first_token(pattern: Tensor, hook: object) -> Tensor:
        return 1.5 * torch.eye(7, dtype=torch.float64)[0].expand_as(pattern)

    with visual.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", first_token)]):
        decompose(visual, images.double(), tokens=heads[1], tolerance=0.5)
        with pytest.raises(DecompositionError, match="attention that sums to one"):
            decompose(visual, images.double(), tokens=heads[1], tolerance=0.499)


def test_tokens_are_heads(ours_alone: None, tower: HookedViT, images: Tensor) -> None:
    with pytest.raises(
        TypeError, match=r"expected tokens=True, or heads such as heads\[-1\]; received 'last'"
    ):
        decompose(tower, images, tokens="last")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"received mlps\[1\], which names none"):
        decompose(tower, images, tokens=mlps[1])


def test_how_far_terms_may_miss_their_feature(tower: HookedViT, images: Tensor) -> None:
    miss = decompose(tower, images).sum_error
    assert decompose(tower, images, tolerance=miss).sum_error == miss > 0
    with pytest.raises(DecompositionError):
        decompose(tower, images, tolerance=0.99 * miss)
    large = copy.deepcopy(tower)
    large.get_parameter("proj").data.mul_(64)
    assert decompose(large, images).sum_error == miss  # a share
    expected = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
    assert expected == TOLERANCE
