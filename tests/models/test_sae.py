"""Sparse autoencoders: what is read of SAELens' and Prisma's files, beside their own formulas; and files that are not what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from decompclip.models.errors import CheckpointError
from decompclip.models.sae import SparseAutoencoder, load_sae
from decompclip.tower.vit import HookedViT

WIDTH, FEATURES = 32, 40
SAELENS = {
    "d_in": WIDTH,
    "d_sae": FEATURES,
    "architecture": "standard",
    "metadata": {"hook_name": "blocks.1.hook_mlp_out"},
}


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(*names: str) -> dict[str, Tensor]:
    shapes = {"W_enc": (WIDTH, FEATURES), "W_dec": (FEATURES, WIDTH), "b_dec": (WIDTH,)}
    wanted = ("W_enc", "W_dec", "b_dec", *names)
    return {n: drawn(*shapes.get(n, (FEATURES,)), seed=i) * 0.5 for i, n in enumerate(wanted)}


def write(folder: Path, state: dict[str, Tensor], config: dict[str, Any], name: str = "cfg.json") -> Path:
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "sae_weights.safetensors")
    (folder / name).write_text(json.dumps(config))
    return folder


X = drawn(6, 5, WIDTH, seed=9) * 2


def by_hand(x: Tensor, w: dict[str, Tensor], config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Activations and reconstructions, row by row, as SAELens and Prisma have them."""
    acts, made = [], []
    for row in x.reshape(-1, WIDTH):
        mean, deviation, factor = torch.zeros(()), torch.ones(()), torch.ones(())
        seen = row
        if config.get("normalize_activations") == "layer_norm":
            mean = row.mean()
            deviation = (row - mean).square().sum().div(WIDTH - 1).sqrt()
            seen = (row - mean) / (deviation + 1e-5)
        if config.get("normalize_activations") == "constant_norm_rescale":
            factor = WIDTH**0.5 / row.square().sum().sqrt()
            seen = row * factor
        if config.get("apply_b_dec_to_input", True):
            seen = seen - w["b_dec"]
        norm = torch.ones(FEATURES)
        if config["architecture"] == "gated":
            active = seen @ w["W_enc"] + w["b_gate"] > 0
            found = active * (seen @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).clamp(min=0)
        else:
            pre = seen @ w["W_enc"] + w["b_enc"]
            found = pre.clamp(min=0)
            if config["architecture"] == "jumprelu":
                found = found * (pre > w["threshold"].clamp(min=0))
            if config.get("rescale_acts_by_decoder_norm"):
                norm = w["W_dec"].square().sum(1).sqrt()
            if "k" in config:
                smallest = sorted((pre * norm).tolist(), reverse=True)[config["k"] - 1]
                found = (pre * norm).clamp(min=0) * (pre * norm >= smallest)
        acts.append(found)
        made.append(((found / norm) @ w["W_dec"] + w["b_dec"]) / factor * deviation + mean)
    return torch.stack(acts).view(*x.shape[:-1], -1), torch.stack(made).view_as(x)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ("b_enc",)),
        ({"apply_b_dec_to_input": False}, ("b_enc",)),
        ({"normalize_activations": "layer_norm"}, ("b_enc",)),
        ({"normalize_activations": "constant_norm_rescale"}, ("b_enc",)),
        ({"architecture": "jumprelu"}, ("b_enc", "threshold")),
        ({"architecture": "topk", "k": 6}, ("b_enc",)),
        ({"architecture": "topk", "k": 30}, ("b_enc",)),  # some of the largest are below zero
        ({"architecture": "topk", "k": 6, "rescale_acts_by_decoder_norm": True}, ("b_enc",)),
        ({"architecture": "gated"}, ("b_gate", "r_mag", "b_mag")),
    ],
)
def test_saelens_files_say_what_saelens_does(tmp_path: Path, changes: Any, names: Any) -> None:
    config, w = {**SAELENS, **changes}, weights(*names)
    sae = load_sae(write(tmp_path, w, config))
    code = sae.read(X)
    acts, made = by_hand(X, w, config)
    assert 0 < (acts > 0).float().mean() < 0.9
    torch.testing.assert_close(code.acts, acts, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae.write(code), made, rtol=1e-4, atol=1e-4)
    assert (sae.hook, len(sae), sae.d_in) == ("blocks.1.hook_mlp_out", FEATURES, WIDTH)
    double = sae.to(torch.float64)
    assert double.read(X).acts.dtype == torch.float64 and sae.to(torch.float32) is sae


def test_older_saelens_files(tmp_path: Path) -> None:
    """Before version 6 a file was flat; TopK was an activation function; factors of features and their logarithms lay beside."""
    w = weights("b_enc")
    flat = {
        "d_in": WIDTH,
        "d_sae": FEATURES,
        "hook_point": "blocks.2.hook_resid_post",
        "normalize_activations": False,
    }
    old = {**flat, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 6}}
    sae = load_sae(write(tmp_path / "topk", w, old) / "sae_weights.safetensors")
    assert sae.hook == "blocks.2.hook_resid_post"
    torch.testing.assert_close(
        sae.read(X).acts, by_hand(X, w, {"architecture": "topk", "k": 6})[0], rtol=1e-4, atol=1e-5
    )
    factor = drawn(FEATURES, seed=4).abs()
    folder = write(
        tmp_path / "factor", {**w, "scaling_factor": factor}, {**flat, "finetuning_scaling_factor": True}
    )
    save_file({"sparsity": torch.zeros(FEATURES)}, folder / "sparsity.safetensors")
    expected = by_hand(X, {**w, "W_dec": w["W_dec"] * factor[:, None]}, {"architecture": "standard"})[1]
    sae = load_sae(folder)
    torch.testing.assert_close(sae.write(sae.read(X)), expected, rtol=1e-4, atol=1e-4)
    w = weights("b_enc", "threshold")
    logs = {name: x for name, x in w.items() if name != "threshold"} | {
        "log_threshold": w["threshold"].abs().log()
    }
    sae = load_sae(write(tmp_path / "log", logs, {**flat, "architecture": "jumprelu"}))
    torch.testing.assert_close(sae.threshold, w["threshold"].abs())


def test_prisma_s_files(tmp_path: Path) -> None:
    w = weights("b_enc")
    config = {
        "d_in": WIDTH,
        "d_sae": FEATURES,
        "hook_point_layer": 1,
        "layer_subtype": "hook_resid_post",
        "hook_point_head_index": None,
        "activation_fn_str": "relu",
        "activation_fn_kwargs": {},
        "normalize_activations": "layer_norm",
        "architecture": "standard",
        "cls_token_only": True,
        "use_patches_only": False,
        "is_transcoder": False,
        "dtype": {"__type__": "torch.dtype", "value": "torch.float32"},
    }
    sae = load_sae(write(tmp_path, w, config, "config.json"))
    assert (sae.hook, sae.tokens, sae.normalization) == ("blocks.1.hook_resid_post", "class", "layer_norm")
    torch.testing.assert_close(sae.read(X).acts, by_hand(X, w, config)[0], rtol=1e-4, atol=1e-5)
    assert load_sae(tmp_path, hook="blocks.0.hook_mlp_out").hook == "blocks.0.hook_mlp_out"
    assert "40 features of blocks.1.hook_resid_post, 32 wide, ReLU, class tokens" in repr(sae)


BAD: dict[str, tuple[Any, Any, str]] = {
    "wider": ({"d_in": 64}, {}, "64 wide of 40 features"),
    "more features": ({"d_sae": 10**9}, {}, "of 1000000000 features"),
    "no size": ({"d_in": "32"}, {}, "expected d_in to be a whole number"),
    "decoder": ({}, {"W_dec": torch.ones(WIDTH, WIDTH)}, r"expected W_dec \[40, 32\]"),
    "missing": ({}, {"b_enc": None}, "none of b_enc"),
    "besides": ({}, {"W_skip": torch.ones(3)}, "W_skip besides"),
    "nan": ({}, {"b_dec": torch.full((WIDTH,), torch.nan)}, "nan or inf in b_dec"),
    "whole numbers": ({}, {"b_enc": torch.ones(FEATURES, dtype=torch.int64)}, "floating point"),
    "architecture": ({"architecture": "temporal"}, {}, "architecture 'temporal'"),
    "function": ({"activation_fn": "tanh-relu"}, {}, "activation function 'tanh-relu'"),
    "transcoder": ({"is_transcoder": True}, {}, "transcoder"),
    "one head": ({"hook_head_index": 3}, {}, "a single head"),
    "k missing": ({"architecture": "topk"}, {}, "TopK without its k"),
    "k": ({"architecture": "topk", "k": 41}, {}, r"k in 1..40"),
    "norm": ({"normalize_activations": "expected_average_only_in"}, {}, "fold it in SAELens"),
    "norm as a flag": ({"normalize_activations": True}, {}, "fold it in SAELens"),
    "factor": ({}, {"scaling_factor": torch.full((FEATURES,), 2.0)}, "factors of features"),
    "factor of another size": ({}, {"scaling_factor": torch.ones(3)}, "do not fit each other"),
    "two kinds of tokens": (
        {"cls_token_only": True, "use_patches_only": True},
        {},
        "class tokens alone and patches alone",
    ),
    "two thresholds": (
        {"architecture": "jumprelu"},
        {"threshold": torch.ones(FEATURES), "log_threshold": torch.ones(FEATURES)},
        "log_threshold besides",
    ),
    "no hook": ({"metadata": {}}, {}, "names no hook point"),
    "metadata": ({"metadata": [1]}, {}, "expected metadata to be an object"),
}


@pytest.mark.parametrize("case", BAD)
def test_files_that_are_not_what_they_say(case: str, tmp_path: Path) -> None:
    changes, odd, message = BAD[case]
    state = {name: x for name, x in {**weights("b_enc"), **odd}.items() if x is not None}
    with pytest.raises(CheckpointError, match=message):
        load_sae(write(tmp_path, state, {**SAELENS, **changes}))


class Calls:
    """A pickle that would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def test_pickles_are_refused_unread(tmp_path: Path) -> None:
    torch.save({"cfg": Calls(tmp_path / "ran")}, tmp_path / "weights.pt")
    (tmp_path / "config.json").write_text("{}")
    for path in (tmp_path, tmp_path / "weights.pt"):
        with pytest.raises(
            CheckpointError, match=r"weights.pt; a pickle, as Prisma's .pt is(.|\n)*save_file"
        ):
            load_sae(path)
    assert not (tmp_path / "ran").exists()


def test_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a sparse autoencoder at"):
        load_sae(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="received none"):
        load_sae(tmp_path)
    folder = write(tmp_path / "two", weights("b_enc"), SAELENS)
    (folder / "sae_weights.safetensors").rename(folder / "a.safetensors")
    assert len(load_sae(folder)) == FEATURES
    save_file({}, folder / "b.safetensors")
    with pytest.raises(CheckpointError, match="a.safetensors, b.safetensors"):
        load_sae(folder)
    (folder / "a.safetensors").write_bytes((folder / "a.safetensors").read_bytes()[:300])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load_sae(folder / "a.safetensors")
    (folder / "cfg.json").write_text("[" * 9)
    with pytest.raises(CheckpointError, match="no JSON"):
        load_sae(folder / "a.safetensors")
    (folder / "cfg.json").unlink()
    with pytest.raises(CheckpointError, match="cfg.json or config.json beside"):
        load_sae(folder / "a.safetensors")


def made(width: int = WIDTH, hook: str = "blocks.1.hook_mlp_out", **options: Any) -> SparseAutoencoder:
    return SparseAutoencoder(
        drawn(width, 8, seed=0),
        drawn(8, seed=1),
        drawn(8, width, seed=2),
        drawn(width, seed=3),
        hook,
        **options,
    )


def test_an_autoencoder_of_another_tower(make_tower: Callable[..., HookedViT]) -> None:
    tower = make_tower()
    assert str(made().site(tower).components) == "mlps[1]"
    assert made(48, "blocks.2.mlp.hook_post").site(tower).written is False
    for sae, message in {
        made(64): "expected a sparse autoencoder 32 wide, as blocks.1.hook_mlp_out",
        made(
            hook="blocks.7.hook_mlp_out"
        ): "in one of 3 blocks; received one of 'blocks.7.hook_mlp_out'; nearest: blocks",
        made(hook="blocks.1.ln1.hook_normalized"): "expected a sparse autoencoder of one of hook_ln_pre",
        made(hook="layer 1"): "load_sae",
    }.items():
        with pytest.raises(ValueError, match=message):
            sae.site(tower)
    with pytest.raises(ValueError, match="a tower with a class token"):
        made(tokens="class").site(make_tower(pool="mean", n_prefix=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": torch.ones(3)}, r"threshold \[8\]"),
        ({"k": 0}, "k in 1..8"),
        ({"k": True}, "k in 1..8, the number of features; received True"),
        ({"k": 2.0}, "received 2.0"),
        ({"hook": 5}, "a hook point such as 'blocks.9.hook_mlp_out'; received 5"),
        ({"normalization": "unit"}, "normalization of"),
        ({"tokens": "cls"}, "tokens of"),
    ],
)
def test_options_that_there_are_not(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**options)
