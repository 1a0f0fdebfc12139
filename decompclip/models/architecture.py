"""open_clip's configuration of a model: read from its modules and proved by building it, or held against the weights beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import QuickGELU, TextTransformer, VisionTransformer
from torch import Tensor, nn

from decompclip.models.errors import CheckpointError, ModelError, first_line
from decompclip.models.spec import build_image_only, build_open_clip
from decompclip.models.text import ImageOnly
from decompclip.tower.families import config_of

# Attributes that decide nothing of what a model computes.
_ASIDE = {
    "training",
    "image_mean",
    "image_std",
    "output_dict",
    "grad_checkpointing",
    "why",
    "name",
    "requires_grad",
}

Facts = dict[str, Any]


def proved(net: nn.Module, given: Mapping[str, Any] | None, *, name: str) -> dict[str, Any]:
    """A configuration that builds `net` again, layer by layer.

    Args:
        net: a model of open_clip's.
        given: the configuration that the model is said to have; size and activation are the modules' own.

    Raises:
        ValueError: no configuration of open_clip's does; says where the nearest differs.
    """
    own, first = _facts(net), ""
    for candidate in _candidates(net, given):
        try:
            with torch.device("meta"):
                if isinstance(net, ImageOnly):
                    built: nn.Module = build_image_only(candidate, why="")
                    candidate["image_only"] = net.why
                else:
                    built = build_open_clip(candidate)
        except (
            ImportError,
            OSError,
        ) as error:  # a text tower of transformers', whose configuration is not at hand
            if given is None or "hf_model_name" not in candidate["text_cfg"]:
                first = first or str(error)
                continue
            with torch.device("meta"):
                built = build_image_only(candidate, why="")
            if _facts(built.get_submodule("visual")) == _facts(net.get_submodule("visual")):
                return candidate
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            first = first or f"it cannot be built: {error}"
            continue
        theirs = _facts(built)
        if theirs == own:
            return candidate
        first = first or _difference(own, theirs)
    raise ValueError(
        f"expected a model that one of open_clip's configurations builds; received {name!r}, which none does"
        f"{f' ({first})' if first else ''}; set `model.architecture` to the configuration that it was built from"
    )


def _facts(net: nn.Module) -> Facts:
    """Kinds, numbers and shapes of all modules: what the same weights need to compute the same."""
    found: Facts = {}
    for path, module in net.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if key[0] != "_"
            and key not in _ASIDE
            and isinstance(value, bool | int | float | str | tuple | None)
        }
        found[path] = (type(module).__name__, plain)
    tensors = [*net.named_parameters(), *net.named_buffers()]
    return found | {f"{path} (shape)": tuple(x.shape) for path, x in tensors}


def _difference(ours: Facts, theirs: Facts) -> str:
    key = next(key for key in [*ours, *theirs] if ours.get(key) != theirs.get(key))
    return f"{key or 'the model'}: {ours.get(key, 'not there')}, expected {theirs.get(key, 'not there')}"


def _candidates(net: nn.Module, given: Mapping[str, Any] | None) -> Iterator[dict[str, Any]]:
    if given is not None:
        yield deepcopy(dict(given))
        yield _adjusted(given, net)
    native = isinstance(net.get_submodule("visual"), VisionTransformer)
    if native and isinstance(net, CLIP | CustomTextCLIP | ImageOnly):
        yield _native(net)
        return
    if given is not None:
        return
    visual: Any = net.get_submodule("visual")
    timm = None if native else getattr(visual.trunk, "default_cfg", {}).get("architecture")
    for name in open_clip.list_models():
        config: Any = open_clip.get_model_config(name)
        if (
            config["vision_cfg"].get("timm_model_name") == timm
            and ("multimodal_cfg" in config) == isinstance(net, CoCa)
            and "hf_model_name" not in config["text_cfg"]  # whose text tower would be asked of the hub
        ):
            yield _adjusted(config, net)


def _adjusted(given: Mapping[str, Any], net: nn.Module) -> dict[str, Any]:
    """A configuration with what open_clip's `force_...` options change."""
    found: dict[str, Any] = deepcopy(dict(given))
    visual: Any = net.get_submodule("visual")
    text: Any = getattr(net, "text", net)
    vision, words = found["vision_cfg"], found.get("text_cfg", {})
    if isinstance(visual, VisionTransformer):
        vision["image_size"] = _plain(visual.image_size)
        vision["patch_dropout"] = getattr(visual.patch_dropout, "prob", 0.0)
        found["quick_gelu"] = any(isinstance(module, QuickGELU) for module in visual.modules())
    if getattr(text, "context_length", 0):
        words["context_length"] = text.context_length
    if isinstance(net, CustomTextCLIP):
        found["custom_text"] = True
    return found


def _native(net: nn.Module) -> dict[str, Any]:
    """The configuration of open_clip's own towers."""
    source: Any = net
    visual: Any = net.get_submodule("visual")
    tower = config_of(visual)
    quick = tower.activation == "quick_gelu"
    found: dict[str, Any] = {
        "embed_dim": tower.d_embed,
        "quick_gelu": quick,
        "nonscalar_logit_scale": source.logit_scale.ndim > 0,
        "vision_cfg": {
            "width": tower.d_model,
            "head_width": tower.d_head,
            "image_size": _plain(visual.image_size),
            "patch_size": _plain(visual.patch_size),
            "patch_dropout": getattr(visual.patch_dropout, "prob", 0.0),
            "no_ln_pre": not tower.ln_pre,
            "pool_type": visual.pool_type,
            "final_ln_after_pool": visual.final_ln_after_pool,
            "output_tokens": visual.output_tokens,
            **_blocks(visual.transformer, tower.d_model),
        },
        "text_cfg": {},
    }
    if source.logit_bias is not None:
        found["init_logit_bias"] = 0.0
    if isinstance(net, CustomTextCLIP):
        found["custom_text"] = True
    text = getattr(source, "text", source)
    if isinstance(net, CLIP) or isinstance(text, TextTransformer):
        found["text_cfg"] = _text(text)
    return found


def _text(text: Any) -> dict[str, Any]:
    width, projection = text.token_embedding.embedding_dim, text.text_projection
    return {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "width": width,
        "heads": text.transformer.resblocks[0].attn.num_heads,
        "embed_cls": getattr(text, "cls_emb", None) is not None,
        "pad_id": getattr(text, "pad_id", 0),
        "eos_id": getattr(text, "text_eos_id", getattr(text, "eos_id", 2)),
        "pool_type": getattr(text, "text_pool_type", getattr(text, "pool_type", "argmax")),
        "no_causal_mask": text.attn_mask is None,
        "proj_bias": isinstance(projection, nn.Linear),
        "proj_type": "none" if projection is None else "linear",
        **_blocks(text.transformer, width),
    }


def _blocks(transformer: Any, width: int) -> dict[str, Any]:
    block = transformer.resblocks[0]
    gelu = block.mlp.gelu
    return {
        "layers": len(transformer.resblocks),
        "mlp_ratio": mlp_ratio(width, block.mlp.c_fc.out_features),
        "ls_init_value": None if isinstance(block.ls_1, nn.Identity) else 1.0,
        "norm_kwargs": {"eps": block.ln_1.eps},
        **({"act_kwargs": {"approximate": "tanh"}} if getattr(gelu, "approximate", "none") == "tanh" else {}),
    }


def mlp_ratio(width: int, hidden: int) -> float:
    """The MLP's width as a multiple of the stream's, so that open_clip and timm, which cut, get the same number back."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _plain(size: Any) -> Any:
    """A square's side, or height and width as JSON has them."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height) if height == width else [int(height), int(width)]


MOST_ROWS = 1 << 16
"""Patches of an image, or positions of a text: of their square a mask or an attention map may be made."""

GENEROUS = 16


@dataclass(frozen=True, kw_only=True)
class Tower:
    """The sizes that a configuration gives of a transformer.

    Attributes:
        mlp_ratio: the MLP's width as a multiple of the stream's.
        rows: vectors as wide as the stream that are looked up: positions, words of a vocabulary.
        longest: the most tokens that go through it.
    """

    name: str
    layers: int
    width: int
    mlp_ratio: float
    rows: int
    longest: int

    @property
    def numbers(self) -> float:
        """How many weights it has, but for the small ones."""
        return self.layers * (4 + 2 * self.mlp_ratio) * self.width**2 + self.rows * self.width


def towers_of(architecture: Mapping[str, Any], *, text: bool) -> list[Tower]:
    """The native towers of a configuration of open_clip's; those of other packages have fixed sizes.

    Args:
        text: with those of texts.
    """
    found = []
    vision = architecture["vision_cfg"]
    if siglip := vision.get("siglip_tower"):
        patches = patches_of(vision["image_size"], siglip["patch_size"])
        sizes = {"layers": siglip["depth"], "width": siglip["embed_dim"], "mlp_ratio": siglip["mlp_ratio"]}
        found.append(_tower("siglip_tower", sizes, 0, rows=patches, longest=patches))
    elif not vision.get("timm_model_name") and isinstance(vision.get("layers", 12), int):
        patches = patches_of(vision.get("image_size", 224), vision.get("patch_size", 16))
        found.append(_tower("vision_cfg", vision, 768, rows=patches, longest=patches))
    for name in ("text_cfg", "multimodal_cfg") if text else ():
        words = architecture.get(name)
        if words and not words.get("hf_model_name"):
            longest = words.get("context_length", 77)
            # the decoder of captions has no vocabulary of its own to look up
            looked_up = words.get("vocab_size", 49408) if name == "text_cfg" else 0
            found.append(_tower(name, words, 512, rows=longest + looked_up, longest=longest))
    return found


def _tower(name: str, part: Mapping[str, Any], width: int, *, rows: int, longest: int) -> Tower:
    return Tower(
        name=name,
        layers=part.get("layers", 12),
        width=part.get("width", width),
        mlp_ratio=part.get("mlp_ratio", 4.0),
        rows=rows,
        longest=longest,
    )


def patches_of(image: int | list[int], patch: int | list[int]) -> int:
    """How many patches an image of that size is cut into."""
    sides, cuts = ([size, size] if isinstance(size, int) else size for size in (image, patch))
    return (sides[0] // cuts[0]) * (sides[1] // cuts[1])


def check_sizes(towers: list[Tower], state: Mapping[str, Tensor], *, source: str) -> None:
    """Check that weights as many as a configuration asks for are there, without building anything.

    Raises:
        CheckpointError: they are not; or a tower for more tokens than any has.
    """
    held = sum(x.numel() for x in state.values())
    for tower in towers:
        if tower.longest > MOST_ROWS:
            raise CheckpointError(
                f"{source}, {tower.name}: expected {MOST_ROWS:,} tokens at most; received sizes that make {tower.longest:,}"
            )
        if tower.layers > len(state):
            raise CheckpointError(
                f"{source}, {tower.name}: expected the layers of the weights beside it; received {tower.layers:,} layers, "
                f"and {len(state):,} weights in all; give each model its own configuration"
            )
        if tower.numbers > GENEROUS * held:  # what is missing in an honest file is named later
            raise CheckpointError(
                f"{source}, {tower.name}: expected the sizes of the weights beside it; received {tower.layers:,} layers of "
                f"width {tower.width:,} and {tower.rows:,} rows, {tower.numbers:,.0f} numbers where the weights have "
                f"{held:,}; give each model its own configuration"
            )


@contextmanager
def out_of(source: str) -> Iterator[None]:
    """Whatever goes wrong inside while a stranger's files become a model is a `CheckpointError` that names them.

    Explicit checks come first and say more; this is for the combinations that open_clip, timm or torch refuse.
    """
    try:
        yield
    except (ModelError, ConnectionError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{source} cannot be made into a model: {first_line(error)}; its configuration and its weights are none that fit together"
        ) from error
