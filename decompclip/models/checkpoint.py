"""Files of weights from strangers: tensors only, no code is ever run; and what wrappers put around a model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from decompclip.display import some
from decompclip.models.errors import CheckpointError, UnknownModelError, first_line, warn_caller
from decompclip.models.torchscript import (
    OPENAI_NUMBERS,
    check_archive,
    is_torchscript,
    members_of,
    read_torchscript,
)

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
    _warn_left_out({key: x for key, x in state.items() if not key.startswith((*known, copy))}, source)
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
    """Weights without those of heads and losses beside the model, which a warning names, where nothing of the model is missing."""
    if set(wanted) - set(state):
        return dict(state)
    own = _OWN | {key.split(".")[0] for key in wanted}
    others = {key: x for key, x in state.items() if key.split(".")[0] not in own}
    _warn_left_out(others, source)
    return {key: x for key, x in state.items() if key not in others}


def _before_tower(key: str) -> str | None:
    parts = key.split(".")
    place = next((i for i, part in enumerate(parts[:-1]) if part in _TOWERS), None)
    return None if place is None else "".join(f"{part}." for part in parts[:place])


def _listed(prefixes: list[str]) -> str:
    return ", ".join(repr(prefix.rstrip(".")) for prefix in prefixes) or "none"


def _warn_left_out(others: Mapping[str, Tensor], source: str) -> None:
    if left := [key for key, x in others.items() if x.ndim]:  # others are counters
        warn_caller(
            f"{source} holds {len(left)} weights beside the model's, which were left out: {some(left, 4)}"
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


LONGEST_HEADER = 16 << 20
"""Bytes of a safetensors header that are parsed; those of models of thousands of weights have some hundred thousand."""

TIMES_ITS_FILE = 4
"""Weights may share their numbers (an embedding that is tied, a tower that is kept twice), but not without end."""

_TO_SAFETENSORS = (
    "and trust it, or in a sandbox, read it with `torch.load(path, weights_only=False)`, write its weights "
    "with `safetensors.torch.save_file(state_dict, 'weights.safetensors')`, and give that file"
)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def digest(sums: Mapping[Path, str]) -> str:
    """The SHA-256 of files from those of each: a single one's own, and of several that of what `sha256sum` prints."""
    if len(sums) == 1:
        return next(iter(sums.values()))
    lines = "".join(f"{own}  {file.name}\n" for file, own in sums.items())
    return hashlib.sha256(lines.encode()).hexdigest()


def read_checkpoint(path: str | Path, *, prefix: str | None = None) -> dict[str, Tensor]:
    """The state dict in a local file: safetensors, torch.save's format, or a TorchScript archive such as OpenAI's.

    Weights may lie under `state_dict`, as open_clip_train, CleanCLIP, BadCLIP and RoCLIP write them, and carry the words of
    wrappers (`module.`, `_orig_mod.`, `_fsdp_wrapped_module.`, ...) anywhere in their names; other weights beside them are
    left out, with a warning. Nothing in the file is ever run.

    Args:
        prefix: which copy to take, of a file that holds several (a student and its teacher, a model and its average).

    Raises:
        CheckpointError: no such file, damaged, of another format, with code in it, without weights, or with several
            copies and no prefix.
    """
    path = Path(path)
    kind = _kind(path)
    if kind == "safetensors":
        content: Any = _read_safetensors(path)
    elif kind == "torchscript":
        content = read_torchscript(path)
    else:
        content = _unpickle_plain_data(path, mmap=kind == "zip")
    return _state_dict(path, content, prefix)


def _kind(path: Path) -> str:
    """`safetensors`, `torchscript`, `zip` (torch.save) or `legacy` (torch.save before 1.6)."""
    if not path.is_file():
        what = "a folder" if path.is_dir() else "missing"
        beside = sorted(
            p.name for p in path.parent.glob("*") if p.suffix in {".pt", ".pth", ".bin", ".safetensors"}
        )
        hint = f"; beside it lie {', '.join(beside[:5])}" if beside else ""
        raise CheckpointError(
            f"no checkpoint at {path}: it is {what}{hint}; give the path of a file of weights"
        )
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise CheckpointError(f"the checkpoint {path} is empty: 0 bytes; copy or download it again")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull`")
    if path.suffix == ".safetensors" or (start[8:9] == b"{" and not start.startswith((b"PK", b"\x80"))):
        return "safetensors"
    if start.startswith(b"PK"):
        return _kind_of_zip(path)
    if start.startswith(b"\x80"):
        return "legacy"
    raise CheckpointError(
        f"{path} is no file of weights: it starts with {start[:12]!r}; expected safetensors or torch.save's format"
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > LONGEST_HEADER:
            raise ValueError(f"its header is said to have {header:,} bytes, more than any model's")
        return load_file(path)
    except Exception as error:  # safetensors' own, and Python's for odd shapes and types
        raise _damaged(path, error) from error


def _kind_of_zip(path: Path) -> str:
    if is_torchscript(path):
        return "torchscript"
    try:
        names = [member.filename for member in members_of(path)]
    except ValueError as error:
        raise _damaged(path, error) from error
    if names and not any(name.endswith("data.pkl") for name in names):
        raise CheckpointError(
            f"{path} is a zip archive of {', '.join(names[:3])}, not weights of torch's; expected safetensors or "
            "torch.save's format"
        )
    return "zip"


class _Unread:
    """Stands for a harmless object beside the weights: made and filled without any code of its own."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# What training scripts leave beside the weights: CleanCLIP's, BadCLIP's and RoCLIP's learning rates are numbers of
# numpy's, so that every one of their checkpoints names these; others keep their arguments.
_HARMLESS = (
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "_codecs.encode",
    "argparse.Namespace",
)


def _unpickle_plain_data(path: Path, *, mmap: bool) -> Any:
    try:
        if mmap:
            check_archive(path)
        with torch.serialization.safe_globals([(_Unread, name) for name in _HARMLESS]):
            # mapped, not read: an optimizer's state, twice the weights, is never touched
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except UnpicklingError as error:
        call = re.search(r"GLOBAL ([\w.]+)|unsupported (?:global|class) ([\w.]+)", str(error), re.IGNORECASE)
        opcode = re.search(r"Unsupported operand \d+", str(error))
        if call is None and opcode is None:
            raise _damaged(path, error) from error
        what = (
            f"would call {call.group(1) or call.group(2)!r}" if call else "takes more than torch.save writes"
        )
        raise CheckpointError(
            f"{path} holds more than tensors and plain data: unpickling it {what}. Refused, nothing was run. "
            f"If you know the file, {_TO_SAFETENSORS}"
        ) from error
    except (
        Exception
    ) as error:  # torch's unpickler trips over odd bytes in many ways; what it may call is bounded
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint {path} ({path.stat().st_size:,} bytes) is truncated or damaged: {first_line(error)}; copy or "
        "download it again and compare its size and SHA-256 with the source's"
    )


def _state_dict(path: Path, content: Any, prefix: str | None) -> dict[str, Tensor]:
    found = content if isinstance(content, Mapping) else {}
    weights = {key: value for key, value in flat(found) if key.split(".")[-1] not in OPENAI_NUMBERS}
    if not weights:
        held = ", ".join(map(str, list(found)[:8])) if found else type(content).__name__
        raise CheckpointError(
            f"no weights in {path}: it holds {held}; expected a state dict, alone or under 'state_dict'"
        )
    _check_plain(path, weights)
    return unwrapped(weights, prefix, source=str(path))


def _check_plain(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Check that weights are dense numbers that lie in the file: what is small on disk must not fill the memory."""
    odd = [
        key
        for key, x in weights.items()
        if x.layout != torch.strided or x.is_meta or x.is_quantized or type(x) not in (Tensor, nn.Parameter)
    ]
    if odd:
        raise CheckpointError(
            f"{path} holds {len(odd)} weights that are no plain tensors ({', '.join(odd[:3])}): sparse, quantised or "
            "without numbers; save them dense, in floating point"
        )
    size, claimed = path.stat().st_size, sum(x.numel() * x.element_size() for x in weights.values())
    if claimed > TIMES_ITS_FILE * size:
        raise CheckpointError(
            f"{path} has {size:,} bytes, and the weights in it are said to have {claimed:,}: they repeat the same numbers; "
            "save contiguous copies (`tensor.clone()`)"
        )
