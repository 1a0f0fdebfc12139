"""Sparse autoencoders: read from SAELens' and Prisma's files, and what they say of an activation.

An activation `x` of one token is a few of many directions, a constant, and what both miss (Bricken et al., 2023):

    x = (sum_j acts[j] * W_dec[j] + b_dec) * scale + mean + error

`scale` and `mean` are 1 and 0 but for autoencoders of normalised activations, whose `x` they are. Nothing is trained here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.api import check_choice
from decompclip.decomposition.components import Components, embed, heads, layers, mlps
from decompclip.decomposition.maps import full_precision
from decompclip.display import some
from decompclip.models.checkpoint import read_checkpoint
from decompclip.models.errors import CheckpointError
from decompclip.models.json_files import (
    FLAG,
    SIZE,
    TEXT,
    WHOLE,
    Kind,
    check_fields,
    either,
    may_be_null,
    part,
    read_json,
)
from decompclip.tower.cache import nearest_names
from decompclip.tower.vit import HookedViT

Normalization = Literal["none", "layer_norm", "constant_norm_rescale"]
"""What an activation is brought to before it is read, by SAELens' names: mean 0 and deviation 1, or length sqrt(d_in)."""

Read = Literal["all", "class", "patches"]
"""Which tokens an autoencoder was trained on."""


class Code(NamedTuple):
    """What an autoencoder reads in activations: numbers of the formula above."""

    acts: Float[Tensor, "*row feature"]
    scale: Float[Tensor, "*row 1"]
    mean: Float[Tensor, "*row 1"]


@dataclass(frozen=True)
class Site:
    """A hook point, as a place in the decomposition.

    Attributes:
        components: what its activation is the sum of, or belongs to.
        layer: the block; -1 before the first.
        width: of a token's activation.
        written: whether the activation is a part of the stream, so that its terms are exact.
    """

    components: Components
    layer: int
    width: int
    written: bool


@dataclass(frozen=True, eq=False, repr=False)
class SparseAutoencoder:
    """An autoencoder of the activations at one hook point. `load_sae` reads one.

    Attributes:
        hook: the hook point, such as "blocks.9.hook_mlp_out".
        threshold: of JumpReLU, what a feature must exceed to be active; None: 0, a ReLU.
        k: of TopK, how many features may be active in a token; None: any number.
        normalization: of activations.
        subtract_bias: whether `b_dec` is taken off before activations are read (SAELens' `apply_b_dec_to_input`).
        tokens: which it was trained on; others are left alone.

    Raises:
        ValueError: shapes that do not fit each other, weights that are not finite, an unknown option, or a `k` that is
            not in 1..features.
    """

    W_enc: Float[Tensor, "d_in feature"]
    b_enc: Float[Tensor, " feature"]
    W_dec: Float[Tensor, "feature d_in"]
    b_dec: Float[Tensor, " d_in"]
    hook: str
    _: KW_ONLY
    threshold: Float[Tensor, " feature"] | None = None
    k: int | None = None
    normalization: Normalization = "none"
    subtract_bias: bool = True
    tokens: Read = "all"

    def __post_init__(self) -> None:
        if self.W_enc.ndim != 2 or not self.W_enc.numel():
            raise ValueError(f"expected W_enc [d_in, feature]; received {list(self.W_enc.shape)}")
        d_in, d_sae = self.W_enc.shape
        for name, shape in {
            "b_enc": [d_sae],
            "W_dec": [d_sae, d_in],
            "b_dec": [d_in],
            "threshold": [d_sae],
        }.items():
            weight = getattr(self, name)
            if weight is not None and list(weight.shape) != shape:
                raise ValueError(
                    f"expected {name} {shape}, as W_enc {[d_in, d_sae]} has it; received {list(weight.shape)}"
                )
        if odd := [name for name, weight in self._weights().items() if not weight.isfinite().all()]:
            raise ValueError(f"expected finite weights; received nan or inf in {', '.join(odd)}")
        if self.k is not None and (type(self.k) is not int or not 1 <= self.k <= d_sae):
            raise ValueError(f"expected k in 1..{d_sae}, the number of features; received {self.k!r}")
        if not isinstance(self.hook, str):
            raise ValueError(f"expected a hook point such as 'blocks.9.hook_mlp_out'; received {self.hook!r}")
        for name, known in (("normalization", Normalization), ("tokens", Read)):
            check_choice(name, getattr(self, name), known)

    def _weights(self) -> dict[str, Tensor]:
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}

    @cached_property
    def digest(self) -> str:
        """Of everything that decides its numbers: the same on every device."""
        told = [self.hook, self.k, self.normalization, self.subtract_bias, self.tokens]
        found = hashlib.sha256(repr(told).encode())
        for name, weight in self._weights().items():
            found.update(f"{name} {list(weight.shape)}".encode())
            found.update(weight.detach().float().cpu().numpy().tobytes())
        return found.hexdigest()

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    def __len__(self) -> int:
        """Number of features."""
        return self.W_enc.shape[1]

    def to(self, *args: Any) -> SparseAutoencoder:
        """On another device or in another dtype, as `torch.Tensor.to`; itself where nothing changes.

        Args:
            *args: a device, a dtype, or both.
        """
        moved = {name: x.to(*args) for name, x in self._weights().items()}
        return self if all(x is getattr(self, name) for name, x in moved.items()) else replace(self, **moved)

    def read(self, x: Float[Tensor, "*row d_in"]) -> Code:
        """The features of activations, in the type of the weights.

        Args:
            x: activations at the hook point, a row a token.
        """
        x = x.to(self.W_enc)
        with full_precision(x):
            scale, mean = torch.ones_like(x[..., :1]), torch.zeros_like(x[..., :1])
            divisor = scale
            if self.normalization == "layer_norm":
                mean, scale = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
                divisor = scale + 1e-5  # as both libraries have it: added to the deviation, and not undone
            elif self.normalization == "constant_norm_rescale":
                length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
                divisor = scale = length.clamp_min(torch.finfo(x.dtype).tiny) / self.d_in**0.5
            unit = (x - mean) / divisor - (self.b_dec if self.subtract_bias else 0)
            pre = unit @ self.W_enc + self.b_enc
            acts = pre.relu()
            if self.k is not None:
                largest = pre.topk(self.k, dim=-1, sorted=False).indices
                acts = torch.zeros_like(acts).scatter(-1, largest, acts.gather(-1, largest))
            if self.threshold is not None:
                acts = acts * (pre > self.threshold)
            return Code(acts, scale, mean)

    def write(self, code: Code) -> Float[Tensor, "*row d_in"]:
        """The activations that features make: all of the formula but the error."""
        with full_precision(code.acts):
            return (code.acts @ self.W_dec + self.b_dec) * code.scale + code.mean

    def site(self, visual: HookedViT) -> Site:
        """Where in a tower it stands.

        Raises:
            ValueError: the tower has no such hook point, of this width, or no class token where it was trained on those.
        """
        cfg = visual.cfg
        found = re.fullmatch(r"blocks\.(\d+)\.(.+)", self.hook)
        layer, name = (int(found[1]), found[2]) if found else (-1, self.hook)
        before, z = embed | layers[: max(layer, 0)], cfg.n_heads * cfg.d_head
        sites = {
            "hook_ln_pre": Site(embed, layer, cfg.d_model, True),
            "hook_resid_pre": Site(before, layer, cfg.d_model, True),
            "hook_attn_out": Site(heads[layer], layer, cfg.d_model, True),
            "hook_resid_mid": Site(before | heads[layer], layer, cfg.d_model, True),
            "hook_mlp_out": Site(mlps[layer], layer, cfg.d_model, True),
            "hook_resid_post": Site(embed | layers[: layer + 1], layer, cfg.d_model, True),
            "attn.hook_z": Site(heads[layer], layer, z, False),
            "mlp.hook_pre": Site(mlps[layer], layer, cfg.d_mlp, False),
            "mlp.hook_post": Site(mlps[layer], layer, cfg.d_mlp, False),
        }
        if self.hook not in visual.hook_dict or name not in sites:
            near = [n for n in nearest_names(self.hook, visual.hook_dict) if n.split(".", 2)[-1] in sites]
            raise ValueError(
                f"expected a sparse autoencoder of one of {', '.join(sites)} in one of {cfg.n_layers} blocks; received "
                f"one of {self.hook!r}; nearest: {', '.join(near) or 'none'}. Where the file names its hook otherwise "
                "than this tower, load it with load_sae(path, hook=...)"
            )
        site = sites[name]
        if site.width != self.d_in:
            raise ValueError(
                f"expected a sparse autoencoder {site.width} wide, as {self.hook} of this tower; received {self!r}; it is "
                "of another architecture, or of another hook point"
            )
        if self.tokens == "class" and not cfg.n_prefix:
            raise ValueError(
                f"expected a tower with a class token, which {self!r} was trained on; received {visual!r}"
            )
        return site

    def __repr__(self) -> str:
        kind = f"top {self.k}" if self.k is not None else "ReLU" if self.threshold is None else "JumpReLU"
        tokens = "" if self.tokens == "all" else f", {self.tokens} tokens"
        return f"SparseAutoencoder({len(self)} features of {self.hook}, {self.d_in} wide, {kind}{tokens})"


# Files

_CONFIGS = ("cfg.json", "config.json")
"""SAELens', and Prisma's."""
_WEIGHTS = "sae_weights.safetensors"
_BESIDE = "sparsity.safetensors"
"""How often each feature was active in training, which SAELens writes too."""

_NAMES = ("hook_name", "hook_point", "layer_subtype", "architecture", "activation_fn", "activation_fn_str")
_FLAGS = (
    *("apply_b_dec_to_input", "cls_token_only", "use_patches_only", "is_transcoder"),
    *("rescale_acts_by_decoder_norm", "finetuning_scaling_factor"),
)
_FIELDS: Mapping[str, Kind] = {
    **dict.fromkeys(("d_in", "d_sae"), SIZE),
    **dict.fromkeys(_NAMES, may_be_null(TEXT)),
    **dict.fromkeys(_FLAGS, may_be_null(FLAG)),
    **dict.fromkeys(("hook_head_index", "hook_point_head_index", "hook_point_layer"), may_be_null(WHOLE)),
    "k": may_be_null(SIZE),
    "normalize_activations": may_be_null(either(FLAG, TEXT)),
}
"""What is read of a configuration; what else it says of the training is left."""

_ACTS = {"standard": ("b_enc",), "topk": ("b_enc",), "jumprelu": ("b_enc", "threshold"), "gated": ("b_gate", "r_mag", "b_mag")}  # fmt: skip
"""The weights of each architecture beside `W_enc`, `W_dec` and `b_dec`."""
_SCALES = ("finetuning_scaling_factor", "scaling_factor")


def load_sae(path: str | Path, *, hook: str | None = None) -> SparseAutoencoder:
    """Read a sparse autoencoder in SAELens' or Prisma's layout: a configuration in JSON beside weights in safetensors.

    Of ReLU, TopK, JumpReLU and gated autoencoders (SAELens writes BatchTopK ones as JumpReLU). They are kept in fp32, and
    what their files allow beside is folded into the weights: norms of decoders, factors of features, gates (a gated
    autoencoder that shares its encoder is a JumpReLU: Rajamanoharan et al., 2024).

    Args:
        path: the folder (`cfg.json` or `config.json`, `sae_weights.safetensors`), or the file of weights in it.
        hook: the hook point, where the configuration does not say it as this package does.

    Returns:
        The autoencoder.

    Raises:
        CheckpointError: a file that is missing, damaged, or a pickle; sizes other than the configuration's; or an
            autoencoder that is none of these.
    """
    weights = _weights_at(Path(path))
    config = next((file for name in _CONFIGS if (file := weights.parent / name).is_file()), None)
    if config is None:
        raise CheckpointError(
            f"expected {' or '.join(_CONFIGS)} beside {weights}; received none; download the configuration too"
        )
    source, about = str(config), read_json(config)
    check_fields(about, _FIELDS, source=source)
    inner = part(about, "metadata", source=source)  # where SAELens has the hook's name since version 6
    check_fields(inner, _FIELDS, source=f"{source}, metadata")
    if lacking := [name for name in ("d_in", "d_sae") if name not in about]:
        raise CheckpointError(f"{source} lacks {' and '.join(lacking)}; download the configuration again")
    kind, k = _kind(about, inner, source)
    if (hook := hook or _hook(about, inner)) is None:
        raise CheckpointError(f"{source} names no hook point; pass hook=, such as 'blocks.9.hook_mlp_out'")
    normalization = about.get("normalize_activations") or "none"
    if normalization not in get_args(Normalization):
        raise CheckpointError(
            f"{source}: expected normalize_activations of {get_args(Normalization)}; received {normalization!r}; a factor "
            "that is the same for all activations stands in no file: fold it in SAELens with "
            "`sae.fold_activation_norm_scaling_factor(...)`, and save again"
        )
    found = _folded(_named(read_checkpoint(weights), kind, weights), kind, about, weights)
    if list(found["W_enc"].shape) != [about["d_in"], about["d_sae"]]:
        raise CheckpointError(
            f"expected weights {about['d_in']} wide of {about['d_sae']} features, as {config} says; received W_enc "
            f"{list(found['W_enc'].shape)} in {weights.name}; download both again"
        )
    tokens = "class" if about.get("cls_token_only") else "patches" if about.get("use_patches_only") else "all"
    try:
        return SparseAutoencoder(
            **found,
            hook=hook,
            k=k,
            normalization=normalization,
            subtract_bias=about.get("apply_b_dec_to_input") is not False,
            tokens=tokens,
        )
    except ValueError as error:
        raise CheckpointError(f"{weights}: {error}") from error


def _weights_at(path: Path) -> Path:
    """The file of weights that a path means."""
    if path.is_dir():
        here = sorted(file for file in path.iterdir() if file.is_file())
        found = [file for file in here if file.suffix == ".safetensors" and file.name != _BESIDE]
        chosen = [file for file in found if file.name == _WEIGHTS] or found
        if len(chosen) == 1:
            return chosen[0]
        if found:
            raise CheckpointError(
                f"expected one file of weights in {path}; received {some([file.name for file in found])}; pass the path "
                "of one"
            )
        path = next(
            (file for file in here if file.suffix not in {".json", ".md"} and file.name != _BESIDE), path
        )
    if path.is_dir() or not path.exists():
        raise CheckpointError(
            f"expected a sparse autoencoder at {path}, {_WEIGHTS} and its configuration; received none"
        )
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"expected weights in safetensors; received {path.name}; a pickle, as Prisma's .pt is, can run code when it is "
            "read, and is refused. If you trust it, or in a sandbox: load it with Prisma's "
            f"`SparseAutoencoder.load_from_pretrained`, write `safetensors.torch.save_file(sae.state_dict(), {_WEIGHTS!r})` "
            "beside its config.json, and give that folder"
        )
    return path


def _hook(about: Mapping[str, Any], inner: Mapping[str, Any]) -> str | None:
    """The hook point, in the words of SAELens 6, of those before it, and of Prisma."""
    name = inner.get("hook_name") or about.get("hook_name") or about.get("hook_point")
    if name is None and about.get("hook_point_layer") is not None and about.get("layer_subtype"):
        return f"blocks.{about['hook_point_layer']}.{about['layer_subtype']}"
    return name


def _kind(about: Mapping[str, Any], inner: Mapping[str, Any], source: str) -> tuple[str, int | None]:
    """The architecture, and how many features TopK leaves."""
    kind = about.get("architecture") or "standard"
    function = about.get("activation_fn") or about.get("activation_fn_str") or "relu"
    k = about.get("k")
    if function == "topk" and kind in ("standard", "topk"):
        options = part(about, "activation_fn_kwargs", source=source)
        check_fields(options, {"k": SIZE}, source=f"{source}, activation_fn_kwargs")
        kind, k = "topk", k or options.get("k")
    heads_of = [
        inner.get("hook_head_index"),
        about.get("hook_head_index"),
        about.get("hook_point_head_index"),
    ]
    why = {
        f"architecture {kind!r}": kind not in _ACTS,
        f"activation function {function!r}": function not in ("relu", "topk"),
        "a single head's activations": any(head is not None for head in heads_of),
        "a transcoder, which reads one hook point and writes another": about.get("is_transcoder"),
        "class tokens alone and patches alone": about.get("cls_token_only") and about.get("use_patches_only"),
        "TopK without its k": kind == "topk" and k is None,
    }
    if odd := [what for what, true in why.items() if true]:
        raise CheckpointError(
            f"{source}: expected an autoencoder of {', '.join(_ACTS)}, with ReLU or TopK, of whole activations; received "
            f"{odd[0]}"
        )
    return kind, k if kind == "topk" else None


def _named(state: Mapping[str, Tensor], kind: str, source: Path) -> dict[str, Tensor]:
    """The weights of an architecture, all of them and no others, in fp32."""
    wanted = ("W_enc", "W_dec", "b_dec", *_ACTS[kind])
    if kind == "gated":  # Prisma writes a bias that it leaves idle
        state = {name: x for name, x in state.items() if name != "b_enc"}
    if "log_threshold" in state and "threshold" not in state:
        state = {**state, "threshold": state["log_threshold"].exp()}
        del state["log_threshold"]
    missing, odd = [n for n in wanted if n not in state], sorted({*state} - {*wanted, *_SCALES})
    if missing or odd:
        raise CheckpointError(
            f"{source}: expected the weights of a {kind} autoencoder, {', '.join(wanted)}; received "
            + (f"none of {some(missing)}" if missing else f"{some(odd)} besides")
        )
    if odd := [name for name, x in state.items() if not x.is_floating_point()]:
        raise CheckpointError(
            f"{source}: expected floating point; received {some(odd)} of type {state[odd[0]].dtype}"
        )
    return {name: x.float() for name, x in state.items()}


def _folded(
    weights: dict[str, Tensor], kind: str, about: Mapping[str, Any], source: Path
) -> dict[str, Tensor]:
    """The weights as `SparseAutoencoder` has them."""
    factors = [x for name in _SCALES if (x := weights.pop(name, None)) is not None]
    try:
        for factor in factors:
            if not (factor == 1).all() and not about.get("finetuning_scaling_factor"):
                raise ValueError("factors of features that the configuration does not speak of")
            weights["W_dec"] = weights["W_dec"] * factor[:, None]
        if kind == "gated":
            gate, magnitude, gain = weights.pop("b_gate"), weights.pop("b_mag"), weights.pop("r_mag").exp()
            weights["W_enc"] = weights["W_enc"] * gain
            weights |= {"b_enc": magnitude, "threshold": magnitude - gain * gate}
        if kind == "topk" and about.get("rescale_acts_by_decoder_norm"):
            norm = weights["W_dec"].norm(dim=-1)
            weights |= {"W_enc": weights["W_enc"] * norm, "b_enc": weights["b_enc"] * norm}
            weights["W_dec"] = weights["W_dec"] / norm.clamp_min(torch.finfo(norm.dtype).tiny)[:, None]
    except (IndexError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{source}: its weights do not fit each other: {error}; download it again"
        ) from error
    return weights
