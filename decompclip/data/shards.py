"""WebDataset shards of image-caption pairs, as img2dataset writes them: tar files with `KEY.jpg` and `KEY.txt`.

open_clip's own reader draws pairs from a shuffled buffer and cannot say which pair a step gets; training that
resumes bit-exactly and a fixed list of poisons need places. So local shards are indexed here once (their
headers are read, no image), and then read at any place. For shards elsewhere see `decompclip.data.datasets`.
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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from torch import Tensor
from typing_extensions import Unpack

from decompclip.data.files import SkippedFile, is_bookkeeping, open_regular, reason
from decompclip.data.pairs import ListedPairs, Pair, PairEntry, PairOptions
from decompclip.data.pixels import Preprocess, encode_png, read_image
from decompclip.display import some
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


class ShardPairs(ListedPairs):
    """The pairs of local WebDataset shards, in the shards' order.

    A shard that is broken is listed in `skipped` with the number of pairs that stand whole before the break
    and are kept; so are pairs without an image or a caption, a second pair under one key, and files that belong to no
    pair. Names that begin with a dot or have none are no part of a pair, as in WebDataset; files of one key that do
    not follow each other are put together, with a warning.

    A pair is called after its shard and key: `00000/000000012`. Shards that are called alike are told apart by more of
    their names, or by the folders above them: `cc3m/00000/000000012`.

    Args:
        shards: a folder, a path, a pattern (`cc3m/{00000..00331}.tar`, `cc3m/*.tar`), or a list of those.
        preprocess: as `Pairs`.
        need_captions: False keeps pairs without one, for their images.
        options: as `Pairs`; classes are the numbers in `KEY.cls`.

    Raises:
        FileNotFoundError: there is no such shard.
        ValueError: no pair could be read, for instance for want of captions; or shards that are not local.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        preprocess: Preprocess | None = None,
        *,
        need_captions: bool = True,
        **options: Unpack[PairOptions],
    ) -> None:
        super().__init__(preprocess, **options)
        given = expand_shards(shards)
        self.shards = list({shard.resolve(): shard for shard in reversed(given)}.values())[::-1]
        for shard in self.shards:
            if sum(other.resolve() == shard.resolve() for other in given) > 1:
                self._left_out[f"{shard} again"] = SkippedFile(
                    str(shard), "was given more than once, and is read once"
                )
        self.names = shard_names(self.shards)
        self._need_captions = need_captions
        self._list(
            (entry for shard in self.shards for entry in self._index(shard, self.names[shard])),
            f"pairs of images (KEY.{', KEY.'.join(IMAGE_KINDS)}) and captions (KEY.txt, or KEY.cls with class_names and "
            f"templates) in {len(self.shards)} shards",
        )

    def _file(self, index: int) -> Path:
        return self.entries[index].image[0]

    def _image(self, image: tuple[Path, int, int]) -> Tensor | str:
        shard, offset, size = image
        try:
            with open_regular(shard) as file:
                file.seek(offset)
                return read_image(file.read(size), self.preprocess)
        except OSError as error:
            return reason(error)

    def _index(self, shard: Path, name: str) -> Iterator[PairEntry]:
        foreign: list[str] = []
        found: dict[str, KeyFiles] = {}
        again, apart, kept, broken = 0, 0, 0, None
        try:
            for key, files in samples(shard, foreign):
                before = found.setdefault(key, {})
                apart += bool(before)
                if before.keys() & files.keys():
                    again += 1
                    why = "is there twice in this shard; the first is read"
                    self._leave_out(f"{name}/{key} again ({again})", why)
                else:
                    before |= files
        except (tarfile.TarError, OSError, EOFError) as error:  # what stands before a break is kept
            broken = reason(error)
        if apart > again:
            warnings.warn(
                f"{shard}: the files of {apart - again} pairs lie apart, and were put together by their keys; WebDataset's own "
                "reader takes only files that follow each other for a pair: write the shard again, sorted by name",
                stacklevel=5,
            )
        for key, files in found.items():
            entry = self._entry(f"{name}/{key}", shard, files)
            if isinstance(entry, str):
                self._leave_out(f"{name}/{key}", entry)
            else:
                kept += 1
                yield entry
        if broken is not None:
            self._leave_out(str(shard), f"broken shard, {kept} pairs kept: {broken}")
        if foreign:
            path = f"{shard}: {some(list(dict.fromkeys(foreign)))}"
            many = f"{len(foreign)} file{'s' if len(foreign) > 1 else ''}"
            self._left_out[path] = SkippedFile(
                path, f"{many} of no pair: no key and kind in the name, or a link"
            )

    def _entry(self, name: str, shard: Path, files: KeyFiles) -> PairEntry | str:
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
        caption = self._caption(caption, label, name)
        if not caption and self._need_captions:
            return "has no caption (KEY.txt); give class_names and templates if it has a class (KEY.cls)"
        offset, size, _ = files[kind]
        if size > MOST_IMAGE:
            return f"its image has {size} bytes; expected at most {MOST_IMAGE}"
        return PairEntry(name, caption, label, (shard, offset, size))


KeyFiles = dict[str, tuple[int, int, bytes | None]]
"""Of one key, by kind: place, size, and the content of texts and classes."""


def samples(shard: Path, foreign: list[str]) -> Iterator[tuple[str, KeyFiles]]:
    """Keys with their files, in order; names of files that belong to none go to `foreign`.

    Raises:
        tarfile.TarError, OSError: the shard is broken, after what stands whole before the break.
    """
    with open_regular(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        length = shard.stat().st_size
        files: KeyFiles = {}
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
    """The names of shards in ids: up to the first dot, where that is enough to tell them apart; else up to `.tar`;
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
                there = path.glob("*.tar") if path.is_dir() else map(Path, glob.glob(pattern))
                paths = sorted(shard for shard in there if not is_bookkeeping(shard.name))
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
        pairs: what to write.
        folder: without shards, unless `resume`.
        per_shard: pairs in each.
        resume: the folder's shards are of these pairs, as a killed run left them: they stay, and those that lack are added.

    Returns:
        The shards' paths.

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
