"""Weights files, read without ever running what is in them."""

from __future__ import annotations

import hashlib
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

_SAFE = "have its author save the weights as safetensors, or as a plain dict of tensors"
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
# Settings that OpenAI's archives carry among their weights, and an old buffer.
_NO_WEIGHTS = {"input_resolution", "context_length", "vocab_size", "position_ids", "attn_mask"}


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a local file by name, on the CPU: safetensors, or torch's own format.

    Training checkpoints (`state_dict` beside optimizer and epoch, names under `module.`, as open_clip,
    CleanCLIP and BadCLIP write them) are unwrapped.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is broken, holds more than tensors and plain values, or no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a weights file (safetensors, or torch's .pt, .bin); there is no file {path}"
        )
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(
            f"expected a dict of tensors, or one under {', '.join(map(repr, _WRAPPERS))}; received {_kind(content)} "
            f"in {path}"
        )
    weights = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return {name: value for name, value in weights.items() if name.rpartition(".")[2] not in _NO_WEIGHTS}


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], *, name: str, path: str | Path) -> None:
    """Put a checkpoint's tensors into an open_clip model: every one of them, and all of the model.

    Raises:
        CheckpointError: tensors are missing, left over or of another shape; it says which, how many and the
            likely cause.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in weights]
    left_over = [key for key in weights if key not in own]
    misfits = [key for key in own if key in weights and own[key].shape != weights[key].shape]
    if not (missing or left_over or misfits):
        model.load_state_dict(dict(weights))
        return
    faults = [
        f"{len(keys)} {what}, first {keys[0]}{detail(keys[0])}"
        for keys, what, detail in (
            (
                misfits,
                "of another shape",
                lambda k: f" {list(weights[k].shape)} instead of {list(own[k].shape)}",
            ),
            (missing, "missing", lambda k: ""),
            (left_over, "left over", lambda k: ""),
        )
        if keys
    ]
    raise CheckpointError(
        f"expected the {len(own)} tensors of {name}; received {len(weights)} in {path}, of which {'; '.join(faults)}. "
        f"{_cause(weights)}"
    )


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with Path(path).open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _digest(file)
        )


def _digest(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(
            f"expected a safetensors file; {path} is cut short or none ({error}); fetch or save it again"
        ) from error


def _read_torch(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any("/code/" in entry for entry in archive.namelist()):
                raise CheckpointError(
                    f"refused {path}: a TorchScript archive, which is a program; nothing in it was run; {_SAFE}"
                )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        if "Weights only load failed" in str(error) and "nsupported" in str(error):
            reason = next((line for line in str(error).splitlines() if "nsupported" in line), "").strip()
            raise CheckpointError(
                f"refused {path}: it holds more than tensors and plain values, perhaps code; nothing in it was run; "
                f"{_SAFE} ({reason})"
            ) from error
        raise _broken(path, error) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, IndexError, AttributeError) as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> CheckpointError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return CheckpointError(
        f"expected a file that torch.save wrote; {path} is cut short or none ({first}); fetch or save it again"
    )


def _kind(content: Any) -> str:
    if isinstance(content, Mapping):
        return f"a dict with {', '.join(map(repr, list(content)[:5])) or 'nothing'}"
    return f"a {type(content).__name__}"


def _cause(weights: Mapping[str, Tensor]) -> str:
    fitting = [name for name in open_clip.list_models() if _fits(open_clip.get_model_config(name), weights)]
    if fitting:
        return f"By its shapes it is of {', '.join(fitting[:6])}: give that name."
    if any(key.startswith(("vision_model.", "text_model.")) for key in weights):
        return "Its names are Hugging Face's; expected are open_clip's."
    return "Likely it is of another architecture, or of a part of a model."


def _fits(config: Any, weights: Mapping[str, Tensor]) -> bool:
    """Whether a native open_clip configuration has the image tower of these weights."""
    vision, kernel = config["vision_cfg"], weights.get("visual.conv1.weight")
    proj, positions = weights.get("visual.proj"), weights.get("visual.positional_embedding")
    if kernel is None or proj is None or positions is None or not isinstance(vision.get("layers"), int):
        return False
    blocks = {key.split(".")[3] for key in weights if key.startswith("visual.transformer.resblocks.")}
    patch, size = vision.get("patch_size", 16), vision.get("image_size", 224)
    return (
        kernel.ndim == 4
        and kernel.shape[-1] == patch
        and tuple(proj.shape) == (vision.get("width", 768), config["embed_dim"])
        and len(blocks) == vision["layers"]
        and isinstance(size, int)
        and len(positions) == (size // patch) ** 2 + 1
    )
