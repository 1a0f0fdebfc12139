"""Extract: a data set decomposed once, into a store on disk (`decompclip.decomposition.store`) or into moments alone.

Images are taken in shards of so many places in the data, and batches do not cross their ends: a shard's bytes hang on the
model, the data and the options, not on how many processes there are, nor on how often the run was killed. Moments are merged in
the order of the shards, and so come out the same to the last bit.
"""

from __future__ import annotations

import math
import platform
import shutil
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from decompclip import __version__
from decompclip.api import check_choice, check_count
from decompclip.data.datasets import PairStream
from decompclip.data.feed import ahead, is_pure
from decompclip.data.images import ImageBatch, ListedImages
from decompclip.data.pairs import Pairs
from decompclip.data.pixels import check_pixels
from decompclip.data.processes import Processes, digest_of_images
from decompclip.data.shapes import Shapes
from decompclip.data.sources import listed_images
from decompclip.decomposition.capture import dtype_of
from decompclip.decomposition.decomposition import TERMS, Decomposition
from decompclip.decomposition.maps import Convention, term_maps
from decompclip.decomposition.moments import Moments
from decompclip.decomposition.store import (
    MANIFEST,
    MAPS,
    MOMENTS,
    NewerStoreError,
    Store,
    StoredType,
    bytes_per_image,
    facts_of,
    read_manifest,
    read_shard,
    shard_name,
    write_manifest,
    write_shard,
)
from decompclip.display import Track, silently
from decompclip.files import digest
from decompclip.models.bundled import digest as weights_digest
from decompclip.models.clip import HookedCLIP
from decompclip.tower.vit import hooked

if TYPE_CHECKING:
    from accelerate import Accelerator

SHARD_SIZE = 1024
EVERY = 30.0
"""Seconds between two times that moments are written down, for a run that is killed to go on from."""

NAME = 64
"""Bytes that the name of an image takes, about."""

DECIDES = {
    "holds": "terms or moments",
    "model": "the model's weights",
    "data": "the images, their classes or their preprocessing",
    "convention": "the convention",
    "normalized": "the length of features",
    "dtype": "the dtype",
    "shard_size": "the size of shards",
}
"""What decides a store's numbers: a run goes on from one that agrees in all of it."""


@torch.no_grad()
def extract(
    model: HookedCLIP,
    data: ListedImages | Pairs | PairStream | Shapes,
    out: str | Path,
    *,
    dtype: StoredType = "fp32",
    moments_only: bool = False,
    convention: Convention = "centred",
    normalize: bool = False,
    shard_size: int = SHARD_SIZE,
    batch_size: int = 64,
    class_names: Sequence[str] = (),
    source: str = "",
    accelerator: Accelerator | None = None,
    track: Track = silently,
    log: Callable[[str], object] = lambda text: None,
) -> Store | Moments:
    """Decompose a data set into a folder, once. A run that was stopped goes on, and ends with the same bytes.

    Args:
        model: whose image tower is decomposed.
        data: images in [0, 1] of the model's size (as `model.pixels` gives them), with classes where they are known. A
            `PairStream` over webdataset's reader (pipes, URLs) or a streamed data set of Hugging Face's needs no captions.
        out: a new folder, or one of the same run: same model, options, preprocessing, names and classes, and image files of
            unchanged size and time (of data without files, only the first image's pixels are compared).
        dtype: of the stored terms; what it costs is measured and written down.
        moments_only: keep means and second moments alone (means of the stream too, for causal mode), in fp64: as much on disk
            and in memory whatever the number of images.
        convention: as `model.decompose` takes it.
        normalize: likewise.
        shard_size: images of the data in a shard; those that cannot be read are left out, and listed in the manifest.
        batch_size: images in a forward pass. Another one changes numbers by rounding.
        class_names: of the labels, for the manifest.
        source: what the data are, for the same.
        accelerator: of Hugging Face's accelerate, to spread the shards over its processes, which share the folder.
        track: shows progress.
        log: is told the size before the work begins.

    Returns:
        The store; with `moments_only` the moments.

    Raises:
        FileExistsError: the folder holds another run, or something else.
        FolderInUse: another run writes there.
        OSError: the disk is too small, or full.
        TypeError: data that is not read by place.
        ValueError: no image could be read, images that are normalised already, a model with hooks, unusable options, fewer images than processes, or processes that disagree.
        DecompositionError: a feature is not the sum of its terms.
    """
    check_choice("dtype", dtype, StoredType)
    check_count(shard_size, "images", "shard_size")
    check_count(batch_size, "images", "batch_size")
    if any(hooked(module) for module in model.visual.modules()):
        raise ValueError(
            "expected a model without hooks, whose terms are the model's own; received one with some; call it outside "
            "`with model.hooks(...)`, or model.reset_hooks() first"
        )
    images, folder, group = listed_images(data), Path(out), Processes(accelerator)
    listing = list(images.skipped)
    group.check_enough(len(images))
    run = {
        "holds": "moments" if moments_only else "terms",
        "model": digest(
            [weights_digest(model.visual.state_dict()), model.cfg.to_dict(), str(dtype_of(model.visual))]
        ),
        "data": digest_of_images(images, files=True),
        "convention": convention,
        "normalized": normalize,
        "dtype": "fp64" if moments_only else dtype,
        "shard_size": shard_size,
    }
    group.check_equal({words: run[key] for key, words in DECIDES.items()})
    with group.alone_in(folder), ExitStack() as reading:
        job = Job(model, images, folder, run, batch_size, group, track, reading)

        def begin() -> None:
            job.check_folder()
            job.check_size(log)

        def finish() -> None:
            known = {name: model.provenance.get(name) for name in ("name", "pretrained", "sha256")}
            about = {"model": known, "source": source, "class_names": list(class_names)}
            job.finish(about, [[skip.path, skip.reason] for skip in listing])

        group.in_first(begin)
        job.moments() if moments_only else job.terms()
        group.wait()
        group.in_first(finish)
    return Moments.load(folder / MOMENTS) if moments_only else Store(folder)


def differences(one: dict[str, Any], other: dict[str, Any]) -> str:
    """What two runs differ in, in words."""
    return ", ".join(words for key, words in DECIDES.items() if one.get(key) != other.get(key)) or "its form"


class Step(NamedTuple):
    """A batch of a shard; None stands for its end."""

    shard: int
    batch: ImageBatch | None

    @property
    def images(self) -> Sequence[Any] | Tensor:
        """What progress counts."""
        return () if self.batch is None else self.batch.images


@dataclass(frozen=True)
class Job:
    """One run, as one of its processes sees it; `run` is what decides its numbers."""

    model: HookedCLIP
    images: ListedImages
    folder: Path
    run: dict[str, Any]
    batch_size: int
    group: Processes
    track: Track
    reading: ExitStack  # ends what is read ahead, however the run ends

    @property
    def n_shards(self) -> int:
        return -(-len(self.images) // self.run["shard_size"])

    def places(self, shard: int) -> range:
        """A shard's places in the data."""
        size = self.run["shard_size"]
        return range(shard * size, min((shard + 1) * size, len(self.images)))

    @property
    def options(self) -> dict[str, Any]:
        return {"convention": self.run["convention"], "normalize": self.run["normalized"]}

    @property
    def made(self) -> dict[str, Any]:
        """What changes numbers by rounding."""
        own = {"batch_size": self.batch_size, "device": self.model.device.type, "machine": platform.machine()}
        return {**own, "decompclip": __version__, "torch": torch.__version__}

    @cached_property
    def none(self) -> Decomposition:
        """The decomposition of no images: the maps, on the CPU."""
        maps = term_maps(self.model.visual, self.run["convention"]).to("cpu")
        layers, heads, coord, d_embed = maps.heads.shape
        shapes = {
            "coords": (layers, heads, coord),
            "mlps": (layers, d_embed),
            "embed": (d_embed,),
            "bias_coords": (len(maps.bias),),
            "pool": (int(self.model.cfg.pool_mlp > 0), d_embed),
            "target": (d_embed,),
        }
        empty: dict[str, Any] = {name: torch.empty(0, *shape) for name, shape in shapes.items()}
        return Decomposition(**empty, maps=maps, normalized=self.run["normalized"])

    # Before the work

    def check_folder(self) -> None:
        """Raises FileExistsError where the folder holds another run, or something else. Numbers are not read."""
        files = [file for file in self.folder.iterdir() if not file.name.startswith(".")]
        numbers = [file for file in files if file.stem.isdecimal() and file.suffix == ".safetensors"]
        for file in files:
            if file not in numbers and file.name not in (MANIFEST, MAPS, MOMENTS):
                raise FileExistsError(
                    f"expected a new folder, or that of the same run; {self.folder} holds {file.name}; name another"
                )
        known: list[dict[str, Any]] = []
        if self.folder / MANIFEST in files:
            try:
                known.append(read_manifest(self.folder)["run"])
            except NewerStoreError:
                raise
            except ValueError as error:
                warnings.warn(f"{error}; it is written anew", stacklevel=2)
        for file in (*numbers, self.folder / MOMENTS):
            with suppress(ValueError, KeyError):  # what is damaged is named later, and built anew
                known.append(facts_of(file)["run"])
        for run in known:
            if run != self.run:
                raise FileExistsError(
                    f"expected a new folder, or that of the same run; {self.folder} holds one that differs in "
                    f"{differences(run, self.run)}; name another folder, or delete it"
                )

    def check_size(self, log: Callable[[str], object]) -> None:
        """Say what the run will take; raises OSError where the disk is too small."""
        maps, cfg, count = self.none.maps, self.model.cfg, len(self.images)
        fixed = sum(x.nbytes for x in vars(maps).values() if isinstance(x, Tensor))
        if self.run["holds"] == "moments":
            terms = (self.none.coords, self.none.mlps, self.none.embed, self.none.pool)
            second = sum(math.prod(x.shape[1:]) * x.shape[-1] for x in terms)
            streams = cfg.n_tokens * (cfg.n_layers * (cfg.n_heads * cfg.d_head + cfg.d_model) + cfg.d_model)
            # the new file stands beside the old one until it takes its place
            needed, words = 2 * (fixed + 8 * (second + streams)), "whatever the number of images"
        else:
            each = bytes_per_image(maps, self.none.pool.shape[1], self.run["dtype"]) + NAME
            needed, words = fixed + count * each, f"{each:,} bytes an image"
        there = sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))
        free = shutil.disk_usage(self.folder).free
        log(
            f"{count:,} images take {_size(needed)} ({words}) in {self.n_shards:,} shards; {_size(free)} are free"
        )
        if needed - there > free:
            raise OSError(
                f"expected {_size(needed - there)} of free disk; {_size(free)} are free in {self.folder}; make room, name "
                "another disk, store in fp16, or keep moments alone"
            )

    # The work

    def terms(self) -> None:
        """This process's shards: those that are not whole are built."""
        mine = range(self.group.rank, self.n_shards, self.group.count)
        begun = any((self.folder / shard_name(shard)).exists() for shard in mine)
        looked = self.track(mine, "shards that are there", len(mine)) if begun else mine
        todo = [shard for shard in looked if not self._is_whole(shard)]
        self._begin(len(todo))
        parts: list[dict[str, Tensor]] = []
        labels: list[Tensor] = []
        ids: list[str] = []
        for shard, batch in self._steps(todo):
            if batch is not None:
                d = self.model.decompose(self._input(batch), **self.options)
                parts.append({name: getattr(d, name).float().cpu() for name in (*TERMS, "target")})
                labels += [] if batch.labels is None else [batch.labels]
                ids += batch.paths
                continue
            joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}
            about = {"run": self.run, "made": [self.made], "skipped": self._left_out(shard, ids)}
            write_shard(
                self.folder / shard_name(shard),
                self.none.with_fields(**joined),
                torch.cat(labels) if labels else None,
                ids,
                self.run["dtype"],
                about,
            )
            parts, labels, ids = [], [], []

    def moments(self) -> None:
        """Moments of all shards, which the first process merges in order."""
        whole, done, skipped, made = self._so_far()
        made += [self.made] if self.made not in made and done < self.n_shards else []
        self.group.wait()  # until all have read it
        self._begin(self.n_shards - done)
        written = time.monotonic()
        found = self._moments_of(range(done + self.group.rank, self.n_shards, self.group.count))
        for start in range(done, self.n_shards, self.group.count):
            nothing: tuple[Moments | None, list[list[str]]] = (None, [])
            for moments, left_out in self.group.to_first(next(found, nothing)):
                skipped += left_out
                if moments is not None:
                    part = replace(moments, maps=self.none.maps)
                    whole = part if whole is None else whole.merge(part)
            end = min(start + self.group.count, self.n_shards)
            due = end == self.n_shards or time.monotonic() - written > EVERY
            if self.group.rank == 0 and whole is not None and due:
                # digits of one number: the file is as long whatever the number of images
                facts = {"run": self.run, "made": made, "shards": f"{end:09d}", "skipped": skipped}
                whole.save(self.folder / MOMENTS, **facts)
                written = time.monotonic()

    def _so_far(self) -> tuple[Moments | None, int, list[list[str]], list[dict[str, Any]]]:
        """What a stopped run left: moments, of how many shards, the images that could not be read, and what made them."""
        path = self.folder / MOMENTS
        if not path.exists():
            return None, 0, [], []
        try:
            moments, about = Moments.load(path), facts_of(path)
        except ValueError as error:
            warnings.warn(f"{path} is damaged and is built anew: {error}", stacklevel=2)
            return None, 0, [], []
        return replace(moments, maps=self.none.maps), int(about["shards"]), about["skipped"], about["made"]

    def _moments_of(self, shards: range) -> Iterator[tuple[Moments | None, list[list[str]]]]:
        """Of each shard, on the CPU; None where no image can be read. And those that cannot."""
        whole: Moments | None = None
        ids: list[str] = []
        for shard, batch in self._steps(shards):
            if batch is None:
                if whole is not None:  # maps need not go through the wire
                    whole = replace(whole, maps=replace(whole.maps, heads=whole.maps.heads[:0]))
                yield whole, self._left_out(shard, ids)
                whole, ids = None, []
                continue
            part = Moments.fit(self.model, [self._input(batch)], **self.options).to("cpu")
            part = replace(part, maps=self.none.maps)
            whole, ids = part if whole is None else whole.merge(part), [*ids, *batch.paths]

    def _begin(self, todo: int) -> None:
        """What is not whole has no manifest."""
        if todo:
            (self.folder / MANIFEST).unlink(missing_ok=True)

    def _steps(self, shards: Sequence[int]) -> Iterator[Step]:
        """The batches of each shard, and None at its end."""

        def steps() -> Generator[Step]:
            for shard in shards:
                for batch in self.images.part(self.places(shard), self.batch_size, device=self.model.device):
                    yield Step(shard, batch)
                yield Step(shard, None)

        total = sum(1 + -(-len(self.places(shard)) // self.batch_size) for shard in shards)
        made = self.reading.enter_context(closing(ahead(steps()) if is_pure(self.images) else steps()))
        return self.track(made, f"{self.model.name}: batches of {self.batch_size}", total)

    def _input(self, batch: ImageBatch) -> Tensor:
        check_pixels(batch.images, f" in the batch of {batch.paths[0]}")
        return self.model.normalize(batch.images.to(self.model.device)).to(self.model.dtype)

    def _is_whole(self, shard: int) -> bool:
        """Whether a shard is there as it was written; one that is not is named."""
        path = self.folder / shard_name(shard)
        if not path.exists():
            if (self.folder / MANIFEST).exists():
                warnings.warn(f"{path} is gone, and is built anew", stacklevel=2)
            return False
        try:
            return read_shard(path)[1]["run"] == self.run
        except (ValueError, KeyError) as error:
            warnings.warn(f"{path} is damaged, and is built anew: {error}", stacklevel=2)
            return False

    def _left_out(self, shard: int, read: Sequence[str]) -> list[list[str]]:
        """The images of a shard that could not be read, and why."""
        missing = {name for name, _ in self.images.listed(self.places(shard))}.difference(read)
        return [[skip.path, skip.reason] for skip in self.images.skipped if skip.path in missing]

    # After the work

    def finish(self, about: dict[str, Any], listing: list[list[str]]) -> None:
        """Write the manifest; all processes are done.

        Args:
            about: facts for the manifest.
            listing: what was left out before any image was read.

        Raises:
            ValueError: no image could be read.
        """
        if self.run["holds"] == "moments":
            path = self.folder / MOMENTS
            # where no image can be read none is written; else it is gone, which is said
            found = [facts_of(path)] if path.exists() or not self.images.skipped else []
            count = Moments.load(path).count if found else 0
            own: dict[str, Any] = {}
        else:
            self.none.save(self.folder / MAPS)
            paths = [self.folder / shard_name(shard) for shard in range(self.n_shards)]
            found = [facts_of(path) for path in paths]
            count = sum(len(one["ids"]) for one in found)
            shards = [
                {
                    "file": path.name,
                    "images": len(one["ids"]),
                    "bytes": path.stat().st_size,
                    "sha256": one["sha256"],
                }
                for path, one in zip(paths, found, strict=True)
            ]
            errors = {key: max(one["errors"][key] for one in found) for key in found[0]["errors"]}
            own = {"errors": errors, "maps": facts_of(self.folder / MAPS)["sha256"], "shards": shards}
        skipped = dict([*listing, *(left_out for one in found for left_out in one["skipped"])])
        if not count:
            last = f"; the last: {[*skipped.values()][-1]}" if skipped else ""
            raise ValueError(
                f"expected images; none of {len(self.images)} could be read{last}; check that they are pictures and complete"
            )
        made: list[Any] = []
        for one in found:
            made += [step for step in one["made"] if step not in made]
        write_manifest(
            self.folder, {"run": self.run, **about, "images": count, "made": made, "skipped": skipped, **own}
        )


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
