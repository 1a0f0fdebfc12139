"""An audit's images: opened by name or path, decomposed in one pass, and split into those fitted on and those reported."""

from __future__ import annotations

import difflib
import hashlib
import heapq
import zlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from decompclip.attacks.registry import OWN, Attack, open_attack
from decompclip.audit.config import AuditConfig
from decompclip.data.files import canonical, parse_source, without_ending
from decompclip.data.images import (
    ImageBatch,
    ImageSource,
    ListedImages,
    OnError,
    SkippedFile,
    split_indices,
)
from decompclip.data.processes import ALONE, Processes
from decompclip.data.shapes import Shapes, ShapesSource
from decompclip.data.sources import DEFAULT_LIMIT, check_images, check_world_classes, open_images
from decompclip.decomposition.decomposition import Decomposition
from decompclip.decomposition.maps import term_maps
from decompclip.display import Track, silently
from decompclip.models.bundled import bundled, card
from decompclip.models.clip import HookedCLIP
from decompclip.models.folders import saved_class_names

WORLD = "shapes"
WORLD_SEED = 7_001
"""Stream of the Shapes world that audits look at; no bundled model was trained or measured on it."""


HAVE_PARTNERS = 0.9
"""Share of the drawn clean images that copies must be there of: pictures that cannot be read have none."""


def datasets() -> dict[str, str | None]:
    """Names of the bundled data sets, each with the model whose trigger its images carry."""
    prefix = f"{WORLD}-"
    poisoned = [name for name in bundled() if name.startswith(prefix) and card(name).get("backdoor")]
    return {WORLD: None} | {f"{WORLD}:{name.removeprefix(prefix)}": name for name in poisoned}


def open_source(
    spec: str,
    model: HookedCLIP,
    class_names: tuple[str, ...],
    *,
    limit: int | None = DEFAULT_LIMIT,
    seed: int = 0,
    on_error: OnError = "skip",
    known: Sequence[Attack] = (),
    root: str | Path | None = None,
) -> ImageSource:
    """The images that `spec` names, as `model` takes them.

    Args:
        spec: a bundled data set (`shapes`, `shapes:badnet`, ...), or a folder, table or shards as `open_images` takes them;
            `./shapes` is always a folder.
        model: whose preprocessing the images get.
        class_names: of the labels.
        known: attacks that the audited model remembers, as `attack_in` takes them.
        limit: at most so many images (a random subset of a folder, seeded; equal folders give equal subsets).
        seed: of the subset, or of the drawn images.
        on_error: what to do with unreadable images.
        root: a folder that the images must lie in, links resolved.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: as `FolderSource`, or an unknown data set.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"expected a limit of at least 1 image; received {limit}; None takes all")
    if _is_dataset(spec):
        world = Shapes(limit or DEFAULT_LIMIT, seed=WORLD_SEED + seed, resolution=model.image_size[0])
        check_world_classes(spec, class_names)
        attack = attack_in(spec, known)
        return ShapesSource(world, model.normalize, attack and attack.trigger)
    return open_images(
        spec, model.preprocess, class_names, limit=limit, seed=seed, on_error=on_error, root=root
    )


def open_pair(
    specs: tuple[str, str],
    model: HookedCLIP,
    class_names: tuple[str, ...],
    *,
    limit: int | None = DEFAULT_LIMIT,
    seed: int = 0,
    **options: Any,
) -> tuple[ImageSource, ImageSource]:
    """Clean and suspect images, as `open_source` opens each; if all suspect ones have the name of a clean one, in the clean ones' order.

    A file's rows are in the file's order, their copies in a folder in that of their names. Where a limit draws from the clean
    images, the suspect ones are the partners of those drawn, if nearly all have one (`HAVE_PARTNERS`), and else drawn on their own.

    Args:
        specs: of clean and of suspect images.
        model, class_names, limit, seed, options: as `open_source`.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: as `open_source`.
    """
    if any(map(_is_dataset, specs)):
        clean, suspect = (
            open_source(spec, model, class_names, limit=limit, seed=seed, **options) for spec in specs
        )
        return clean, suspect
    every, whole = (open_source(spec, model, class_names, limit=None, **options) for spec in specs)
    assert isinstance(every, ListedImages) and isinstance(whole, ListedImages)
    clean, suspect = (source.drawn(limit, seed) for source in (every, whole))
    names, partners = _stems(every), _stems(whole)
    places = {name: place for place, name in enumerate(partners)}
    if len(places) < len(partners) or len(set(names)) < len(names) or not places.keys() <= set(names):
        return clean, suspect
    found = [places[name] for name in _stems(clean) if name in places]
    if len(clean) < len(every) and len(found) < HAVE_PARTNERS * len(clean):
        return clean, suspect
    return clean, whole.subset(found)


def attack_in(spec: str, known: Sequence[Attack] = ()) -> Attack | None:
    """What triggers the images that `spec` names, where it is a bundled data set; None for clean images and folders.

    Args:
        spec: behind `shapes:` the kind of a twin, as `badnet`; or all that `open_attack` takes.
        known: attacks that the audited model remembers: one of that name comes before the twin's of the same kind.

    Raises:
        ValueError, FileNotFoundError: an unknown data set, or as `open_attack`.
    """
    if not _is_dataset(spec) or spec == WORLD:
        return None
    name, twins = parse_source(spec).detail, datasets()
    if spec in twins and name not in [attack.trigger.name for attack in known]:
        return open_attack(twins[spec] or name)
    if name == OWN or name in bundled() or spec in twins or name.startswith("{") or Path(name).exists():
        return open_attack(name, known, model="the audited model")
    near = difflib.get_close_matches(spec, twins, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(
        f"data set {spec!r} is not one of {', '.join(twins)}{hint}; a folder of that name is ./{spec}"
    )


def check_source(spec: str, known: Sequence[Attack] = ()) -> None:
    """Whether `open_source` will find it: asked before any weights are loaded.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: as `open_source`.
    """
    if _is_dataset(spec):
        attack_in(spec, known)
    else:
        check_images(spec)


def own_classes(model: str) -> tuple[str, ...]:
    """The classes that a bundled model knows, or a folder that `save_model` wrote; none of others."""
    return tuple(card(model)["class_names"]) if model in bundled() else saved_class_names(Path(model))


def _is_dataset(spec: str) -> bool:
    return parse_source(spec).kind == WORLD


THUMBNAIL = 8
ALIKE = 0.5
"""Paired images differ by at most this share of the distance between pictures of different things."""

FLAT = 0.02
"""Contrast, in standard deviations of the model's images, below which a thumbnail shows little."""

KEPT = 96
"""Images kept as pictures: examples are chosen from them, and common corruptions are tried on them."""


@dataclass(frozen=True)
class ImageSet:
    """Decomposed images, their classes where known, and a name for each.

    Attributes:
        thumbnails: 8 x 8 pixels of each, enough to see whether two are the same picture.
        digests: of the pixels of each as the model takes them: equal for copies alone.
        kept: a few as the model takes them, by path.
    """

    decomposition: Decomposition
    labels: Int[Tensor, " batch"] | None
    paths: tuple[str, ...]
    thumbnails: Float[Tensor, "batch pixel"]
    digests: tuple[bytes, ...]
    kept: dict[str, Float[Tensor, "3 h w"]]
    skipped: tuple[SkippedFile, ...]
    sum_error: float

    def __len__(self) -> int:
        return len(self.paths)

    def at(self, chosen: Bool[Tensor, " batch"]) -> ImageSet:
        """The images where `chosen` is true."""
        places = chosen.nonzero()[:, 0].tolist()
        paths = tuple(self.paths[place] for place in places)
        return replace(
            self,
            decomposition=self.decomposition[chosen],
            labels=None if self.labels is None else self.labels[chosen],
            paths=paths,
            thumbnails=self.thumbnails[chosen],
            digests=tuple(self.digests[place] for place in places),
            kept={path: self.kept[path] for path in paths if path in self.kept},
        )


@dataclass(frozen=True)
class Split:
    """Parts of the two sets: what is fitted on, and what is reported.

    Attributes:
        validation: clean images for means and prototypes.
        clean, suspect: the images of every number in the report.
        held_out: suspect images that serve only to infer a target that was not named.
        paired: whether each suspect image is a changed copy of the clean image of the same name.
    """

    validation: ImageSet
    clean: ImageSet
    suspect: ImageSet
    held_out: ImageSet | None
    paired: bool

    @property
    def names(self) -> SplitNames:
        return SplitNames(self.validation.paths, self.clean.paths, self.suspect.paths)


class SplitNames(NamedTuple):
    """Which images stand in the parts of a `Split`."""

    validation: tuple[str, ...]
    clean: tuple[str, ...]
    suspect: tuple[str, ...]


@overload
def collect(
    model: HookedCLIP,
    source: ImageSource,
    config: AuditConfig,
    *,
    description: str = "images",
    track: Track = silently,
) -> ImageSet: ...


@overload
def collect(
    model: HookedCLIP,
    source: ImageSource,
    config: AuditConfig,
    *,
    description: str = "images",
    group: Processes,
    track: Track = silently,
) -> ImageSet | None: ...


@torch.no_grad()
def collect(
    model: HookedCLIP,
    source: ImageSource,
    config: AuditConfig,
    *,
    description: str = "images",
    group: Processes = ALONE,
    track: Track = silently,
) -> ImageSet | None:
    """Decompose every image of `source`, divided by the norm of its feature.

    Args:
        model: that decomposes.
        source: images as it takes them.
        config: options.
        description: of the images, for `track`.
        group: of several processes each decomposes its batches, and the first one gets all; the others get None.
        track: shows progress.

    Raises:
        ValueError: none of the images could be read.
        DecompositionError: terms do not sum to the feature.
    """
    maps = term_maps(model.visual, config.convention).to("cpu")  # every process has them
    # The pictures kept are those of least checksum of the name: of paired images both. Copies, for a view would keep its batch.
    kept: list[tuple[int, str, Tensor]] = []

    def look(batch: ImageBatch) -> _Seen:
        images = batch.images.to(model.device)
        d = model.decompose(images, convention=config.convention, normalize=True).to("cpu")
        for path, image in zip(batch.paths, batch.images, strict=True):
            name = (-zlib.crc32(_stem(path).encode(errors="surrogateescape")), path)
            if len(kept) < KEPT:
                heapq.heappush(kept, (*name, image.clone()))
            elif name > kept[0][:2]:
                heapq.heapreplace(kept, (*name, image.clone()))
        return _Seen(
            {field.name: getattr(d, field.name) for field in fields(d) if field.name != "maps"},
            batch.labels,
            batch.paths,
            F.adaptive_avg_pool2d(batch.images.float(), THUMBNAIL).flatten(1),
            [hashlib.sha256(image.numpy(force=True).tobytes()).digest() for image in batch.images],
            d.sum_error,
        )

    with closing(group.batches(source, config.batch_size)) as batches:
        shown = track(batches, description, group.n_batches(source, config.batch_size))
        own = [batch and look(batch) for batch in shown]
    found = list(group.in_order(own))
    pictures = [entry for part in group.to_first(kept) for entry in part]
    skipped = group.skipped(source)
    group.in_first(lambda: _check_found(found, skipped))
    if group.rank:
        return None
    labels = [seen.labels for seen in found if seen.labels is not None]
    return ImageSet(
        Decomposition.cat([Decomposition(**seen.terms, maps=maps) for seen in found]),
        torch.cat(labels) if len(labels) == len(found) else None,
        tuple(path for seen in found for path in seen.paths),
        torch.cat([seen.thumbnails for seen in found]),
        tuple(digest for seen in found for digest in seen.digests),
        {path: image for _, path, image in heapq.nlargest(KEPT, pictures, key=lambda entry: entry[:2])},
        skipped,
        max(seen.sum_error for seen in found),
    )


class _Seen(NamedTuple):
    """Of a batch; of its decomposition all but the maps."""

    terms: dict[str, Any]
    labels: Int[Tensor, " batch"] | None
    paths: tuple[str, ...]
    thumbnails: Float[Tensor, "batch pixel"]
    digests: list[bytes]
    sum_error: float


def _check_found(found: Sequence[_Seen], skipped: Sequence[SkippedFile]) -> None:
    if not found:
        last = f", the last: {skipped[-1].reason}" if skipped else ""
        raise ValueError(
            f"expected images; none could be read{last}; check that they are pictures and complete"
        )


def split(clean: ImageSet, suspect: ImageSet, config: AuditConfig, *, infer_target: bool) -> Split:
    """Set the validation part apart, and the suspect images that are paired with it.

    A suspect image is paired with the clean image of the same name (its path inside its folder, without the ending) if the two
    sets show the same pictures. Partners of validation images are not reported, since prototypes were fitted on their other half.

    Args:
        clean: the clean images.
        suspect: the suspect images.
        config: share and seed of the validation part.
        infer_target: keep suspect images apart to infer the target on: the partners of validation images, or else a seeded part.

    Raises:
        ValueError: too few images to leave some in every part.
    """
    first, _ = split_indices(len(clean), config.validation, config.seed)
    in_validation = torch.zeros(len(clean), dtype=torch.bool)
    in_validation[first] = True
    validation = clean.at(in_validation)
    names = set(_names(validation))
    aside = torch.tensor([name in names for name in _names(suspect)], dtype=torch.bool)
    if infer_target and aside.sum() < config.validation * len(suspect) / 2:  # not paired, or a few by chance
        aside[split_indices(len(suspect), config.validation, config.seed)[0]] = True
    if aside.all():
        raise ValueError(
            f"expected suspect images beside the partners of the {len(validation)} clean images that fit the "
            f"prototypes; all {len(suspect)} are such partners; give more images, or another seed"
        )
    evaluated, reported = clean.at(~in_validation), suspect.at(~aside)
    held_out = suspect.at(aside) if infer_target and aside.any() else None
    return Split(validation, evaluated, reported, held_out, are_paired(evaluated, reported))


def are_paired(clean: ImageSet, suspect: ImageSet) -> bool:
    """Whether each suspect image shows what the clean image in its place shows.

    Equal names alone say little: many folders count their files from zero. The pictures must also be nearer
    to their namesakes than to others, as they are or with their light made equal, and no label may contradict.
    """
    if _names(clean) != _names(suspect):
        return False
    if (
        clean.labels is not None
        and suspect.labels is not None
        and not torch.equal(clean.labels, suspect.labels)
    ):
        return False
    raw = clean.thumbnails, suspect.thumbnails
    own, others = _apart(*raw)
    if own <= ALIKE * others:
        return True
    own, others = _apart(*map(_seen, raw))  # a copy in other light is one too
    return own < ALIKE * others


def _apart(one: Float[Tensor, "batch pixel"], other: Float[Tensor, "batch pixel"]) -> tuple[float, float]:
    """How far pictures are from their namesakes, and from others."""
    own, others = ((one - there).norm(dim=1).median() for there in (other, other.roll(1, dims=0)))
    return float(own), float(others)


def _seen(thumbnails: Float[Tensor, "batch pixel"]) -> Float[Tensor, "batch pixel"]:
    """What thumbnails show, whatever their light: of no mean and of one contrast, less where there is hardly any."""
    centred = thumbnails - thumbnails.mean(1, keepdim=True)
    return centred / centred.square().mean(1, keepdim=True).sqrt().clamp_min(FLAT)


def _names(images: ImageSet) -> list[str]:
    """Paths without their endings, in one form: a changed copy may be stored in another format, on another system."""
    return [_stem(path) for path in images.paths]


def _stems(source: ListedImages) -> list[str]:
    return [_stem(name) for name, _ in source.listed(range(len(source)))]


def _stem(path: str) -> str:
    return "/".join(map(canonical, without_ending(path).parts))
