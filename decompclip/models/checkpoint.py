"""Reading files of weights from strangers: tensors only, no code is ever run."""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import open_clip
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from decompclip.models.errors import CheckpointError

__all__ = ["CheckpointError", "check_fit", "read_checkpoint", "sha256"]

# Where training scripts keep the weights beside optimizer, epoch and so on, innermost last.
_NESTS = ("state_dict", "model_state_dict", "model")
# What wrappers (DistributedDataParallel, torch.compile, trainers) put before every name.
_PREFIXES = ("module.", "_orig_mod.", "model.")
# Numbers that OpenAI's own files carry among the weights.
_NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")

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


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a local file: safetensors, or torch.save's format holding tensors and plain data only.

    Weights may lie under `state_dict`, as open_clip_train, CleanCLIP and BadCLIP write them, and carry
    `module.` prefixes; what stands beside them is left unread.

    Raises:
        CheckpointError: no such file, damaged, of another format, with code in it, or without weights.
    """
    path = Path(path)
    kind = _kind(path)
    if kind == "safetensors":
        try:
            content: Any = load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise _damaged(path, error) from error
    else:
        content = _unpickle_plain_data(path, mmap=kind == "zip")
    return _state_dict(path, content)


def _kind(path: Path) -> str:
    """`safetensors`, `zip` (torch.save) or `legacy` (torch.save before 1.6)."""
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
        _refuse_torchscript(path)
        return "zip"
    if start.startswith(b"\x80"):
        return "legacy"
    raise CheckpointError(
        f"{path} is no file of weights: it starts with {start[:12]!r}; expected safetensors or torch.save's format"
    )


def _refuse_torchscript(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise _damaged(path, error) from error
    if any("/code/" in name or name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(
            f"{path} is a TorchScript archive, which carries code: refused. For OpenAI's own models use "
            f'`pretrained="openai"`, which has the same weights as plain tensors; if you know the file, {_TO_SAFETENSORS} '
            "(with `torch.jit.load(path).state_dict()`)"
        )


def _unpickle_plain_data(path: Path, *, mmap: bool) -> Any:
    try:
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
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = (str(error) or type(error).__name__).splitlines()[0][:160]
    return CheckpointError(
        f"the checkpoint {path} ({path.stat().st_size:,} bytes) is truncated or damaged: {reason}; copy or "
        "download it again and compare its size and SHA-256 with the source's"
    )


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    for nest in _NESTS:
        if isinstance(content, Mapping) and isinstance(content.get(nest), Mapping):
            content = content[nest]
    found = content if isinstance(content, Mapping) else {}
    weights = {str(k): v for k, v in found.items() if isinstance(v, Tensor) and k not in _NOT_WEIGHTS}
    if not weights:
        held = ", ".join(map(str, list(found)[:8])) if found else type(content).__name__
        raise CheckpointError(
            f"no weights in {path}: it holds {held}; expected a state dict, alone or under 'state_dict'"
        )
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in weights)), None):
        weights = {key[len(prefix) :]: value for key, value in weights.items()}
    return weights


def check_fit(model: nn.Module, state: Mapping[str, Tensor], *, source: str, name: str) -> None:
    """Check that `state` holds each weight of `model`, in its shape, and nothing else.

    Raises:
        CheckpointError: it does not; says how many are missing, left over or of another shape, and what
            model the file seems to hold.
    """
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in state]
    left_over = [key for key in state if key not in wanted]
    reshaped = [key for key in wanted if key in state and wanted[key].shape != state[key].shape]
    if not (missing or left_over or reshaped):
        return
    shapes = [f"{key} expected {list(wanted[key].shape)}, got {list(state[key].shape)}" for key in reshaped]
    parts = [
        f"{len(keys)} {what} ({', '.join(shown[:3])}{', ...' if len(keys) > 3 else ''})"
        for keys, what, shown in (
            (missing, "missing", missing),
            (left_over, "left over", left_over),
            (reshaped, "of another shape", shapes),
        )
        if keys
    ]
    raise CheckpointError(
        f"{source} does not fit {name}: of {len(wanted)} weights {'; '.join(parts)}. "
        f"{likely_cause(state, set(missing))}"
    )


def likely_cause(state: Mapping[str, Tensor], missing: set[str]) -> str:
    """What a state dict that does not fit seems to be, and what to do."""
    if "visual.layer1.0.conv1.weight" in state:
        return "Likely cause: the file holds a ResNet, whose tower is not supported"
    if any(key.startswith("vision_model.") for key in state):
        return "Likely cause: the file is in Hugging Face transformers' layout; convert it to open_clip's"
    if any(key.startswith("visual.trunk.") for key in state):
        return "Likely cause: the file holds a timm tower, which is not supported yet"
    if "conv1.weight" in state and "visual.conv1.weight" in missing:
        return "Likely cause: the file holds an image tower alone; a whole CLIP is needed"
    names = _models_like(state)
    if names:
        return f"Likely cause: the file holds {' or '.join(names)}; give that name"
    return "Likely cause: the file holds another model; give the name that it was trained under"


def _models_like(state: Mapping[str, Tensor]) -> list[str]:
    """open_clip's names of native models with this state dict's shapes."""
    keys = ("visual.conv1.weight", "visual.positional_embedding", "visual.proj")
    if not all(key in state for key in keys):
        return []
    conv, positions, proj = (state[key].shape for key in keys)
    layers = len({key.split(".")[3] for key in state if key.startswith("visual.transformer.resblocks.")})
    text_width = state["ln_final.weight"].shape[0] if "ln_final.weight" in state else None
    found = []
    for name in open_clip.list_models():
        config: Any = open_clip.get_model_config(name)
        vision, text = config["vision_cfg"], config["text_cfg"]
        size, patch = vision.get("image_size", 224), vision.get("patch_size", 16)
        if "timm_model_name" in vision or not isinstance(size, int) or not isinstance(patch, int):
            continue
        shape = (
            vision.get("layers"),
            vision.get("width"),
            patch,
            (size // patch) ** 2 + 1,
            config["embed_dim"],
        )
        same_text = text_width is None or text.get("width") == text_width
        same_norms = bool(vision.get("no_ln_pre")) == ("visual.ln_pre.weight" not in state)
        if same_text and same_norms and shape == (layers, conv[0], conv[-1], positions[0], proj[1]):
            found.append(name)
    plain = [name for name in found if not name.endswith("-quickgelu")]
    return (plain or found)[:3]
