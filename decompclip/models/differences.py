"""Weights stored as a difference from another model's: small whole numbers times a step for each row.

What is stored defines the model: it is the restored weights that are measured and that a card's hash is of, so that
nothing is lost between the two. A twin of a bundled model takes a quarter of its size in fp16.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from decompclip.files import atomic_write
from decompclip.models.errors import CheckpointError

STEPS = 4
"""Steps in a standard deviation of a row's difference: the rounding is 7 % of it, far below what training leaves to chance."""

WHOLE = math.inf

_STEP = "step/"


def nothing(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros in the shapes of `state`: the base of a model that is stored whole, with `steps=WHOLE`."""
    return {name: torch.zeros_like(value, dtype=torch.float32) for name, value in state.items()}


def as_stored(
    state: Mapping[str, Tensor], base: Mapping[str, Tensor], *, steps: float = STEPS
) -> dict[str, Tensor]:
    """The weights that are left of `state` once it is stored: what is to be measured.

    Args:
        state: a model's weights.
        base: those that it is stored as a difference from.
        steps: in a standard deviation of a row's difference. `WHOLE`: as fine as eight bits allow.

    Raises:
        ValueError: not the weights of one architecture, or not finite.
    """
    return _restore(_encode(state, base, steps), base)


def write_difference(
    state: Mapping[str, Tensor], base: Mapping[str, Tensor], path: Path, *, steps: float = STEPS
) -> str:
    """Write `state` as its difference from `base`; returns the digest of the restored weights.

    Args:
        state, base, steps: as `as_stored`.
        path: of the file.

    Raises:
        ValueError: as `as_stored`.
        OSError: the file cannot be written.
    """
    encoded = _encode(state, base, steps)
    # the numbers follow each other without pattern: Huffman's code alone, no search for repetitions
    packer = zlib.compressobj(9, strategy=zlib.Z_HUFFMAN_ONLY)
    with atomic_write(path) as partial:
        partial.write_bytes(packer.compress(save(encoded)) + packer.flush())
    return digest(_restore(encoded, base))


def read_difference(path: Path, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that `write_difference` stored, in fp32.

    Raises:
        CheckpointError: a file that is cut, changed, larger than such a difference can be, or of other weights.
    """
    # a byte a number, steps, and names: more than that is not unpacked
    bound = 2 * sum(x.numel() for x in base.values()) + 1024 * len(base) + (1 << 20)
    unpacker = zlib.decompressobj()
    try:
        content = unpacker.decompress(path.read_bytes(), bound)
        if not unpacker.eof:
            raise ValueError("it is cut, or unpacks to more than such a difference can be")
        return _restore(load(content), base)
    except (zlib.error, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is no difference from these weights: {error}; install decompclip again, or build it anew"
        ) from error


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of weights: names in order, shapes, and values in fp32."""
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(f"{name} {list(state[name].shape)}\n".encode())
        found.update(
            state[name].detach().cpu().float().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return found.hexdigest()


def _encode(state: Mapping[str, Tensor], base: Mapping[str, Tensor], steps: float) -> dict[str, Tensor]:
    _check_names(state, base)
    encoded = {}
    for name, value in state.items():
        rows = _rows(value.detach().cpu().float() - base[name].float())
        if not rows.isfinite().all():
            raise ValueError(f"expected finite weights; received others in {name}")
        step = torch.maximum(rows.square().mean(1).sqrt() / steps, rows.abs().amax(1) / 127)
        whole = torch.where(step[:, None] > 0, rows / step[:, None], 0).round()
        encoded[name] = whole.to(torch.int8).reshape(value.shape)
        encoded[_STEP + name] = step
    return encoded


def _restore(encoded: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One product and one sum for each weight: the same on every machine."""
    _check_names({name: x for name, x in encoded.items() if not name.startswith(_STEP)}, base)
    restored = {}
    for name, value in base.items():
        whole, step = encoded[name], encoded[_STEP + name]
        if whole.shape != value.shape or whole.dtype != torch.int8 or step.dtype != torch.float32:
            raise ValueError(
                f"{name} is {whole.dtype} {list(whole.shape)}, expected int8 {list(value.shape)}"
            )
        moved = (_rows(whole).float() * step[:, None]).reshape(value.shape)
        restored[name] = value.float() + moved
    return restored


def _rows(x: Float[Tensor, "*axes"] | Int[Tensor, "*axes"]) -> Tensor:
    return x.reshape(x.shape[0], -1) if x.ndim > 1 else x.reshape(1, -1)


def _check_names(state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
    if odd := sorted(set(state) ^ set(base)):
        raise ValueError(
            f"expected the weights of one architecture; {len(odd)} are in one alone, first {odd[0]}"
        )
    if odd := sorted(name for name in state if state[name].shape != base[name].shape):
        raise ValueError(f"expected weights of one shape; {len(odd)} differ, first {odd[0]}")
