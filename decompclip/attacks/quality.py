"""How visible a trigger is: PSNR and SSIM of triggered images against their clean twins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from decompclip.attacks.trigger import Trigger

WINDOW = 11
SIGMA = 1.5
_C1, _C2 = 0.01**2, 0.03**2


@dataclass(frozen=True)
class Quality:
    """Fidelity of each triggered image to its clean twin.

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


def measure(
    trigger: Trigger,
    images: Float[Tensor, "batch 3 h w"],
    indices: Sequence[int] | Int[Tensor, " batch"] | None = None,
) -> Quality:
    """What `trigger` does to `images`.

    Raises:
        ValueError: as `Trigger.__call__`, or images smaller than SSIM's window.
    """
    return compare(images, trigger(images, indices))


def compare(clean: Float[Tensor, "batch 3 h w"], triggered: Float[Tensor, "batch 3 h w"]) -> Quality:
    """PSNR, SSIM and the share of changed pixels of twins.

    Raises:
        ValueError: twins of different shapes, or images smaller than SSIM's window.
    """
    changed = (clean != triggered).any(dim=1).float()
    return Quality(psnr(clean, triggered), ssim(clean, triggered), reduce(changed, "b h w -> b", "mean"))


def psnr(
    clean: Float[Tensor, "batch c h w"], triggered: Float[Tensor, "batch c h w"]
) -> Float[Tensor, " batch"]:
    """Peak signal-to-noise ratio in dB of images in [0, 1].

    Raises:
        ValueError: twins of different shapes.
    """
    _check_twins(clean, triggered)
    return -10 * reduce((clean - triggered).square(), "b c h w -> b", "mean").log10()


def ssim(
    clean: Float[Tensor, "batch c h w"], triggered: Float[Tensor, "batch c h w"]
) -> Float[Tensor, " batch"]:
    """Structural similarity (Wang et al., 2004) of images in [0, 1], a mean over pixels and channels.

    The source's settings: Gaussian window of 11 x 11 pixels and sigma 1.5, K = 0.01 and 0.03; only windows
    that lie inside the image count.

    Raises:
        ValueError: twins of different shapes, or images smaller than the window.
    """
    _check_twins(clean, triggered)
    if min(clean.shape[-2:]) < WINDOW:
        raise ValueError(
            f"expected images of at least {WINDOW} x {WINDOW} pixels, SSIM's window; received "
            f"{clean.shape[-2]} x {clean.shape[-1]}"
        )
    x, y = (rearrange(images, "b c h w -> (b c) 1 h w") for images in (clean, triggered))
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    light = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * covariance + _C2) / (var_x + var_y + _C2)
    return reduce(light * structure, "(b c) 1 h w -> b", "mean", c=clean.shape[1])


def _blur(x: Float[Tensor, "n 1 h w"]) -> Float[Tensor, "n 1 h2 w2"]:
    offsets = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    window = torch.softmax(-0.5 * (offsets / SIGMA) ** 2, dim=0)
    return F.conv2d(F.conv2d(x, window.view(1, 1, 1, -1)), window.view(1, 1, -1, 1))


def _check_twins(clean: Tensor, triggered: Tensor) -> None:
    if clean.shape != triggered.shape or clean.ndim != 4:
        raise ValueError(
            f"expected twins [batch, channel, h, w] of one shape; received {list(clean.shape)} and "
            f"{list(triggered.shape)}"
        )
