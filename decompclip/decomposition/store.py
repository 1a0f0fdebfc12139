"""A store: the decompositions of a data set in shards on disk, which open as one `Decomposition` by memory map.

    STORE/maps.safetensors     the model's maps: a saved decomposition of no images
    STORE/000000.safetensors   a shard: terms, features, labels; in its metadata names of the images, and what it was made from
    STORE/store.json           the manifest, which comes last: a folder with one is whole

Terms are kept in fp32, fp16 or bf16, and are read in fp32; the tower's own features are kept in fp32, so that what a narrow
type costs can be seen: every shard says how far its terms, as stored, are from the terms as they were.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

import psutil
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from decompclip.decomposition.decomposition import TERMS, Decomposition, read_tensors, write_tensors
from decompclip.decomposition.maps import TermMaps
from decompclip.files import digest, write_json

FORM, VERSION = "decompclip.store", 1
SHARD = "decompclip.shard/1"
MANIFEST, MAPS, MOMENTS = "store.json", "maps.safetensors", "moments.safetensors"
AGAIN = "run the same `decompclip extract` again, which builds anew what is not whole"

StoredType = Literal["fp32", "fp16", "bf16"]
TYPES: dict[StoredType, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

NO_CLASS = -1


def shard_name(number: int) -> str:
    return f"{number:06d}.safetensors"


def bytes_per_image(maps: TermMaps, n_pool: int, dtype: StoredType) -> int:
    """What an image takes in a shard, but for its name: its terms, its feature in fp32, and its class.

    Args:
        maps: the model's.
        n_pool: 1 where the attention pool has an MLP of its own, else 0.
        dtype: of the terms.
    """
    layers, heads, coord, d_embed = maps.heads.shape
    numbers = layers * heads * coord + (layers + 1 + n_pool) * d_embed + len(maps.bias)
    return numbers * TYPES[dtype].itemsize + d_embed * 4 + 8


def write_shard(
    path: Path,
    d: Decomposition,
    labels: Int[Tensor, " batch"] | None,
    ids: Sequence[str],
    dtype: StoredType,
    about: Mapping[str, Any],
) -> None:
    """Write a shard, whole or not at all: equal content gives equal bytes.

    Args:
        path: of the file.
        d: the terms as the tower gave them.
        labels: the images' classes, if they are known.
        ids: the images' names.
        dtype: of the terms.
        about: facts for JSON, kept beside `ids` and `errors`.

    Raises:
        ValueError: a term is too large for `dtype`.
        OSError: the file cannot be written.
    """
    stored = {name: getattr(d, name).to(TYPES[dtype]) for name in TERMS}
    for name, x in stored.items():
        if not x.isfinite().all() and getattr(d, name).isfinite().all():
            raise ValueError(
                f"expected terms that {dtype} can hold; received {name} of up to {float(getattr(d, name).abs().max()):.3g}; "
                "store in bf16 or fp32"
            )
    read = d.with_fields(**{name: x.float() for name, x in stored.items()})
    errors = {name: _miss(getattr(read, name), getattr(d, name)) for name in TERMS}
    errors = {"features": read.sum_error, "features before": d.sum_error, **errors}
    assert d.target is not None, "terms as the tower gave them"
    none = torch.full((len(d),), NO_CLASS)
    tensors = {**stored, "target": d.target.float(), "labels": none if labels is None else labels.long()}
    write_tensors(path, tensors, SHARD, {**about, "ids": list(ids), "errors": errors})


def _miss(read: Tensor, x: Tensor) -> float:
    """Largest miss, as a share of the largest entry."""
    if not x.numel():
        return 0.0
    return float((read - x).abs().max() / x.abs().max().clamp_min(torch.finfo(x.dtype).tiny))


def read_shard(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A shard's tensors, held against its digest, and what it says about them.

    Raises:
        FileNotFoundError, ValueError: it is not there, or not as it was written.
    """
    return read_tensors(path, SHARD, "a shard of a store", "decompclip extract")


def facts_of(path: Path) -> dict[str, Any]:
    """What a file of a store says about itself, and its digest (`sha256`); the numbers are not read.

    Raises:
        ValueError: it is not there, or is no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return {**json.loads(metadata["about"]), "sha256": metadata["sha256"]}
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"expected {path} of a store; it cannot be read ({error}); {AGAIN}") from error


class NewerStoreError(ValueError):
    """A store that a newer version of this package wrote."""


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, with a digest of it."""
    known = {"format": f"{FORM}/{VERSION}", **manifest}
    write_json(folder / MANIFEST, {**known, "digest": digest(known)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a whole store.

    Raises:
        FileNotFoundError: there is no store, or it was not finished.
        ValueError: it was written by a newer version, or changed by hand.
    """
    path = folder / MANIFEST
    if not path.is_file():
        begun = any(folder.glob("*.safetensors"))
        found = f"{folder} was begun and not finished; {AGAIN}" if begun else f"there is none in {folder}"
        raise FileNotFoundError(f"expected a store of `decompclip extract`; {found}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        form, _, version = manifest.pop("format").partition("/")
        own = manifest.pop("digest")
        number = int(version)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"expected a store's manifest; {path} is none ({error!r}); {AGAIN}") from error
    if form != FORM:
        raise ValueError(f"expected a store's manifest; {path} is of format {form}; name another folder")
    if number > VERSION:
        raise NewerStoreError(
            f"expected a store of version {VERSION} or older; {path} is of version {number}; read it with a newer decompclip"
        )
    if own != digest({"format": f"{form}/{version}", **manifest}):
        raise ValueError(
            f"expected {path} as it was written; received another content than its digest is of: it was changed by hand or "
            f"damaged; {AGAIN}"
        )
    return manifest


def _known(found: Any, *keys: str) -> Any:
    """What stands at these keys, one within another; None where nothing does."""
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _listed_shards(folder: Path, manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The manifest's shards. Whoever wrote it, no file outside the folder is read, and no number is believed unseen.

    Raises:
        ValueError: the manifest is not as `decompclip extract` writes it.
    """

    def wrong(expected: str, received: object) -> ValueError:
        return ValueError(f"expected in {folder / MANIFEST} {expected}; received {received!r}; {AGAIN}")

    dtype, error = _known(manifest, "run", "dtype"), _known(manifest, "errors", "features")
    shards = manifest.get("shards")
    if dtype not in get_args(StoredType):
        raise wrong(f"a dtype of {', '.join(TYPES)}", dtype)
    if type(error) not in (int, float):
        raise wrong("a number as the error of features", error)
    if not isinstance(shards, list):
        raise wrong("a list of shards", shards)
    for number, shard in enumerate(shards):
        file, images, size = (_known(shard, key) for key in ("file", "images", "bytes"))
        if file != shard_name(number):
            raise wrong(f"the shard {shard_name(number)}", file)
        if not type(images) is type(size) is int or not 0 <= images <= size:
            raise wrong(f"how many images and bytes {file} has", [images, size])
    return shards


def _kept(name: str) -> Any:
    def whole(self: Store) -> Tensor:
        return self._whole(name)

    whole.__doc__ = f"The images' `{name}`, all read; a slice of the store reads less."
    return property(whole)


class Store(Decomposition):
    """The decompositions of a data set on disk, made by `decompclip extract`: a `Decomposition` that is read when it is asked.

    A slice is a `Decomposition` of these images, by memory map where they lie in one shard in fp32. What goes through
    decompositions batch by batch (`Moments.of`, `ablation_sweep`, `fit` of defenses and detectors, ...) reads a store shard by
    shard; what needs a whole decomposition (an ablation, say) reads all of it, if it fits the memory.

    Args:
        folder: of the store.
        check: hold each shard against its digest when it is first read.

    Attributes:
        folder: where it lies.
        manifest: model, data, type and measured error, versions, shards.

    Raises:
        FileNotFoundError: there is no store, it was not finished, or a shard is not there.
        ValueError: it holds moments alone, is of a newer version, or was changed or damaged.
    """

    coords = _kept("coords")
    mlps = _kept("mlps")
    embed = _kept("embed")
    pool = _kept("pool")
    bias_coords = _kept("bias_coords")
    target = _kept("target")

    def __init__(self, folder: str | Path, *, check: bool = True) -> None:
        self.folder, self.manifest = Path(folder), read_manifest(Path(folder))
        if _known(self.manifest, "run", "holds") == "moments":
            raise ValueError(
                f"expected a store with terms; {folder} holds moments alone; read them with "
                f"Moments.load({str(self.folder / MOMENTS)!r})"
            )
        self._shards = _listed_shards(self.folder, self.manifest)
        self._ends = list(accumulate(shard["images"] for shard in self._shards))
        self._unchecked = set(range(len(self._shards))) if check else set()
        for shard in self._shards:
            path = self.folder / shard["file"]
            if not path.is_file():
                raise FileNotFoundError(f"expected the shard {path}; it is not there; {AGAIN}")
            if path.stat().st_size != shard["bytes"]:
                raise ValueError(
                    f"expected {path} of {shard['bytes']} bytes; received {path.stat().st_size}: it was cut or changed; {AGAIN}"
                )
        try:
            self._none = Decomposition.load(self.folder / MAPS)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; {AGAIN}") from error
        except ValueError as error:
            raise ValueError(f"{error}; or {AGAIN}") from error
        if facts_of(self.folder / MAPS)["sha256"] != self.manifest.get("maps"):
            raise ValueError(
                f"expected the maps that {MANIFEST} lists; received {self.folder / MAPS} of another run; {AGAIN}"
            )
        known = {"maps": self._none.maps, "normalized": self._none.normalized, "token_terms": None}
        vars(self).update(known)

    def __len__(self) -> int:
        return sum(shard["images"] for shard in self._shards)

    @property
    def has_pool(self) -> bool:
        return self._none.has_pool

    @cached_property
    def features(self) -> Float[Tensor, "batch d_embed"]:
        """The sum of all terms, as they are stored."""
        return self._filled("features", (part.features for part in self.shards()))

    @property
    def sum_error(self) -> float:
        """Largest miss of the stored terms' sum against the tower's own feature, as measured when they were written."""
        return self.manifest["errors"]["features"]

    @cached_property
    def labels(self) -> Int[Tensor, " image"] | None:
        """The images' classes; None where they are not known."""
        found = torch.cat([torch.empty(0, dtype=torch.long), *(x["labels"] for x in self._read())])
        return None if (found == NO_CLASS).any() else found

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """The images' names."""
        places = range(len(self._shards))
        return tuple(name for place in places for name in facts_of(self._path(place))["ids"])

    @property
    def class_names(self) -> tuple[str, ...]:
        """What `labels` are places of."""
        return tuple(self.manifest["class_names"])

    def shards(self) -> Iterator[Decomposition]:
        """The images, shard by shard."""
        for end, shard in zip(self._ends, self._shards, strict=True):
            if shard["images"]:
                yield self[end - shard["images"] : end]

    def __getitem__(self, index: int | slice | list[int] | Tensor) -> Decomposition:
        """Some of the images: a slice, a mask, indices, or a number (which keeps the batch axis).

        Raises:
            IndexError: there is no such image.
            FileNotFoundError, ValueError: a shard is gone, or not as it was written.
        """
        places = torch.arange(len(self))[self._checked(index)]
        shards = torch.bucketize(places, torch.tensor(self._ends), right=True)
        order = shards.argsort(stable=True)
        parts: list[Decomposition] = []
        for shard in shards.unique().tolist():
            own = places[shards == shard] - (self._ends[shard] - self._shards[shard]["images"])
            straight = bool((own.diff() == 1).all())
            at = slice(int(own[0]), int(own[-1]) + 1) if straight else own
            parts.append(self._terms(self._tensors(shard), at))
        if not parts:
            return self._none
        whole = Decomposition.cat(parts)
        return whole if bool((order.diff() == 1).all()) else whole[order.argsort()]

    def _terms(self, tensors: Mapping[str, Tensor], at: slice | Tensor) -> Decomposition:
        read: dict[str, Any] = {name: tensors[name][at].float() for name in (*TERMS, "target")}
        return Decomposition(**read, maps=self.maps, normalized=self.normalized)

    def _path(self, place: int) -> Path:
        return self.folder / self._shards[place]["file"]

    def _tensors(self, place: int) -> dict[str, Tensor]:
        """A shard by memory map, held against its digest the first time."""
        path, shard = self._path(place), self._shards[place]
        if place in self._unchecked:
            try:
                tensors, about = read_shard(path)
            except ValueError as error:
                raise ValueError(f"shard {shard['file']}: {error}; or {AGAIN}") from error
            if facts_of(path)["sha256"] != shard.get("sha256") or about["run"] != self.manifest["run"]:
                raise ValueError(
                    f"expected the shard that {MANIFEST} lists; received {path} of another run; {AGAIN}"
                )
            self._unchecked.discard(place)
        else:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if len(tensors["coords"]) != shard["images"]:
            raise ValueError(
                f"expected {shard['images']} images in {path}, as {MANIFEST} says; it holds {len(tensors['coords'])}; {AGAIN}"
            )
        return tensors

    def _read(self) -> Iterator[dict[str, Tensor]]:
        return map(self._tensors, range(len(self._shards)))

    def _whole(self, name: str) -> Tensor:
        parts = (x[name] for x in self._read())
        if len(self._shards) == 1 and self.manifest["run"]["dtype"] == "fp32":
            return next(parts).float()  # mapped: the memory need not hold it
        return self._filled(name, parts)

    def _filled(self, name: str, parts: Iterator[Tensor]) -> Tensor:
        """All images' `name` in one tensor, filled part by part: the memory holds it once.

        Raises:
            MemoryError: it does not.
        """
        none = getattr(self._none, name)
        size = len(self) * prod(none.shape[1:]) * none.itemsize
        free = psutil.virtual_memory().available
        if size > free:
            raise MemoryError(
                f"expected terms that fit the memory; all {name} of {self.folder} take {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB "
                "are free; read a slice at a time, or go through store.shards()"
            )
        whole, start = none.new_empty(len(self), *none.shape[1:]), 0
        for part in parts:
            whole[start : start + len(part)] = part
            start += len(part)
        return whole

    def _facts(self) -> dict[str, str]:
        run = self.manifest["run"]
        error = f"{self.sum_error:.1e}"
        return {
            **self._none._facts(),
            "images": str(len(self)),
            "stored in": run["dtype"],
            "sum error": error,
        }

    def __repr__(self) -> str:
        return (
            f"Store({str(self.folder)!r}: {', '.join(f'{name}: {x}' for name, x in self._facts().items())})"
        )
