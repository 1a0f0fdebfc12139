"""A trigger seen on images: clean, triggered, and what came between; how visible it is (PSNR and SSIM). And folders of such.

A set of suspect images is triggered copies of a folder's pictures, which pair with them by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from decompclip.attacks.registry import Attack
from decompclip.attacks.trigger import Indices, Pixels, Trigger
from decompclip.data.feed import feed
from decompclip.data.files import TRIGGER_FILE, SkippedFile, is_bookkeeping, without_ending
from decompclip.data.images import ListedImages
from decompclip.data.pixels import bytes_of, encode_png
from decompclip.display import Track, silently
from decompclip.files import atomic_folder, atomic_write, check_folder, write_json

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from decompclip.figures.gallery import TriggerRow

GAIN = 10.0


@dataclass(frozen=True)
class Preview:
    """Clean and triggered images in [0, 1], the trigger's card, and how visible it is."""

    clean: Pixels
    triggered: Pixels
    card: Mapping[str, Any]
    quality: Quality

    def difference(self, gain: float = GAIN) -> Pixels:
        """Triggered less clean, times `gain`, around mid-grey."""
        return (0.5 + gain * (self.triggered - self.clean)).clamp(0, 1)

    def figure(self) -> go.Figure:
        """The first image: clean, triggered, and the difference."""
        return gallery([self])

    def save(self, path: str | Path) -> Path:
        """Write the pictures as a PNG file; returns its path."""
        return save_gallery([self], path)


def preview(trigger: Trigger, pixels: Pixels, indices: Indices | None = None) -> Preview:
    """`trigger` on `pixels`.

    Args:
        trigger: the trigger.
        pixels: images in [0, 1], before normalisation.
        indices: the place of each image in its data set; `0 .. batch-1` by default.

    Raises:
        ValueError: as `Trigger.__call__`, or images smaller than SSIM's window.
    """
    triggered = trigger(pixels, indices)
    return Preview(pixels, triggered, trigger.card(), compare(pixels, triggered))


def gallery(previews: Sequence[Preview]) -> go.Figure:
    """The first image of each preview: one row a trigger, its name and fidelity beside it.

    Raises:
        ValueError: no previews.
    """
    from decompclip.figures.gallery import trigger_gallery

    return trigger_gallery(_rows(previews))


def save_gallery(previews: Sequence[Preview], path: str | Path) -> Path:
    """`gallery` as a PNG file, without a browser; returns its path."""
    from decompclip.figures.gallery import trigger_sheet

    with atomic_write(path) as partial:
        trigger_sheet(_rows(previews)).save(partial, format="PNG", optimize=True)
    return Path(path)


def _rows(previews: Sequence[Preview]) -> list[TriggerRow]:
    from decompclip.figures.gallery import TriggerRow

    if not previews:
        raise ValueError("expected at least one preview; received none")
    return [
        TriggerRow(
            _lines(shown), [bytes_of(x[0]) for x in (shown.clean, shown.triggered, shown.difference())]
        )
        for shown in previews
    ]


def _lines(preview: Preview) -> list[str]:
    quality = preview.quality.summary()
    return [
        preview.card["name"],
        f"{preview.card['extent']}, {preview.card['structure']}",
        f"PSNR {quality['psnr']:.1f} dB",
        f"SSIM {quality['ssim']:.3f}",
        f"{100 * quality['changed']:.1f} % of pixels",
    ]


WINDOW = 11
SIGMA = 1.5
_C1, _C2 = 0.01**2, 0.03**2


@dataclass(frozen=True)
class Quality:
    """Fidelity of each triggered image to its clean one.

    Attributes:
        psnr: peak signal-to-noise ratio in dB; infinite where nothing changed.
        ssim: structural similarity, 1 where nothing changed.
        changed: share of the pixels that changed.
    """

    psnr: Float[Tensor, " batch"]
    ssim: Float[Tensor, " batch"]
    changed: Float[Tensor, " batch"]

    def summary(self) -> dict[str, float]:
        """The three means, ready for a card or a table."""
        return {
            "psnr": round(self.psnr.mean().item(), 2),
            "ssim": round(self.ssim.mean().item(), 4),
            "changed": round(self.changed.mean().item(), 4),
        }


def compare(clean: Pixels, triggered: Pixels) -> Quality:
    """PSNR, SSIM and the share of changed pixels of each triggered image beside its clean one.

    Raises:
        ValueError: as `ssim`.
    """
    changed = (clean != triggered).any(dim=1).float()
    return Quality(psnr(clean, triggered), ssim(clean, triggered), reduce(changed, "b h w -> b", "mean"))


def psnr(clean: Pixels, triggered: Pixels) -> Float[Tensor, " batch"]:
    """Peak signal-to-noise ratio in dB of images in [0, 1].

    Raises:
        ValueError: batches of different shapes.
    """
    _check_alike(clean, triggered)
    return -10 * reduce((clean - triggered).square(), "b c h w -> b", "mean").log10()


def ssim(clean: Pixels, triggered: Pixels) -> Float[Tensor, " batch"]:
    """Structural similarity (Wang et al., 2004) of images in [0, 1], a mean over pixels and channels.

    The source's settings: Gaussian window of 11 x 11 pixels and sigma 1.5, K = 0.01 and 0.03; only windows
    that lie inside the image count.

    Raises:
        ValueError: batches of different shapes, or images smaller than the window.
    """
    _check_alike(clean, triggered)
    height, width = clean.shape[-2:]
    if min(height, width) < WINDOW:
        raise ValueError(
            f"expected images of at least {WINDOW} x {WINDOW} pixels, SSIM's window; received {height} x {width}"
        )
    mean_x, mean_y = _blur(clean), _blur(triggered)
    var_x, var_y = _blur(clean * clean) - mean_x**2, _blur(triggered * triggered) - mean_y**2
    covariance = _blur(clean * triggered) - mean_x * mean_y
    light = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * covariance + _C2) / (var_x + var_y + _C2)
    return reduce(light * structure, "b c h w -> b", "mean")


def _blur(x: Pixels) -> Float[Tensor, "batch 3 h2 w2"]:
    edge = WINDOW // 2
    return gaussian_blur(x, [WINDOW, WINDOW], [SIGMA, SIGMA])[..., edge:-edge, edge:-edge]


def _check_alike(clean: Tensor, triggered: Tensor) -> None:
    if clean.shape != triggered.shape or clean.ndim != 4:
        raise ValueError(
            f"expected clean and triggered images [batch, channel, h, w] of one shape; received {list(clean.shape)} and "
            f"{list(triggered.shape)}"
        )


@dataclass(frozen=True)
class SuspectFiles:
    """What was written: how many pictures, which files were left out, and which could not keep their names."""

    folder: Path
    count: int
    skipped: tuple[SkippedFile, ...]
    renamed: tuple[str, ...]


def write_suspects(
    attack: Attack,
    source: ListedImages,
    folder: str | Path,
    *,
    clean: str | Path,
    batch_size: int = 64,
    seen: Callable[[Pixels, Pixels], None] | None = None,
    track: Track = silently,
) -> SuspectFiles:
    """Triggered copies of a source's pictures as PNG files, and `trigger.json`, which says with what.

    `a/b.jpg` becomes `a/b.png`, and a row of a file `b.parquet#7.png`; where two pictures would get one name, both keep theirs in
    front: `a/b.jpg.png`. Each picture is given to the trigger with its place in the source, as in `evaluate`. The folder is there when it is whole.

    Args:
        attack: the trigger, and its target where it is known.
        source: of pixels in [0, 1], brought to the geometry in which the model sees them: a trigger put into a larger
            picture would be scaled, and perhaps cut off.
        folder: to write to, new or empty.
        clean: the folder or file that holds the source's pictures.
        batch_size: pictures that get the trigger at a time.
        seen: gets each batch, clean and triggered as the files hold it.
        track: shows progress.

    Raises:
        FileExistsError: the folder is there, and not empty.
        ValueError: no picture could be read, two would be one file, or one would lie outside the folder; the folder lies inside
            the source's or is it.
    """
    folder = Path(folder)
    check_suspect_folder(folder, Path(clean))
    written, size = list[str](), [0, 0]
    files, renamed = _files([name for name, _ in source.listed(range(len(source)))])
    n_batches = -(-len(source) // batch_size)
    with closing(feed(source, batch_size)) as batches, atomic_folder(folder, TRIGGER_FILE) as partial:
        for batch in track(batches, f"applying {attack.trigger.name}", n_batches):
            triggered = attack.trigger(batch.images, batch.indices.tolist())
            for name, image in zip(batch.paths, triggered, strict=True):
                (partial / files[name]).parent.mkdir(parents=True, exist_ok=True)
                (partial / files[name]).write_bytes(encode_png(image))
            if seen is not None:
                seen(batch.images, (triggered * 255).round() / 255)
            written.extend(batch.paths)
            size = list(triggered.shape[-2:])
        about: dict[str, Any] = {
            **attack.to_dict(),
            "origin": attack.origin,
            "clean": str(clean),
            "images": len(written),
            "size": size,
            "skipped": [vars(skip) for skip in source.skipped],
        }
        write_json(partial / TRIGGER_FILE, about)
    kept_ending = tuple(name for name in written if name in renamed)
    return SuspectFiles(folder, len(written), tuple(source.skipped), kept_ending)


def _files(names: Sequence[str]) -> tuple[dict[str, Path], set[str]]:
    """The file of each image, and which keep their ending in front; raises ValueError where one is outside the folder, or two are one."""
    stems = Counter(map(without_ending, names))
    renamed = {name for name in names if stems[without_ending(name)] > 1}
    files = {name: Path(f"{name if name in renamed else without_ending(name)}.png") for name in names}
    for name, file in files.items():
        if file.anchor or file.drive or ".." in file.parts or any(map(is_bookkeeping, file.parts)):
            raise ValueError(
                f"expected images whose names are paths below a folder, and not hidden ones; received {name}; give them as a folder "
                "with image files"
            )
    taken = Counter([files[name] for name in names])
    if twice := next((file for file, times in taken.items() if times > 1), None):
        raise ValueError(
            f"expected images that can have files of their own; {taken[twice]} would be {twice}; rename them"
        )
    return files, renamed


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
