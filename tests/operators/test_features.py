"""Features of sparse autoencoders: splices that change nothing, terms that sum, ablation in both modes, and the images of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from decompclip import load
from decompclip.data.shapes import Shapes
from decompclip.decomposition.capture import decompose
from decompclip.decomposition.components import (
    Components,
    embed,
    everything,
    features,
    heads,
    layers,
    mlps,
    neurons,
)
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.maps import Convention
from decompclip.models.sae import SparseAutoencoder
from decompclip.operators.ablation import ZeroAblate
from decompclip.operators.attribution import attribute
from decompclip.operators.features import AblateFeatures, FeatureTerms, Splice, feature_terms, top_images
from decompclip.operators.neurons import neuron_terms
from decompclip.tower.vit import HookedViT

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}
FEATURES = 24


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(hook: str = "blocks.1.hook_mlp_out", width: int = 32, **options: Any) -> SparseAutoencoder:
    W_enc, W_dec = drawn(width, FEATURES, seed=0), drawn(FEATURES, width, seed=2)
    return SparseAutoencoder(
        W_enc, drawn(FEATURES, seed=1), W_dec * 0.2, drawn(width, seed=3) * 0.3, hook, **options
    )


KINDS: dict[str, Any] = {
    "relu": {},
    "topk": {"k": 5},
    "jumprelu": {"threshold": drawn(FEATURES, seed=5).abs()},
    "normalised": {"normalization": "layer_norm", "subtract_bias": False},
    "rescaled": {"normalization": "constant_norm_rescale"},
}
HOOKS = {
    "hook_ln_pre": embed,
    "blocks.0.hook_resid_pre": embed,
    "blocks.1.hook_attn_out": heads[1],
    "blocks.1.hook_mlp_out": mlps[1],
    "blocks.1.hook_resid_pre": embed | layers[:1],
    "blocks.1.hook_resid_mid": embed | layers[:1] | heads[1],
    "blocks.1.hook_resid_post": embed | layers[:2],
    "blocks.2.hook_attn_out": heads[2],
    "blocks.2.hook_resid_post": embed | layers,
}
EACH = [
    *((hook, [*KINDS][i % len(KINDS)]) for i, hook in enumerate(HOOKS)),
    *(("blocks.1.hook_mlp_out", kind) for kind in KINDS),
]
"""Every hook point with some kind, and every kind at one hook point."""


def run(tower: HookedViT, images: Tensor, hooks: Any) -> Tensor:
    with tower.hooks(fwd_hooks=list(hooks)):
        return tower(images)


def written(d: Decomposition, of: Components) -> Tensor:
    """The terms of components, and the constants that their layers' heads write, summed."""
    mask = of.resolve(d.n_layers, d.n_heads)
    total = d.heads[:, mask.heads].sum(1) + d.mlps[:, mask.mlps].sum(1) + (d.embed if mask.embed else 0)
    for place, name in enumerate(d.maps.bias_names):
        kind, layer = name.split()[:2]
        if kind in ("attn_bias", "attn_norm_bias") and mask.heads[int(layer)].any():
            total = total + d.bias_coords[:, place, None] * d.maps.bias[place]
    return total


# Splicing


@pytest.mark.parametrize(
    ("hook", "kind"), [*EACH, ("blocks.1.attn.hook_z", "topk"), ("blocks.2.mlp.hook_post", "relu")]
)
def test_a_splice_changes_nothing(tower: HookedViT, images: Tensor, kind: str, hook: str) -> None:
    sae = made(hook, 48 if "mlp.hook" in hook else 32, **KINDS[kind])
    plain, seen = tower(images, pooled_rows=False), []
    with tower.hooks(fwd_hooks=Splice(sae).fwd_hooks(tower)):
        assert torch.equal(tower(images, pooled_rows=False), plain)
    same = Splice(sae, lambda acts: seen.append(acts) or acts).fwd_hooks(tower)
    torch.testing.assert_close(run(tower, images, same), plain, rtol=0, atol=1e-6)
    assert seen[0].shape[-1] == FEATURES and (seen[0] > 0).any()


def test_without_its_error_the_tower_runs_on_what_the_autoencoder_makes(
    tower: HookedViT, images: Tensor
) -> None:
    sae = made(tokens="patches", **KINDS["normalised"])
    _, cache = tower.run_with_cache(images)
    x = cache["blocks.1.hook_mlp_out"].clone()
    x[:, 1:] = sae.write(sae.read(x[:, 1:]))  # the class token was none of its training's
    expected = run(tower, images, [("blocks.1.hook_mlp_out", lambda _, hook: x)])
    torch.testing.assert_close(run(tower, images, Splice(sae, error=False).fwd_hooks(tower)), expected)
    assert not torch.allclose(expected, tower(images), atol=1e-2)
    steered = run(tower, images, Splice(sae, lambda acts: acts + 1).fwd_hooks(tower))
    x = cache["blocks.1.hook_mlp_out"].clone()
    x[:, 1:] += sae.W_dec.sum(0) * sae.read(x[:, 1:]).scale
    torch.testing.assert_close(
        steered, run(tower, images, [("blocks.1.hook_mlp_out", lambda _, hook: x)]), **CLOSE
    )


def test_an_autoencoder_of_the_class_token_reads_it_alone(tower: HookedViT, images: Tensor) -> None:
    sae = made(tokens="class")
    x = tower.run_with_cache(images)[1]["blocks.1.hook_mlp_out"].clone()
    x[:, :1] = sae.write(sae.read(x[:, :1]))
    expected = run(tower, images, [("blocks.1.hook_mlp_out", lambda _, hook: x)])
    torch.testing.assert_close(run(tower, images, Splice(sae, error=False).fwd_hooks(tower)), expected)


def test_in_half_precision_a_splice_changes_nothing(
    make_tower: Callable[..., HookedViT], images: Tensor
) -> None:
    tower = make_tower(dtype=torch.bfloat16)
    same = Splice(made(), lambda acts: acts).fwd_hooks(tower)
    assert torch.equal(run(tower, images.bfloat16(), same), tower(images.bfloat16()))


# Terms


@pytest.mark.parametrize("convention", ["paper", "centred"])
def test_an_autoencoder_that_misses_nothing_has_no_error(
    tower: HookedViT, images: Tensor, convention: Convention
) -> None:
    """Of normalised activations the mean is in the bias, which the paper's convention does not take away."""
    here, n = torch.eye(32), torch.zeros(64)
    W_enc, W_dec, hook = torch.cat([here, -here], 1), torch.cat([here, -here]), "blocks.1.hook_mlp_out"
    sae = SparseAutoencoder(W_enc, n, W_dec, n[:32], hook, normalization="layer_norm")
    terms = feature_terms(tower, sae, images, convention=convention)
    assert terms.error.abs().max() < 1e-4
    assert (terms.bias.abs().max() > 0.1) == (convention == "paper")


@pytest.mark.parametrize(("hook", "kind"), EACH)
def test_features_bias_and_error_sum_to_what_was_written(
    tower: HookedViT, images: Tensor, kind: str, hook: str
) -> None:
    d, terms = (
        decompose(tower, images, normalize=True),
        feature_terms(tower, made(hook, **KINDS[kind]), images, normalize=True),
    )
    assert terms.of.resolve(3, 4).flat.equal(HOOKS[hook].resolve(3, 4).flat)
    torch.testing.assert_close(
        terms.terms.sum(1) + terms.bias + terms.error, written(d, HOOKS[hook]), **CLOSE
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"pool": "mean", "n_prefix": 0},
        {"pool": "mean", "ln_final": "pooled", "n_prefix": 1},
        {"pool": "attention", "pool_heads": 4, "pool_mlp": 24, "n_prefix": 0},
        {"norm": "post"},
        {"attn_norm": True, "pool": "mean", "n_prefix": 1},
    ],
    ids=["mean", "mean_then_norm", "attention", "post_norm", "attn_norm"],
)
@pytest.mark.parametrize(
    "hook", ["blocks.1.hook_mlp_out", "blocks.1.hook_resid_post", "blocks.2.hook_attn_out"]
)
def test_they_sum_in_other_towers(
    make_tower: Callable[..., HookedViT], images: Tensor, changes: Any, hook: str
) -> None:
    tower = make_tower(**changes)
    d, terms = decompose(tower, images), feature_terms(tower, made(hook, k=7), images)
    torch.testing.assert_close(terms.terms.sum(1) + terms.bias + terms.error, written(d, terms.of), **CLOSE)


def test_autocast_rounds_the_tower_and_not_the_terms(tower: HookedViT, images: Tensor) -> None:
    exact = feature_terms(tower, made(), images)
    with torch.autocast("cpu", torch.bfloat16):
        d, rough = decompose(tower, images), feature_terms(tower, made(), images)
    assert rough.coords.dtype == rough.error.dtype == torch.float32 and torch.equal(rough.maps, exact.maps)
    torch.testing.assert_close(rough.terms.sum(1) + rough.bias + rough.error, written(d, mlps[1]), **CLOSE)


def test_a_feature_s_term_is_its_activation_times_its_direction(tower: HookedViT, images: Tensor) -> None:
    """The slow way: the class token's activation, the direction centred, over the last scale, through the projection."""
    sae = made(**KINDS["jumprelu"])
    terms = feature_terms(tower, sae, images, features[[3, 7]])
    _, cache = tower.run_with_cache(images)
    acts = sae.read(cache["blocks.1.hook_mlp_out"][:, 0]).acts
    scale = cache["ln_final.hook_scale"].reshape(5, -1)[:, :1]
    assert tower.proj is not None
    rows = [*(acts[:, j, None] * sae.W_dec[j] for j in (3, 7)), sae.b_dec.expand(5, -1)]
    for row, found in zip(rows, [*terms.terms.unbind(1), terms.bias], strict=True):
        expected = (row - row.mean(1, keepdim=True)) / scale * tower.ln_final.w @ tower.proj
        torch.testing.assert_close(found, expected, **CLOSE)
    frame = terms.to_frame()
    assert list(frame["part"]) == ["features[3]", "features[7]", "bias", "error"]
    every = torch.cat([terms.terms, terms.bias[:, None], terms.error[:, None]], dim=1).norm(dim=-1)
    for name, lengths in (("length", every.mean(0)), ("largest", every.amax(0))):
        torch.testing.assert_close(torch.tensor(frame[name].tolist()), lengths, **CLOSE)
    assert frame["feature"].tolist() == [3, 7, *[pd.NA] * 2] and frame["active"].tolist()[2:] == [1, 1]
    torch.testing.assert_close(
        torch.tensor(frame["active"][:2].tolist()).float(), (acts[:, [3, 7]] > 0).float().mean(0)
    )
    assert terms.figure().data


def test_tokens_that_were_not_trained_on_stay_in_the_error(
    make_tower: Callable[..., HookedViT], images: Tensor
) -> None:
    tower = make_tower(pool="mean", n_prefix=1)
    terms = feature_terms(tower, made(tokens="patches"), images)
    whole = feature_terms(tower, made(), images)
    torch.testing.assert_close(
        terms.terms.sum(1) + terms.bias + terms.error, whole.terms.sum(1) + whole.bias + whole.error, **CLOSE
    )
    with pytest.raises(ValueError, match="tokens that the feature is read from"):
        feature_terms(make_tower(), made(tokens="patches"), images)


# Attribution


def test_attribution_to_features_is_exact(tower: HookedViT, images: Tensor) -> None:
    along = drawn(3, 20, seed=7)
    d = decompose(tower, images)
    for hook in ("blocks.1.hook_mlp_out", "blocks.1.hook_resid_mid"):
        terms = feature_terms(tower, made(hook), images)
        whole, fine = attribute(d, along), attribute(d, along, features=terms)
        mask = terms.of.resolve(3, 4).flat
        assert len(fine) == len(whole) - int(mask.sum()) + FEATURES
        mine = [i for i, part in enumerate(fine.parts) if part.kind == "features"]
        assert [str(fine.parts[i]) for i in mine] == [f"features[{j}]" for j in range(FEATURES)]
        torch.testing.assert_close(fine.values[:, mine], terms.terms @ along.T, **CLOSE)
        torch.testing.assert_close(fine.score, whole.score)
        kept = [i for i in range(len(fine)) if i not in mine]
        torch.testing.assert_close(fine.values[:, kept], whole.values[:, ~mask], **CLOSE)
        others = (terms.bias + terms.error) @ along.T + whole.rest
        missed = written(d, terms.of) @ along.T - whole.values[:, mask].sum(1)  # constants that heads write
        torch.testing.assert_close(fine.rest, others - missed, **CLOSE)
        assert list(fine.to_frame()["feature"].dropna().unique()) == list(range(FEATURES))
    one = attribute([d[:2], d[2:]], along[0], features=terms)
    torch.testing.assert_close(one.values, attribute(d, along[0], features=terms).values)
    assert one.figure().data


def test_what_attribution_to_features_refuses(tower: HookedViT, images: Tensor) -> None:
    d, along, terms = decompose(tower, images), drawn(20, seed=7), feature_terms(tower, made(), images)
    refused: dict[str, dict[str, Any]] = {
        r"mlps\[1\], which features are of": {"features": terms, "components": heads},
        r"one way to split mlps\[1\]": {
            "features": terms,
            "neurons": neuron_terms(tower, images, neurons[1, 3]),
        },
        "feature terms of 5 images": {"features": terms.select(slice(0, 3))},
    }
    for message, options in refused.items():
        with pytest.raises(ValueError, match=message):
            attribute(d, along, **options)
    with pytest.raises(ValueError, match="feature terms of 4 images"):
        attribute(d[:4], along, features=terms)


# Ablation


def test_ablation_takes_the_feature_s_direction_off_each_token(tower: HookedViT, images: Tensor) -> None:
    sae = made(**KINDS["topk"])
    chosen, fill = features[[3, 7]], torch.tensor([0.5, 2.0])
    where = torch.zeros(5, 3 * 4 + 3 + 1, dtype=torch.bool)
    where[1:3, 12 + 1] = True
    _, before = tower.run_with_cache(images)
    x = before["blocks.1.hook_mlp_out"]
    acts = sae.read(x).acts
    edit = AblateFeatures(sae, chosen, fill=fill, rows=(0, 2))
    with tower.hooks(fwd_hooks=edit.fwd_hooks(tower, where=where)):
        _, after = tower.run_with_cache(images)
    expected = x.clone()
    for i in (1, 2):
        for row in (0, 2):
            for j, to in zip((3, 7), fill, strict=True):
                expected[i, row] += (to - acts[i, row, j]) * sae.W_dec[j]
    torch.testing.assert_close(after["blocks.1.hook_mlp_out"], expected, **CLOSE)
    assert torch.equal(after["blocks.1.hook_mlp_out"][3], x[3])


@pytest.mark.parametrize("hook", ["blocks.2.hook_mlp_out", "hook_ln_pre"])
@pytest.mark.parametrize("kind", ["topk", "normalised"])
def test_direct_ablation_takes_the_term_off(
    make_tower: Callable[..., HookedViT], images: Tensor, hook: str, kind: str
) -> None:
    """Of the last MLP it is what causal ablation does, at the scale that the last LayerNorm had."""
    tower, chosen = make_tower(), features[2:9]
    sae, d = made(hook, **KINDS[kind]), decompose(make_tower(), images)
    terms = feature_terms(tower, sae, images, chosen)
    gone = AblateFeatures(sae, chosen, terms=terms)(d)
    torch.testing.assert_close(gone.features, d.features - terms.terms.sum(1), **CLOSE)
    filled = AblateFeatures(sae, chosen, terms=terms, fill=torch.full((7,), 0.5))
    if hook.startswith("blocks"):
        scales: list[Tensor] = []
        run(tower, images, [("ln_final.hook_scale", lambda s, hook: scales.append(s.clone()))])
        frozen = ("ln_final.hook_scale", lambda s, hook: scales[0])
        for edit in (AblateFeatures(sae, chosen, terms=terms), filled):
            causal = run(tower, images, [*edit.fwd_hooks(tower), frozen])
            torch.testing.assert_close(edit(d).features, causal, **CLOSE)
    some = torch.zeros(5, 16, dtype=torch.bool)
    some[2] = True
    torch.testing.assert_close(
        filled(d, where=some).features[[0, 2]], torch.stack([d.features[0], filled(d).features[2]]), **CLOSE
    )
    both = AblateFeatures(sae, chosen) | ZeroAblate(heads[-1])
    assert len(both.fwd_hooks(tower)) == 2


@pytest.mark.usefixtures("ours_alone")
def test_what_ablation_refuses(tower: HookedViT, images: Tensor) -> None:
    sae, d = made("blocks.1.hook_resid_post"), decompose(tower, images)
    terms = feature_terms(tower, sae, images, features[3])
    mlp, post = made(), made("blocks.1.mlp.hook_post", 48)
    refused: list[tuple[str, Callable[[], Any]]] = [
        ("a sum of terms", lambda: AblateFeatures(sae, features[3], terms=terms)(d)),
        ("of others", lambda: AblateFeatures(sae, features[4], terms=terms)(d)),
        ("the features' terms", lambda: AblateFeatures(sae, features[3])(d)),
        ("feature terms of 4 images", lambda: AblateFeatures(sae, features[3], terms=terms)(d[:4])),
        (
            "a fill of 1 features",
            lambda: AblateFeatures(sae, features[3], fill=torch.ones(2)).fwd_hooks(tower),
        ),
        ("features alone", lambda: AblateFeatures(sae, ~features[3]).fwd_hooks(tower)),
        ("features alone", lambda: feature_terms(tower, sae, images, features[3] | mlps[1])),
        ("features of a sparse autoencoder", lambda: ZeroAblate(features[3]).fwd_hooks(tower)),
        ("have a direct effect", lambda: feature_terms(tower, post, images)),
        ("whole number of images, at least 1", lambda: top_images(tower, mlp, images, k=0)),
        ("batch_size to be a whole number of images", lambda: top_images(tower, mlp, images, batch_size=0)),
        ("at least one image", lambda: top_images(tower, mlp, [])),
        ("in one of 3 blocks", lambda: Splice(made("blocks.9.hook_mlp_out")).fwd_hooks(tower)),
    ]
    path: Any = Path("layer-1")
    for call in (
        lambda: feature_terms(tower, path, images),
        lambda: top_images(tower, path, images),
        lambda: Splice(path).fwd_hooks(tower),
        lambda: AblateFeatures(path, features[3]).fwd_hooks(tower),
    ):
        refused.append(
            (r"expected a SparseAutoencoder; received PosixPath\('layer-1'\); open files with load_sae", call)
        )
    for message, call in refused:
        with pytest.raises(ValueError, match=message):
            call()
    fills: list[Any] = [0.5, [0.5], torch.ones(1, 1), torch.tensor([torch.nan])]
    for fill in fills:
        with pytest.raises(
            ValueError, match=r"a fill of 1 features, features\[3\]: finite numbers in a tensor \[1\]"
        ):
            run(tower, images, AblateFeatures(sae, features[3], fill=fill).fwd_hooks(tower))
    edits: list[tuple[Any, str]] = [
        (lambda acts: None, "NoneType"),
        (lambda acts: acts[:, :1], r"\[5, 1, 24\]"),
    ]
    for edit, found in edits:
        with pytest.raises(
            ValueError, match=rf"gives activations \[5, 7, 24\], as it gets them; received {found}"
        ):
            run(tower, images, Splice(sae, edit).fwd_hooks(tower))
    black = images.clone()
    black[2] = torch.nan
    for call, what in (
        (lambda: feature_terms(tower, sae, black), "features"),
        (lambda: top_images(tower, sae, black), "activations at blocks.1.hook_resid_post"),
    ):
        with pytest.raises(
            ValueError, match=f"expected finite {what}; received nan or inf; check the images"
        ):
            call()
    with pytest.raises(ValueError, match="at least one image"):
        feature_terms(tower, sae, images[:0])
    with pytest.raises(IndexError, match=r"a feature in 0..23 .*the sparse autoencoder has 24 features"):
        AblateFeatures(sae, features[24]).fwd_hooks(tower)


def test_terms_of_another_autoencoder_are_refused(tower: HookedViT, images: Tensor) -> None:
    sae, d, chosen = made(), decompose(tower, images), features[3]
    another = replace(sae, W_dec=sae.W_dec * 2)
    for other in (made("blocks.2.hook_mlp_out"), another, replace(sae, k=2)):
        terms = feature_terms(tower, other, images, chosen)
        with pytest.raises(ValueError, match=f"received terms of another autoencoder, of {other.hook}"):
            AblateFeatures(sae, chosen, terms=terms)(d)
    same = replace(sae, W_dec=sae.W_dec.clone())
    AblateFeatures(same, chosen, terms=feature_terms(tower, sae, images, chosen).select(slice(None)))(d)


def test_features_in_the_algebra_of_components() -> None:
    def of(components: Components) -> list[int]:
        mask = components.resolve(2, 2, d_sae=6)
        assert not mask.flat.any() and mask.beside_heads and not mask.empty
        return mask.features.nonzero()[:, 0].tolist()

    assert of(features) == [*range(6)] and of(features[-1]) == [5] and of(features[[1, 4]]) == [1, 4]
    assert of(features[2:] - features[3]) == [2, 4, 5] and of(features[:3] & features[1:]) == [1, 2]
    assert of(features[0] | features[5]) == [0, 5]
    assert (
        repr(features[2:] - features[[3, 4]]) == "features[2:] - features[[3, 4]]"
        and features[3].feature == 3
    )
    assert not everything.resolve(2, 2, d_sae=6).features.any()
    with pytest.raises(IndexError, match=r"several features are a slice or a list"):
        features[1, 2]


# The images of each


def test_top_images_are_those_of_the_largest_activations(tower: HookedViT) -> None:
    images = drawn(11, 3, 24, 16, seed=3)
    for sae in (made(**KINDS["topk"]), made("hook_ln_pre"), made("blocks.2.attn.hook_z", tokens="patches")):
        found = top_images(tower, sae, [images[:4], images[4:]], features[[0, 5, 6]], k=3, batch_size=3)
        _, cache = tower.run_with_cache(images)
        first = 1 if sae.tokens == "patches" else 0
        acts = sae.read(cache[sae.hook].flatten(2)[:, first:]).acts
        for place, j in enumerate((0, 5, 6)):
            each = [(float(acts[i, t, j]), i, t + first) for i in range(11) for t in range(acts.shape[1])]
            best: dict[int, tuple[float, int, int]] = {}
            for one in sorted(each, key=lambda x: -x[0]):
                best.setdefault(one[1], one)
            expected = sorted(best.values(), key=lambda x: -x[0])[:3]
            torch.testing.assert_close(found.activation[place], torch.tensor([x[0] for x in expected]))
            shown = [x for x in expected if x[0] > 0]
            assert found.images[place].tolist()[: len(shown)] == [x[1] for x in shown]
            assert found.tokens[place].tolist()[: len(shown)] == [x[2] for x in shown]
        torch.testing.assert_close(found.mean, acts[..., [0, 5, 6]].mean((0, 1)), **CLOSE)
        torch.testing.assert_close(found.active, (acts[..., [0, 5, 6]] > 0).any(1).float().mean(0))
        frame = found.to_frame()
        assert (
            frame["feature"].tolist() == [0] * 3 + [5] * 3 + [6] * 3
            and frame["rank"].tolist() == [1, 2, 3] * 3
        )
        for name, numbers in (
            *(("image", found.images), ("token", found.tokens), ("activation", found.activation)),
            *((name, getattr(found, name)[:, None].expand(3, 3)) for name in ("mean", "active")),
        ):
            assert frame[name].tolist() == numbers.flatten().tolist()
        assert frame["name"].tolist() == [str(i) for i in found.images.flatten().tolist()]
        assert found.pictures is None
    with pytest.raises(ValueError, match="expected pictures"):
        found.figure()


def test_activations_are_read_as_memory_allows_and_no_further(
    tower: HookedViT, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, counts, read = made(), [], SparseAutoencoder.read
    terms, found = feature_terms(tower, sae, images), top_images(tower, sae, images)

    def counted(self: SparseAutoencoder, x: Tensor) -> Any:
        counts.append(len(x))
        return read(self, x)

    def refuse(x: Tensor, hook: Any) -> None:
        raise AssertionError(f"{hook.name} was reached")

    monkeypatch.setattr(SparseAutoencoder, "read", counted)
    monkeypatch.setattr("decompclip.operators.features.temporary", lambda device: 1)
    torch.testing.assert_close(feature_terms(tower, sae, images).coords, terms.coords, **CLOSE)
    with tower.hooks(fwd_hooks=[("blocks.2.hook_resid_pre", refuse)]):
        torch.testing.assert_close(top_images(tower, sae, images).activation, found.activation, **CLOSE)
    assert counts == [1] * 10


def test_places_of_many_tokens_are_exact_in_half_precision(
    make_tower: Callable[..., HookedViT], images: Tensor
) -> None:
    """bfloat16 has no odd whole number above 256; of 385 tokens some of the most active are such."""
    tower, sae = make_tower(patch_size=(1, 1), dtype=torch.bfloat16), made().to(torch.bfloat16)
    found = top_images(tower, sae, images.bfloat16(), k=5)
    _, cache = tower.run_with_cache(images.bfloat16())
    acts = sae.read(cache[sae.hook]).acts
    assert ((found.tokens > 256) & (found.tokens % 2 == 1)).any()
    there = acts[found.images, found.tokens, torch.arange(FEATURES)[:, None]]
    torch.testing.assert_close(there, found.activation, rtol=0.05, atol=0.05)


def test_their_pictures_are_the_images_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("shapes")
    pixels = Shapes(12, seed=2).draw(range(12)).images
    sae = made("blocks.1.hook_resid_post", model.cfg.d_model, k=4)
    monkeypatch.setattr("decompclip.operators.features.PICTURED", 4)
    assert top_images(model, sae, model.normalize(pixels), features[:5]).pictures is None
    # all images of one feature: the first and last of every batch are among them
    for chosen, k in ((features[2], 12), (features[:4], 2)):
        found = top_images(model, sae, model.normalize(pixels), chosen, k=k, batch_size=5)
        assert found.pictures is not None and found.images.shape[1] == k
        for pictures, images in zip(found.pictures, found.images, strict=True):
            expected = pixels[images].permute(0, 2, 3, 1) * 255
            torch.testing.assert_close(pictures.float(), expected, rtol=0, atol=1.0)
    plot: Any = found.figure()
    words = [note.text for note in plot.layout.annotations]
    rows = zip(found.active.tolist(), found.activation.tolist(), found.images.tolist(), strict=True)
    assert words == [
        text
        for j, (share, most, images) in enumerate(rows)
        for text in (
            *(f"{x:.2f} {i}" for x, i in zip(most, images, strict=True)),
            f"<b>features[{j}], in {share:.0%}</b>",
        )
    ]
    assert plot.layout.title.text == "most active of 12 images" and "4 features" in repr(found)
    terms: FeatureTerms = feature_terms(model, sae, model.normalize(pixels))
    assert attribute(model.decompose(model.normalize(pixels)), "a star", features=terms, model=model).top(3)
