"""What stands around a model: wrappers' words in the names of its weights, copies beside it, and wrappers in memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from decompclip.models.errors import CheckpointError, UnknownModelError, warn_caller

# What DistributedDataParallel, torch.compile, FSDP, activation checkpointing and DeepSpeed put into names, anywhere.
_WORDS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
# Where a whole model's image tower begins, in open_clip's and in transformers' layout.
_TOWERS = ("visual", "vision_model")
# An image tower alone, or a text tower, is found by no such word: before it these may stand.
_COMMON = ("model.", "clip.", "state_dict.", "model_state_dict.", "base_model.")
# Parts of a training's state that hold numbers by the weights' names.
_BESIDE = re.compile(r".*(optim|sched|scaler|loops|hparams|hyper).*", re.IGNORECASE)
# What a CLIP's weights begin with, in any of its layouts: such weights are never taken for something beside the model.
_OWN = {"visual", "text", "transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection",
        "logit_scale", "logit_bias", "text_decoder", "vision_model", "text_model", "visual_projection", "image_encoder",
        "text_encoder"}  # fmt: skip


def flat(content: Mapping[Any, Any], above: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested mappings under their joined names, without what an optimizer keeps."""
    for key, value in content.items():
        name = f"{above}{key}"
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping) and not _BESIDE.fullmatch(str(key)):
            yield from flat(value, f"{name}.")


def unwrapped(state: Mapping[str, Tensor], prefix: str | None, *, source: str) -> dict[str, Tensor]:
    """The weights of one model under its own names.

    Args:
        prefix: of the copy to take, where there are several; None takes the only one.

    Raises:
        CheckpointError: several copies and no prefix, or no copy under that prefix; names them.
    """
    words = {key: ".".join(part for part in key.split(".") if part not in _WORDS) for key in state}
    if len(set(words.values())) == len(words):  # else the words tell two copies apart
        state = {words[key]: value for key, value in state.items()}
    copies = sorted({before for key in state if (before := _before_tower(key)) is not None})
    others = copies
    if prefix is not None:
        wanted = prefix.rstrip(".") + "." if prefix.rstrip(".") else ""
        found = [copy for copy in copies if copy == wanted] or [
            copy for copy in copies if wanted and copy.endswith(f".{wanted}")
        ]
        if len(found) != 1:
            raise CheckpointError(
                f"expected a prefix of the weights in {source}: {_listed(copies)}; received {prefix!r}"
            )
        copies = found
    if len(copies) > 1:
        raise CheckpointError(
            f"{source} holds {len(copies)} models, under the prefixes {_listed(copies)}; pass prefix= to choose one"
        )
    if not copies:
        while common := next((p for p in _COMMON if all(key.startswith(p) for key in state)), None):
            state = {key.removeprefix(common): value for key, value in state.items()}
        return dict(state)
    (copy,) = copies
    known = tuple(each for each in others if each) if prefix is not None else (copy,)
    _tell_left_out({key: x for key, x in state.items() if not key.startswith((*known, copy))}, source)
    deeper = tuple(each for each in others if each != copy and each.startswith(copy))
    # a number at the top is a counter, of averaged models for instance
    return {
        name: x
        for key, x in state.items()
        if key.startswith(copy)
        and not key.startswith(deeper)
        and ((name := key.removeprefix(copy)).startswith("logit_") or "." in name or x.ndim)
    }


def without_others(state: Mapping[str, Tensor], wanted: Iterable[str], *, source: str) -> dict[str, Tensor]:
    """Weights without those of heads and losses beside the model, which are told, where nothing of the model is missing."""
    if set(wanted) - set(state):
        return dict(state)
    own = _OWN | {key.split(".")[0] for key in wanted}
    others = {key: x for key, x in state.items() if key.split(".")[0] not in own}
    _tell_left_out(others, source)
    return {key: x for key, x in state.items() if key not in others}


def _before_tower(key: str) -> str | None:
    parts = key.split(".")
    place = next((i for i, part in enumerate(parts[:-1]) if part in _TOWERS), None)
    return None if place is None else "".join(f"{part}." for part in parts[:place])


def _listed(prefixes: list[str]) -> str:
    return ", ".join(repr(prefix.rstrip(".")) for prefix in prefixes) or "none"


def _tell_left_out(others: Mapping[str, Tensor], source: str) -> None:
    if told := [key for key, x in others.items() if x.ndim]:  # others are counters
        warn_caller(
            f"{source} holds {len(told)} weights beside the model's, which were left out: {', '.join(told[:4])}"
            f"{', ...' if len(told) > 4 else ''}"
        )


# in memory

_INNER = ("_orig_mod", "_checkpoint_wrapped_module", "module")


def bare(model: nn.Module) -> nn.Module:
    """A model in memory without the wrappers around it and inside it; the weights are shared, the caller's modules stay
    as they are.

    Raises:
        UnknownModelError: a wrapper that changes the weights or spreads them.
    """
    for module in model.modules():
        _refuse(module)
    return _bare(model, {})


def _refuse(module: nn.Module) -> None:
    kind = type(module)
    where = kind.__module__.split(".")[0]
    if where == "peft" or any("lora_" in name for name, _ in module.named_parameters(recurse=False)):
        raise UnknownModelError(
            f"expected a plain model; received one with adapters ({kind.__name__}); merge them first "
            "(`merged = model.merge_and_unload()`)"
        )
    if (
        "fsdp" in kind.__module__.lower()
        or "FullyShardedDataParallel" in kind.__name__
        or "FSDP" in kind.__name__
    ):
        raise UnknownModelError(
            f"expected a whole model; received one whose weights are spread over processes ({kind.__name__}); save its "
            "full state dict, and load that file with checkpoint="
        )


def _wrapped(module: nn.Module) -> nn.Module | None:
    """What a wrapper holds: torch.compile, DataParallel, an average of weights, activation checkpointing."""
    inner = module._modules
    name = next((name for name in _INNER if name in inner), None)
    return inner[name] if name is not None and len(inner) == 1 else None


def _bare(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    while (inner := _wrapped(module)) is not None:
        module = inner
    if id(module) in done:
        return done[id(module)]
    done[id(module)] = module
    children = {
        name: child if child is None else _bare(child, done) for name, child in module._modules.items()
    }
    if any(child is not module._modules[name] for name, child in children.items()):
        module = shell(module, children)
        done[id(module)] = module
    return module


def shell(module: nn.Module, children: Mapping[str, nn.Module | None]) -> nn.Module:
    """A module of the same class and with the same parameters around other children; `module` stays as it is."""
    # not `copy.copy`, nor any assignment: wrappers hand both on to what they wrap
    found = module.__class__.__new__(module.__class__)
    own = dict(object.__getattribute__(module, "__dict__"))
    own |= {name: dict(own[name]) for name in ("_parameters", "_buffers") if name in own}
    object.__setattr__(found, "__dict__", own | {"_modules": dict(children)})
    return found
