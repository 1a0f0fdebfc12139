"""Reading files of weights from strangers: tensors only, no code is ever run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from decompclip.models.errors import CheckpointError
from decompclip.models.fit import check_fit
from decompclip.models.torchscript import (
    OPENAI_NUMBERS,
    check_archive,
    is_torchscript,
    members_of,
    read_torchscript,
)
from decompclip.models.wrappers import flat, unwrapped

__all__ = ["CheckpointError", "check_fit", "digest", "read_checkpoint", "sha256"]

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


def digest(files: Sequence[Path]) -> str:
    """The SHA-256 of a file; of several, that of what `sha256sum` prints for them."""
    if len(files) == 1:
        return sha256(files[0])
    lines = "".join(f"{sha256(file)}  {file.name}\n" for file in files)
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
    reason = (str(error) or type(error).__name__).splitlines()[0][:160]
    return CheckpointError(
        f"the checkpoint {path} ({path.stat().st_size:,} bytes) is truncated or damaged: {reason}; copy or "
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
    size, told = path.stat().st_size, sum(x.numel() * x.element_size() for x in weights.values())
    if told > TIMES_ITS_FILE * size:
        raise CheckpointError(
            f"{path} has {size:,} bytes, and the weights in it are said to have {told:,}: they repeat the same numbers; "
            "save contiguous copies (`tensor.clone()`)"
        )
