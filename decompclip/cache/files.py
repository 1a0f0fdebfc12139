"""Files of ours, with a digest of what they hold; a decomposition as one of them, complete with its maps."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from decompclip.cache.decomposition import Decomposition
from decompclip.cache.maps import Convention, TermMaps
from decompclip.cache.token_terms import TokenTerms
from decompclip.files import atomic_write

FORMAT = "decompclip.decomposition/2"


def save_decomposition(d: Decomposition, path: Path) -> Path:
    """Write it whole, or not at all."""
    tensors: dict[str, Tensor | None] = {
        **{name: getattr(d, name) for name in ("coords", "mlps", "embed", "pool", "bias_coords", "target")},
        # Behind an attention pool the maps of heads are views of one identity.
        "maps.heads": d.maps.heads[:1, :1] if d.maps.direct else d.maps.heads,
        **{f"maps.{name}": getattr(d.maps, name) for name in ("bias", "tokens", "out", "fingerprint")},
    }
    if d.token_terms is not None:
        names = ("kept", "attention", "values", "scale")
        tensors |= {f"tokens.{name}": getattr(d.token_terms, name) for name in names}
    about = {"convention": d.convention, "normalized": d.normalized, "bias_names": d.maps.bias_names}
    about |= {"extras": d.maps.extras}
    return write_tensors(path, {name: x for name, x in tensors.items() if x is not None}, FORMAT, about)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], form: str, about: Mapping[str, Any]) -> Path:
    """Write tensors and what is to be said about them, whole or not at all, with a digest of both."""
    stored = {name: x.detach().cpu().clone().contiguous() for name, x in tensors.items()}
    text = json.dumps(about)
    metadata = {"format": form, "about": text, "sha256": _digest(stored, text)}
    with atomic_write(path) as partial:
        save_file(stored, partial, metadata=metadata)
    return path


def _digest(tensors: Mapping[str, Tensor], about: str) -> str:
    """SHA-256 of names, types, shapes and numbers, and of what is said about them."""
    found = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        x = tensors[name]
        found.update(f"{name} {x.dtype} {list(x.shape)}\n".encode())
        found.update(x.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def read_tensors(path: Path, form: str, what: str, writer: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file of ours, and what it says about them.

    Args:
        form: the format that its metadata must name.
        what, writer: what such a file holds and what writes it, for the errors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is broken, not as it was written, or holds something else. Files of older versions have no
            digest; their numbers are taken as they are.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected {what}; received {path}, which is no file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"expected a safetensors file; received {path}, which cannot be read ({error}); save it again"
        ) from error
    if metadata.get("format") != form:
        raise ValueError(
            f"expected a file of format {form}; received {path} of format {metadata.get('format', 'unknown')}; "
            f"write it with {writer}"
        )
    text = metadata.get("about", "")
    if "sha256" in metadata and metadata["sha256"] != _digest(tensors, text):
        raise ValueError(
            f"expected {path} as it was written; received other numbers than its digest is of: it was changed or damaged; "
            "copy it again, or save it again"
        )
    return tensors, json.loads(text)


def load_decomposition(path: Path) -> Decomposition:
    """Read what `save_decomposition` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is broken, or holds something else.
    """
    tensors, about = read_tensors(path, FORMAT, "a saved decomposition", "Decomposition.save")
    kept = {name.removeprefix("maps."): tensors.pop(name) for name in [*tensors] if name.startswith("maps.")}
    if "tokens" in kept:
        kept["heads"] = kept["heads"].expand(*kept["tokens"].shape[:2], -1, -1)
    maps = TermMaps(
        **kept,
        bias_names=tuple(about["bias_names"]),
        convention=cast(Convention, about["convention"]),
        extras=about["extras"],
    )
    tokens = {name.removeprefix("tokens."): tensors.pop(name) for name in [*tensors] if "." in name}
    return Decomposition(
        **tensors,
        maps=maps,
        normalized=bool(about["normalized"]),
        token_terms=TokenTerms(**{**tokens, "kept": tokens["kept"].to(torch.bool)}) if tokens else None,
    )
