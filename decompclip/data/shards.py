"""WebDataset shards of image-caption pairs, as img2dataset writes them: tar files with `KEY.jpg` and `KEY.txt`.

open_clip's own reader draws pairs from a shuffled buffer and cannot say which pair a step gets; training that
resumes bit-exactly and a fixed list of poisons need places. So local shards are indexed here once (their
headers are read, no image), and then read at any place. For shards elsewhere see `decompclip.data.streams`.

Pairs into WebDataset shards, so that any CLIP training code can read them.
"""

from __future__ import annotations

import glob
import io
import itertools
import json
import re
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from jaxtyping import Int
from torch import Tensor

from decompclip.data.files import SkippedFile, is_bookkeeping, open_regular, reason
from decompclip.data.images import OnError
from decompclip.data.pairs import Pair, Pairs, check_templates, template_caption
from decompclip.data.pixels import Preprocess, decode, encode_png, to_pixels
from decompclip.files import atomic_write

UNFINISHED = "poisons.unfinished.json"
"""Lies in a folder while shards are written to it."""

IMAGE_KINDS = ("jpg", "jpeg", "png", "webp", "avif", "bmp", "gif", "jfif", "ppm", "tif", "tiff")
MOST_TEXT = 2**20
"""Bytes of a caption; more is no caption."""

MOST_IMAGE = 2**30
MOST_SHARDS = 1_000_000
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")


@dataclass(frozen=True)
class Entry:
    """Where a pair's image lies inside its shard, and what goes with it."""

    id: str
    shard: Path
    offset: int
    size: int
    caption: str
    label: int | None


class ShardPairs(Pairs):
    """The pairs of local WebDataset shards, in the shards' order.

    A shard that is broken is listed in `skipped` with the number of pairs that stand whole before the break
    and are kept; so are pairs without an image or a caption, what stands again under a key, and files that belong to no
    pair. Names that begin with a dot or have none are no part of a pair, as in WebDataset; files of one key that do
    not follow each other are put together, with a warning.

    A pair is called after its shard and key: `00000/000000012`. Shards that are called alike are told apart by more of
    their names, or by the folders above them: `cc3m/00000/000000012`.

    Args:
        shards: a folder, a path, a pattern (`cc3m/{00000..00331}.tar`, `cc3m/*.tar`), or a list of those.
        preprocess: from a picture to pixels in [0, 1]; see `to_pixels`.
        class_names: the classes that the numbers in `KEY.cls` stand for, or that a target is checked against.
        templates: captions of pairs that have a class and no text; a random one each.
        caption_seed: of the templates drawn.
        order_seed, on_error: as `Pairs`.
        need_captions: False keeps pairs without one, for their images.
        names: what each shard is called in its pairs' ids; by default `shard_names` of these shards.

    Raises:
        FileNotFoundError: there is no such shard.
        ValueError: no pair could be read, for instance for want of captions; or shards that are not local.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        preprocess: Preprocess | None = None,
        *,
        class_names: Sequence[str] = (),
        templates: Sequence[str] | None = None,
        caption_seed: int = 0,
        order_seed: int = 0,
        on_error: OnError = "skip",
        need_captions: bool = True,
        names: Mapping[Path, str] | None = None,
    ) -> None:
        templates = () if templates is None else check_templates(templates)
        super().__init__(
            class_names=class_names, templates=templates, order_seed=order_seed, on_error=on_error
        )
        self.preprocess = preprocess or to_pixels()
        given = expand_shards(shards)
        self.shards = list({shard.resolve(): shard for shard in reversed(given)}.values())[::-1]
        for shard in self.shards:
            if sum(other.resolve() == shard.resolve() for other in given) > 1:
                self._left_out[f"{shard} again"] = SkippedFile(
                    str(shard), "was given more than once, and is read once"
                )
        self._caption_seed = caption_seed
        self.names = shard_names(self.shards) if names is None else names
        self._need_captions = need_captions
        self._entries = [entry for shard in self.shards for entry in self._index(shard, self.names[shard])]
        if not self._entries:
            reasons = [f"{skip.path}: {skip.reason}" for skip in self.skipped[:1]]
            raise ValueError(
                f"expected pairs of images (KEY.{', KEY.'.join(IMAGE_KINDS)}) and captions (KEY.txt, or KEY.cls with "
                f"class_names and templates) in {len(self.shards)} shards; found none; "
                f"{reasons[0] if reasons else 'they are empty'}"
            )
        self._ids = [entry.id for entry in self._entries]
        self._captions = [entry.caption for entry in self._entries]
        labels = [entry.label for entry in self._entries]
        self._labels = None if None in labels else torch.tensor(labels)

    @property
    def ids(self) -> Sequence[str]:
        return self._ids

    @property
    def captions(self) -> Sequence[str]:
        return self._captions

    @property
    def labels(self) -> Int[Tensor, " pair"] | None:
        return self._labels

    @property
    def known_labels(self) -> Sequence[int | None]:
        return [entry.label for entry in self._entries]

    def _images(self, indices: Sequence[int]) -> list[Tensor | str]:
        return [self._image(self._entries[index]) for index in indices]

    def _image(self, entry: Entry) -> Tensor | str:
        try:
            with open_regular(entry.shard) as file:
                file.seek(entry.offset)
                content = file.read(entry.size)
        except OSError as error:
            return reason(error)
        return decode(content, self.preprocess)

    def _index(self, shard: Path, name: str) -> Iterator[Entry]:
        foreign: list[str] = []
        found: dict[str, Files] = {}
        again, apart, kept, broken = 0, 0, 0, None
        try:
            for key, files in _samples(shard, foreign):
                before = found.setdefault(key, {})
                apart += bool(before)
                if before.keys() & files.keys():
                    again += 1
                    self._skip(
                        f"{name}/{key} again ({again})",
                        "stands again in this shard; of one key the first is read",
                    )
                else:
                    before |= files
        except (tarfile.TarError, OSError, EOFError) as error:  # what stands before a break is kept
            broken = reason(error)
        if apart > again:
            warnings.warn(
                f"{shard}: the files of {apart - again} pairs lie apart, and were put together by their keys; WebDataset's own "
                "reader takes only files that follow each other for a pair: write the shard again, sorted by name",
                stacklevel=3,
            )
        for key, files in found.items():
            entry = self._entry(f"{name}/{key}", shard, files)
            if isinstance(entry, str):
                self._skip(f"{name}/{key}", entry)
            else:
                kept += 1
                yield entry
        if broken is not None:
            self._skip(str(shard), f"broken shard, {kept} pairs kept: {broken}")
        if foreign:
            shown = ", ".join(list(dict.fromkeys(foreign))[:3]) + (", ..." if len(foreign) > 3 else "")
            path = f"{shard}: {shown}"
            self._left_out[path] = SkippedFile(
                path,
                f"{len(foreign)} file{'s' if len(foreign) > 1 else ''} of no pair: no key and kind in the name, or a link",
            )

    def _entry(self, name: str, shard: Path, files: Files) -> Entry | str:
        """What stands at a key, or why it is no pair."""
        kind = next((kind for kind in IMAGE_KINDS if kind in files), None)
        if kind is None:
            return f"has no image, only {sorted(files)}"
        label = None
        if "cls" in files:
            text = (files["cls"][2] or b"").decode("utf-8", "replace").strip()
            if not text.isdecimal() or (self.class_names and int(text) >= len(self.class_names)):
                return f"class {text!r} is not one of the {len(self.class_names)} classes, counted from 0"
            label = int(text)
        try:
            caption = (files["txt"][2] or b"").decode("utf-8-sig").strip() if "txt" in files else ""
        except UnicodeDecodeError as error:
            return f"its caption is no UTF-8: {error.reason} at byte {error.start}"
        if not caption and label is not None and self.templates and self.class_names:
            caption = template_caption(
                self.class_names[label], self.templates, seed=self._caption_seed, name=name
            )
        if not caption and self._need_captions:
            return "has no caption (KEY.txt); give class_names and templates if it has a class (KEY.cls)"
        offset, size, _ = files[kind]
        if size > MOST_IMAGE:
            return f"its image has {size} bytes; expected at most {MOST_IMAGE}"
        return Entry(name, shard, offset, size, caption, label)

    def _skip(self, path: str, reason: str) -> None:
        if self.on_error == "raise":
            raise ValueError(f'{path}: {reason}; repair it, or leave it out with on_error="skip"')
        self._left_out[path] = SkippedFile(path, reason)


Files = dict[str, tuple[int, int, bytes | None]]
"""Of one key, by kind: place, size, and the content of texts and classes."""


def _samples(shard: Path, foreign: list[str]) -> Iterator[tuple[str, Files]]:
    """Keys with their files, in order; names of files that belong to none go to `foreign`.

    Raises:
        tarfile.TarError, OSError: the shard is broken, after what stands whole before the break.
    """
    with open_regular(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        length = shard.stat().st_size
        files: Files = {}
        key = ""
        for member in tar:
            split = _split(member.name)
            if not member.isfile() or member.issparse() or split is None:
                if not (member.isdir() or any(map(is_bookkeeping, PurePosixPath(member.name).parts))):
                    foreign.append(member.name)
                continue
            before, (key, kind) = key, split
            if files and key != before:
                yield before, files
                files = {}
            if member.offset_data + member.size > length:
                raise tarfile.ReadError(f"ends within {member.name}")
            if kind in files:  # another pair of that name
                yield key, files
                files = {}
            stream = tar.extractfile(member) if kind in {"txt", "cls"} and member.size <= MOST_TEXT else None
            files[kind] = (member.offset_data, member.size, None if stream is None else stream.read())
        if files:
            yield key, files
        file.seek(tar.offset)  # tarfile takes a header that it cannot read for the end
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("ends without the mark that closes an archive")


def _split(name: str) -> tuple[str, str] | None:
    """Key and kind of a file: what stands before and after the first dot of its name; None where WebDataset sees neither."""
    folder, slash, file = name.rpartition("/")
    stem, dot, kind = file.partition(".")
    return (f"{folder}{slash}{stem}", kind.lower()) if stem and dot else None


def shard_names(shards: Sequence[Path]) -> dict[Path, str]:
    """What shards are called in ids: up to the first dot, where that is enough to tell them apart; else up to `.tar`;
    else with the names of as many folders above them as it takes."""

    def name(shard: Path, detail: int) -> str:
        if detail == 0:
            return shard.name.split(".")[0]
        parts = shard.resolve().parts if detail > 1 else (shard.name,)
        return "/".join((*parts[-detail:-1], Path(parts[-1]).stem))

    details = dict.fromkeys(shards, 0)
    while True:
        named = {shard: name(shard, detail) for shard, detail in details.items()}
        alike = {text for text, count in Counter(named.values()).items() if count > 1}
        if not alike:
            return named
        for shard, text in named.items():
            details[shard] += text in alike


def expand_shards(shards: str | Path | Sequence[str | Path]) -> list[Path]:
    """Paths of the shards that a folder, patterns or a list stand for, in order.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: not on this machine, or a poisoned set that was not finished.
    """
    given = [shards] if isinstance(shards, str | Path) else list(shards)
    found: list[Path] = []
    for spec in given:
        for part in str(spec).split("::"):
            if re.match(r"(https?|s3|gs|pipe|hf):", part):
                raise ValueError(
                    f"expected shards on this machine; received {part}; download them, or wrap webdataset's own reader "
                    "in PairStream"
                )
            for pattern in _braces(part):
                path = Path(pattern)
                paths = sorted(path.glob("*.tar")) if path.is_dir() else sorted(map(Path, glob.glob(pattern)))
                paths = [
                    shard for shard in paths if not is_bookkeeping(shard.name)
                ]  # such as a Mac's ._00000.tar
                if not paths and path.is_file():
                    paths = [path]  # its own name holds a [, which a pattern would take for more
                if not paths:
                    raise FileNotFoundError(f"expected WebDataset shards (.tar) at {pattern}; found none")
                found += paths
    if not found:
        raise FileNotFoundError("expected at least one shard; received an empty list")
    for folder in dict.fromkeys(path.parent for path in found):
        check_finished(folder)
    return found


def check_finished(folder: Path) -> None:
    """Raises ValueError where `decompclip poison` was stopped half-way: what lies there is not the whole set."""
    if (folder / UNFINISHED).exists():
        raise ValueError(
            f"expected whole pairs; {folder} was not finished ({UNFINISHED} lies there); run the same `decompclip poison` again, "
            "which goes on, or delete the folder"
        )


def _braces(pattern: str) -> list[str]:
    """`{000..012}` and `{train,val}` written out, as shells do; a path that is there stands for itself."""
    if Path(pattern).exists():
        return [pattern]
    if match := _RANGE.search(pattern):
        first, last = match.groups()
        step = 1 if int(first) <= int(last) else -1
        numbers = range(int(first), int(last) + step, step)
        if len(numbers) > MOST_SHARDS:
            raise ValueError(
                f"expected at most {MOST_SHARDS} shards; received {pattern}, {len(numbers)} of them"
            )
        width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
        words = [f"{n:0{width}d}" for n in numbers]
    elif match := _CHOICE.search(pattern):
        words = match[1].split(",")
    else:
        return [pattern]
    filled = (f"{pattern[: match.start()]}{word}{pattern[match.end() :]}" for word in words)
    return list(dict.fromkeys(whole for one in filled for whole in _braces(one)))


def write_shards(
    pairs: Iterable[Pair], folder: str | Path, *, per_shard: int = 1000, resume: bool = False
) -> list[Path]:
    """Write `00000.tar`, `00001.tar`, ... with `KEY.png`, `KEY.txt`, `KEY.json` (the pair's id) and, where known, `KEY.cls`.

    Images are kept in 8 bits without loss; equal pairs give equal bytes. A shard appears under its name when it is
    whole.

    Args:
        per_shard: pairs in each.
        resume: the folder's shards are of these pairs, as a killed run left them: they stay, and those that lack are added.

    Raises:
        FileExistsError: there are shards in the folder already, and they are not to be kept.
        ValueError: no pairs, or fewer than one a shard.
    """
    folder = Path(folder)
    if per_shard < 1:
        raise ValueError(f"expected at least 1 pair a shard; received {per_shard}")
    if not resume and (found := sorted(folder.glob("*.tar"))):
        raise FileExistsError(
            f"expected a folder without shards; {folder} holds {found[0].name}; name another"
        )
    folder.mkdir(parents=True, exist_ok=True)
    numbered = enumerate(pairs)
    shards: list[Path] = []
    while part := list(itertools.islice(numbered, per_shard)):
        path = folder / f"{len(shards):05d}.tar"
        shards.append(path)
        if path.exists():  # whole, or it would not be there
            continue
        with (
            atomic_write(path) as partial,
            tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for number, pair in part:
                for kind, content in _files(pair):
                    member = tarfile.TarInfo(f"{number:09d}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    if not shards:
        raise ValueError("expected pairs to write; received none")
    return shards


def _files(pair: Pair) -> Iterator[tuple[str, bytes]]:
    yield "png", encode_png(pair.image)
    yield "txt", pair.caption.encode()
    if pair.label is not None:
        yield "cls", str(pair.label).encode()
    yield "json", json.dumps({"id": pair.id}).encode()
