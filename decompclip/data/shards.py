"""WebDataset shards of image-caption pairs, as img2dataset writes them: tar files with `KEY.jpg` and `KEY.txt`.

open_clip's own reader draws pairs from a shuffled buffer and cannot say which pair a step gets; training that
resumes bit-exactly and a fixed list of poisons need places. So local shards are indexed here once (their
headers are read, no image), and then read at any place. For shards elsewhere see `decompclip.data.streams`.
"""

from __future__ import annotations

import glob
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from decompclip.data.draws import check_templates, template_caption
from decompclip.data.files import reason
from decompclip.data.images import OnError, SkippedFile
from decompclip.data.pairs import Pairs
from decompclip.data.pixels import Preprocess, decode, to_pixels

IMAGE_KINDS = ("jpg", "jpeg", "png", "webp")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


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
    and are kept; so are pairs without an image or a caption.

    Args:
        shards: a folder, a path, a pattern (`cc3m/{00000..00331}.tar`, `cc3m/*.tar`), or a list of those.
        preprocess: from a picture to pixels in [0, 1]; see `to_pixels`.
        class_names: the classes that the numbers in `KEY.cls` stand for, or that a target is checked against.
        templates: captions of pairs that have a class and no text; a random one each.
        caption_seed: of the templates drawn.
        order_seed, on_error: as `Pairs`.

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
    ) -> None:
        templates = () if templates is None else check_templates(templates)
        super().__init__(
            class_names=class_names, templates=templates, order_seed=order_seed, on_error=on_error
        )
        self.preprocess = preprocess or to_pixels()
        self.shards = expand_shards(shards)
        self._caption_seed = caption_seed
        self._entries = [entry for shard in self.shards for entry in self._index(shard)]
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

    def _images(self, indices: Sequence[int]) -> list[Tensor | str]:
        return [self._image(self._entries[index]) for index in indices]

    def _image(self, entry: Entry) -> Tensor | str:
        try:
            with entry.shard.open("rb") as file:
                file.seek(entry.offset)
                content = file.read(entry.size)
        except OSError as error:
            return reason(error)
        return decode(content, self.preprocess)

    def _index(self, shard: Path) -> Iterator[Entry]:
        kept, name = 0, shard.name.split(".")[0]
        try:
            for key, files in _samples(shard):
                entry = self._entry(f"{name}/{key}", shard, files)
                if isinstance(entry, str):
                    self._skip(f"{name}/{key}", entry)
                else:
                    kept += 1
                    yield entry
        except (tarfile.TarError, OSError, EOFError) as error:
            self._skip(str(shard), f"broken shard, {kept} pairs kept: {error}")

    def _entry(self, name: str, shard: Path, files: dict[str, tuple[int, int, bytes | None]]) -> Entry | str:
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
        caption = (files["txt"][2] or b"").decode("utf-8", "replace").strip() if "txt" in files else ""
        if not caption and label is not None and self.templates and self.class_names:
            caption = template_caption(
                self.class_names[label], self.templates, seed=self._caption_seed, name=name
            )
        if not caption:
            return "has no caption (KEY.txt); give class_names and templates if it has a class (KEY.cls)"
        offset, size, _ = files[kind]
        return Entry(name, shard, offset, size, caption, label)

    def _skip(self, path: str, reason: str) -> None:
        if self.on_error == "raise":
            raise ValueError(f'{path}: {reason}; repair it, or leave it out with on_error="skip"')
        self._left_out[path] = SkippedFile(path, reason)


def _samples(shard: Path) -> Iterator[tuple[str, dict[str, tuple[int, int, bytes | None]]]]:
    """Keys with their files by kind: place, size, and the content of texts and classes.

    Raises:
        tarfile.TarError, OSError: the shard is broken, after what stands whole before the break.
    """
    length = shard.stat().st_size
    with tarfile.open(shard, "r:") as tar:
        files: dict[str, tuple[int, int, bytes | None]] = {}
        key = ""
        for member in tar:
            if not member.isfile():
                continue
            before, (key, kind) = key, _split(member.name)
            if files and key != before:
                yield before, files
                files = {}
            if member.offset_data + member.size > length:
                raise tarfile.ReadError(f"ends within {member.name}")
            stream = tar.extractfile(member) if kind in {"txt", "cls"} else None
            files[kind] = (member.offset_data, member.size, None if stream is None else stream.read())
        if files:
            yield key, files
        with shard.open("rb") as file:  # tarfile takes a header that it cannot read for the end
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("ends without the mark that closes an archive")


def _split(name: str) -> tuple[str, str]:
    """Key and kind of a file: what stands before and after the first dot of its name, as WebDataset has it."""
    folder, slash, file = name.rpartition("/")
    stem, _, kind = file.partition(".")
    return (f"{folder}{slash}{stem}" if stem else name), kind.lower()


def expand_shards(shards: str | Path | Sequence[str | Path]) -> list[Path]:
    """Paths of the shards that a folder, patterns or a list stand for, in order.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: not on this machine.
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
                if not paths and path.is_file():
                    paths = [path]  # its own name holds a [, which a pattern would take for more
                if not paths:
                    raise FileNotFoundError(f"expected WebDataset shards (.tar) at {pattern}; found none")
                found += paths
    if not found:
        raise FileNotFoundError("expected at least one shard; received an empty list")
    return found


def _braces(pattern: str) -> list[str]:
    """`{000..012}` written out."""
    if not (match := _RANGE.search(pattern)):
        return [pattern]
    first, last = match.groups()
    numbers = range(int(first), int(last) + 1)
    filled = (f"{pattern[: match.start()]}{n:0{len(first)}d}{pattern[match.end() :]}" for n in numbers)
    return [whole for one in filled for whole in _braces(one)]
