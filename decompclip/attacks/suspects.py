"""A set of suspect images: triggered copies of a folder's pictures, which pair with them by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.attacks.registry import Attack
from decompclip.attacks.trigger import Pixels
from decompclip.data.files import TRIGGER_FILE, SkippedFile
from decompclip.data.images import FolderSource, ImageBatch
from decompclip.data.pixels import encode_png
from decompclip.files import atomic_folder, write_json


@dataclass(frozen=True)
class SuspectFiles:
    """What was written: how many pictures, which files were left out, and which could not keep their names."""

    folder: Path
    count: int
    skipped: tuple[SkippedFile, ...]
    renamed: tuple[str, ...]


def write_suspects(
    attack: Attack,
    source: FolderSource,
    folder: str | Path,
    *,
    batch_size: int = 64,
    seen: Callable[[Pixels, Pixels], None] | None = None,
    track: Callable[[Iterable[ImageBatch], str, int], Iterator[ImageBatch]] | None = None,
) -> SuspectFiles:
    """Triggered copies of a source's pictures as PNG files, and `trigger.json`, which says with what.

    `a/b.jpg` becomes `a/b.png`; where two pictures would get one name, both keep theirs in front: `a/b.jpg.png`. Each
    picture gets its place among those that can be read, as `evaluate` counts them. The folder is there when it is whole.

    Args:
        attack: the trigger, and its target where it is known.
        source: of pixels in [0, 1], brought to the geometry in which the model sees them: a trigger put into a larger
            picture would be scaled, and perhaps cut off.
        folder: to write to, new or empty.
        batch_size: pictures that get the trigger at a time.
        seen: gets each batch, clean and triggered as the files hold it.
        track: shows progress.

    Raises:
        FileExistsError: the folder is there, and not empty.
        ValueError: no picture could be read, the folder lies inside the source's or is it.
    """
    folder = Path(folder)
    check_target(folder, source.folder)
    count, renamed, size = 0, [], [0, 0]
    stems = Counter(Path(path).with_suffix("") for path in source.files)
    batches: Iterable[ImageBatch] = source.batches(batch_size)
    if track is not None:
        batches = track(batches, f"applying {attack.trigger.name}", -(-len(source) // batch_size))
    with atomic_folder(folder, TRIGGER_FILE) as partial:
        for batch in batches:
            triggered = attack.trigger(batch.images, range(count, count + len(batch.paths)))
            for path, image in zip(map(Path, batch.paths), triggered, strict=True):
                name = path.with_suffix(".png")
                if stems[path.with_suffix("")] > 1:
                    name = path.with_name(f"{path.name}.png")
                    renamed.append(path.as_posix())
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                (partial / name).write_bytes(encode_png(image))
            if seen is not None:
                seen(batch.images, (triggered * 255).round() / 255)
            count, size = count + len(batch.paths), list(triggered.shape[-2:])
        about: dict[str, Any] = {
            **attack.to_dict(),
            "origin": attack.origin,
            "clean": str(source.folder),
            "images": count,
            "size": size,
            "skipped": [vars(skip) for skip in source.skipped],
        }
        write_json(partial / TRIGGER_FILE, about)
    return SuspectFiles(folder, count, tuple(source.skipped), tuple(renamed))


def check_target(folder: Path, clean: Path) -> None:
    """Refuse a folder that suspect images cannot be written to, before the work.

    Raises:
        NotADirectoryError, FileExistsError: the folder is a file, or not empty.
        ValueError: it lies inside the folder of clean images.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"expected a folder to write to with --out; {folder} is a file")
    if clean.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise ValueError(
            f"expected a folder beside the clean images with --out; {folder} lies in {clean}, and suspect images "
            "would become clean ones"
        )
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(
            f"expected an empty or a new folder with --out; {folder} holds files; name another"
        )


class TargetCounts:
    """Counts how often a model answers the target, on clean pictures and on triggered ones; a `seen` of `write_suspects`."""

    def __init__(self, model: Any, classifier: Float[Tensor, "class d_embed"], target: int) -> None:
        self.model, self.classifier, self.target = model, classifier, target
        self.clean: list[Tensor] = []
        self.triggered: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, clean: Pixels, triggered: Pixels) -> None:
        for pixels, found in ((clean, self.clean), (triggered, self.triggered)):
            features = self.model.encode_image(self.model.normalize(pixels))
            found.append(((features @ self.classifier.to(features).T).argmax(-1) == self.target).cpu())
