"""Pixels that were not normalised, noticed at a model's door."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from decompclip.models.caller import warn_caller

LOOKS = 8
"""Batches on an accelerator that are looked at: each look waits for it once."""

_SAMPLE = 4096
_MANY = 16


class RawPixels:
    """Warns once of images in [0, 1] or 0..255 that a model takes normalised.

    Normalised images of a photograph have negative numbers: all that is darker than the mean. Those without any are looked at
    more closely, for a pale picture may have none: raw pixels reach both 0 and 1, stand on the grid of 8 bits, or end at
    black, 0 in every channel, where normalised ones would end at the mean of every channel.
    """

    def __init__(self) -> None:
        self.told = False
        self.looks = 0

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """Looks at nothing meanwhile: for images that are in a wrong range on purpose."""
        before, self.told = self.told, True
        try:
            yield
        finally:
            self.told = before

    @torch.no_grad()
    def look(self, images: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
        if self.told or images.numel() == 0 or images.is_meta or max(mean) <= 0:
            return
        if images.device.type != "cpu":
            self.looks += 1
            if self.looks > LOOKS:
                return
        flat = images.detach().reshape(-1)
        if float(flat[:: max(1, len(flat) // _SAMPLE)].min()) < 0:  # nearly all normalised batches end here
            return
        low, high = (float(x) for x in images.aminmax())
        most = max((1 - m) / s for m, s in zip(mean, std, strict=True))
        if low < 0 or not (high <= 1 or high > 4 * max(most, 1)):
            return
        scale = 1 if high <= 1 else 255
        if scale == 1 and not _raw(images, low, high, mean, std):
            return
        self.told = True
        warn_caller(
            f"these images lie in {low:.2f}..{high:.2f}, as pixels in {'[0, 1]' if scale == 1 else '0..255'} do, and this "
            "model takes them normalised; pass pixels in [0, 1] through `model.normalize`, or pictures through "
            "`model.preprocess`: without that it answers wrongly"
        )


def _raw(images: Tensor, low: float, high: float, mean: Sequence[float], std: Sequence[float]) -> bool:
    few = images[:4].float()
    own, width = (few.new_tensor(x).view(1, -1, 1, 1) for x in (mean, std))
    if _on_grid(few * width + own):  # 8 bits, normalised
        return False
    return _on_grid(few) or (low < 0.02 and high > 0.98) or _ends_at_black(images, mean, std)


def _ends_at_black(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> bool:
    """Whether 0, and nothing below it, is the least of every channel, in images that are not of one colour.

    Normalised, the darkest of all would be a colour near the mean: where the channels' means differ it is a certain colour,
    which is no bound of pictures. Where they are alike it is a grey, at which a few pale images may end: there it is
    exactly 0 that counts, which no pixel of 8 bits comes to, or many images.
    """
    least, most = images.amin((2, 3)), images.amax((2, 3))
    varied = ((most - least) > 0.1).any(1)
    if not bool(varied.any()):
        return False
    zeros = [m / s for m, s in zip(mean, std, strict=True)]
    certain = max(zeros) - min(zeros) > 0.1 or int(varied.sum()) >= _MANY
    return float(least[varied].amin(0).max()) < (0.02 if certain else 1e-6)


def _on_grid(pixels: Tensor) -> bool:
    steps = pixels * 255
    return bool((steps - steps.round()).abs().max() < 2e-3)
