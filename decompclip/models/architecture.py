"""open_clip's configuration of a model, read from its modules and proved by building it: what a saved folder has to say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import open_clip
import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import QuickGELU, TextTransformer, VisionTransformer
from torch import nn

from decompclip.models.spec import build_open_clip
from decompclip.models.text import ImageOnly, build_image_only
from decompclip.tower.convert import config_of

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
    hidden = block.mlp.c_fc.out_features
    gelu = block.mlp.gelu
    ratio = hidden / width
    return {
        "layers": len(transformer.resblocks),
        "mlp_ratio": ratio if int(width * ratio) == hidden else (hidden + 0.5) / width,
        "ls_init_value": None if isinstance(block.ls_1, nn.Identity) else 1.0,
        "norm_kwargs": {"eps": block.ln_1.eps},
        **({"act_kwargs": {"approximate": "tanh"}} if getattr(gelu, "approximate", "none") == "tanh" else {}),
    }


def _plain(size: Any) -> Any:
    """A square's side, or height and width as JSON has them."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height) if height == width else [int(height), int(width)]
