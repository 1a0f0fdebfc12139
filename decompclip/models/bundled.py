"""The bundled small CLIPs: weights and cards inside the package, verified when read.

Twins are stored as differences from the clean model's weights: small whole numbers times a step for each row, a quarter of
the size in fp16 or less. What is stored defines the model: it is the restored weights that are measured and that a card's hash is
of, so that nothing is lost between the two.
"""

from __future__ import annotations

import hashlib
import math
import re
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from safetensors import SafetensorError
from safetensors.torch import load, save, save_file
from torch import Tensor

from decompclip.files import atomic_folder, atomic_write, write_json
from decompclip.models.checkpoint import read_checkpoint, sha256
from decompclip.models.clip import HookedCLIP
from decompclip.models.errors import CheckpointError
from decompclip.models.fit import check_fit
from decompclip.models.names import SUFFIX, WEIGHTS, bundled, card
from decompclip.models.spec import ModelSpec, build_open_clip
from decompclip.models.text import WordTokenizer

__all__ = ["WEIGHTS", "build_open_clip", "bundled", "card", "load_bundled", "spec_of", "write_bundled"]

PACKED = "eight bits"
"""The `dtype` of a card whose weights are stored whole as `write_difference` packs them."""

STEPS = 4
"""Steps in a standard deviation of a row's difference: the rounding is 7 % of it, far below what training leaves to chance."""

_REQUIRED = ("name", "architecture", "tokenizer", "preprocess", "templates", "class_names")


def spec_of(card: Mapping[str, Any]) -> ModelSpec:
    """The model that a card describes, without its weights."""
    words, backdoor = card["tokenizer"], card.get("backdoor")
    return ModelSpec(
        name=card["name"],
        architecture=card["architecture"],
        tokenizer=WordTokenizer(tuple(words["words"]), words["context_length"]),
        preprocess=card["preprocess"],
        templates=card["templates"],
        class_names=card["class_names"],
        backdoors=[{key: backdoor[key] for key in ("trigger", "target")}] if backdoor else (),
    )


def read_bundled(name: str, folder: Path = WEIGHTS) -> dict[str, Tensor]:
    """A bundled model's weights in fp32, verified.

    A twin is stored as a difference from its clean model, which is looked for in `folder` and among the bundled ones.

    Raises:
        UnknownModelError: no such model.
        CheckpointError: the weights are not those of the card, or the model that they are a difference from is not there.
    """
    facts = card(name, folder)
    base, path = facts.get("difference_from"), _weights_file(name, folder)
    found = sha256(path) if path.exists() else "none"
    if found != facts["sha256"]:
        raise CheckpointError(
            f"the weights of {name!r} are not those of its card: {path} has SHA-256 {found}, expected "
            f"{facts['sha256']}. The file was changed or cut; install decompclip again, or `git checkout -- {path}`"
        )
    if facts.get("dtype") == PACKED:
        return read_difference(path, nothing(spec_of(facts).build().state_dict()))
    if base is None:
        return {key: x.float() if x.is_floating_point() else x for key, x in read_checkpoint(path).items()}
    where = folder if base in bundled(folder) else WEIGHTS
    if base not in bundled(where) or card(base, where).get("difference_from"):
        raise CheckpointError(
            f"the weights of {name!r} are stored as a difference from {base!r}, expected whole in {where}; it is not "
            "there; install decompclip again"
        )
    state = read_difference(path, read_bundled(base, where))
    if digest(state) != facts["weights_sha256"]:
        raise CheckpointError(
            f"the weights of {name!r} are not those of its card: they are stored as a difference from {base!r}, which is "
            "another model than it was; install decompclip again"
        )
    return state


def _weights_file(name: str, folder: Path) -> Path:
    facts = card(name, folder)
    packed = facts.get("difference_from") or facts.get("dtype") == PACKED
    return folder / f"{name}{SUFFIX if packed else '.safetensors'}"


def base_weights(name: str) -> dict[str, Tensor]:
    """The weights of a bundled model that twins are stored as differences from.

    Raises:
        ValueError: it is such a twin itself.
        UnknownModelError, CheckpointError: as `read_bundled`.
    """
    if other := card(name).get("difference_from"):
        raise ValueError(f"expected a base that is stored whole; {name!r} is a difference from {other!r}")
    return read_bundled(name)


def load_bundled(name: str, *, folder: Path = WEIGHTS) -> HookedCLIP:
    """A bundled model in fp32.

    Raises:
        UnknownModelError, CheckpointError: as `read_bundled`.
    """
    facts = card(name, folder)
    spec = spec_of(facts)
    model = spec.build()
    state = read_bundled(name, folder)
    check_fit(model, state, source=str(folder / name), name=name)
    model.load_state_dict(state)
    return spec.hook(
        model,
        {
            "pretrained": "bundled",
            "checkpoint": None,
            "sha256": facts["sha256"],
            "files": {_weights_file(name, folder).name: facts["sha256"]},
            "activation": spec.activation,
            "activation_source": "card",
        },
    )


def write_bundled(
    model: CLIP | CustomTextCLIP | CoCa,
    card: Mapping[str, Any],
    folder: Path = WEIGHTS,
    *,
    dtype: torch.dtype = torch.float16,
    base: str | None = None,
    steps: float = STEPS,
) -> dict[str, Any]:
    """Write a model's weights and its card, each under a temporary name and then renamed.

    Args:
        base: store the weights as a difference from this bundled model's (`as_stored` gives what is left of them), in
            place of `dtype`.
        steps: of that difference, as `as_stored`.

    Returns:
        The card as written, with `sha256`, `dtype` and `parameters` filled in.

    Raises:
        ValueError: the card lacks a field, names no plain file, or describes another model; or a weight
            does not fit `dtype`.
    """
    missing = [key for key in _REQUIRED if key not in card]
    if missing:
        raise ValueError(f"the card lacks {', '.join(missing)}; needed are {', '.join(_REQUIRED)}")
    name = card["name"]
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
        raise ValueError(f"expected a name of lower-case letters, digits and hyphens, got {name!r}")
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    check_fit(build_open_clip(card["architecture"]), state, source="the model", name=f"{name} (its card)")
    suffix = ".safetensors" if base is None else SUFFIX
    with atomic_folder(folder, f"{name}.json") as partial:
        weights = partial / f"{name}{suffix}"
        if base is None:
            _save_as(state, dtype, weights)
            how = {"dtype": str(dtype).removeprefix("torch.")}
        else:
            how = {
                "difference_from": base,
                "weights_sha256": write_difference(state, base_weights(base), weights, steps=steps),
            }
        written = {
            **card,
            "sha256": sha256(weights),
            **how,
            "parameters": sum(value.numel() for value in state.values()),
        }
        write_json(partial / f"{name}.json", written)
    (folder / f"{name}{'.safetensors' if base else SUFFIX}").unlink(missing_ok=True)  # its other form before
    return written


def adopt(file: Path, card: Mapping[str, Any], folder: Path = WEIGHTS, *, base: str | None) -> dict[str, Any]:
    """Put a file that `write_difference` made beside its card: weights that were made elsewhere, as they were measured.

    Args:
        file: the difference from `base`, or from `nothing`.
        card: as `write_bundled`.
        folder: where to.
        base: a bundled model's name; None for weights that are stored whole, in eight bits.

    Returns:
        The card as written.

    Raises:
        CheckpointError: a file that is damaged, or of other weights.
        UnknownModelError: no such base.
    """
    state = read_difference(file, base_weights(base) if base else nothing(spec_of(card).build().state_dict()))
    with atomic_folder(folder, f"{card['name']}.json") as partial:
        weights = partial / f"{card['name']}{SUFFIX}"
        shutil.copyfile(file, weights)
        how = {"difference_from": base, "weights_sha256": digest(state)} if base else {"dtype": PACKED}
        parameters = sum(value.numel() for value in state.values())
        written = {**card, "sha256": sha256(weights), **how, "parameters": parameters}
        write_json(partial / f"{card['name']}.json", written)
    (folder / f"{card['name']}.safetensors").unlink(missing_ok=True)  # its other form before
    return written


def _save_as(state: Mapping[str, Tensor], dtype: torch.dtype, path: Path) -> None:
    stored = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    unfit = [key for key, value in stored.items() if not value.isfinite().all()]
    if unfit:
        raise ValueError(
            f"{len(unfit)} weights are not finite in {dtype}, first {unfit[0]}; pass torch.float32"
        )
    save_file(stored, path)


WHOLE = math.inf

_STEP = "step/"
_PAIRS, _PLACE, _NUMBER = "pairs", "far/place", "far/number"


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
        partial.write_bytes(packer.compress(save(_paired(encoded))) + packer.flush())
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
        return _restore(_unpaired(load(content), base), base)
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


def _paired(encoded: dict[str, Tensor]) -> dict[str, Tensor]:
    """Two numbers a byte where nearly all lie in -8..7, or `encoded` itself: Huffman's code spends whole bits a byte, and a
    number of coarse steps has two."""
    names = sorted(name for name in encoded if not name.startswith(_STEP))
    numbers = torch.cat([encoded[name].flatten() for name in names] + [torch.zeros(1, dtype=torch.int8)])
    far = ((numbers < -8) | (numbers > 7)).nonzero()[:, 0]
    if len(far) > len(numbers) / 1000:
        return encoded
    halves = (numbers.clamp(-8, 7) + 8).view(torch.uint8)[: len(numbers) // 2 * 2].view(-1, 2)
    steps = {name: x for name, x in encoded.items() if name.startswith(_STEP)}
    return steps | {
        _PAIRS: halves[:, 0] * 16 + halves[:, 1],
        _PLACE: far.int(),
        _NUMBER: numbers[far],
    }


def _unpaired(content: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if _PAIRS not in content:
        return content
    steps = {_STEP + name for name in base}
    if odd := sorted(set(content) ^ {_PAIRS, _PLACE, _NUMBER, *steps}):
        raise ValueError(
            f"expected pairs of numbers and a step a row; {len(odd)} names differ, first {odd[0]}"
        )
    pairs, place, number = (content[name] for name in (_PAIRS, _PLACE, _NUMBER))
    names = sorted(base)
    sizes = [base[name].numel() for name in names]
    found = [(x.dtype, tuple(x.shape)) for x in (pairs, place, number)]
    expected = [
        (torch.uint8, ((sum(sizes) + 1) // 2,)),
        (torch.int32, (len(number),)),
        (torch.int8, (len(number),)),
    ]
    if found != expected or not ((place >= 0) & (place < sum(sizes))).all():
        raise ValueError(f"its numbers are {found}, expected {expected} at places below {sum(sizes)}")
    numbers = torch.stack([pairs // 16, pairs % 16], dim=1).flatten().view(torch.int8) - 8
    numbers[place.long()] = number
    parts = numbers[: sum(sizes)].split(sizes)
    return {
        **{name: content[name] for name in steps},
        **{name: part.view(base[name].shape) for name, part in zip(names, parts, strict=True)},
    }


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
