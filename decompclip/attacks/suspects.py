"""A set of suspect images: triggered copies of a folder's pictures, which pair with them by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from decompclip.attacks.registry import Attack
from decompclip.data.feed import feed
from decompclip.data.files import TRIGGER_FILE, SkippedFile
from decompclip.data.images import FolderSource
from decompclip.data.pixels import Pixels, encode_png
from decompclip.files import atomic_folder, check_folder, write_json
from decompclip.progress import Track, silently


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
    track: Track = silently,
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
    check_suspect_folder(folder, source.folder)
    count, renamed, size = 0, [], [0, 0]
    stems = Counter(Path(path).with_suffix("") for path in source.files)
    n_batches = -(-len(source) // batch_size)
    with closing(feed(source, batch_size)) as batches, atomic_folder(folder, TRIGGER_FILE) as partial:
        for batch in track(batches, f"applying {attack.trigger.name}", n_batches):
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


def check_suspect_folder(folder: Path, clean: Path) -> None:
    """Raises ValueError where `folder` lies in the folder of clean images; OSError as `check_folder`, or where it is not empty."""
    if clean.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise ValueError(
            f"expected a folder beside the clean images with --out; {folder} lies in {clean}, and suspect images "
            "would become clean ones"
        )
    check_folder(folder, "the images", empty=True)


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
