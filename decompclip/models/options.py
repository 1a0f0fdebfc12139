"""What `load` is asked for, checked before anything is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from decompclip.models.errors import UnknownModelError


def check_options(name: Any, device: Any, dtype: Any, image_size: Any = None) -> None:
    """Check the arguments of `load` that need no look at any model.

    Raises:
        UnknownModelError: `name` is no name, path or model.
        ValueError: a device that cannot be used here, a dtype that is none of floating point, or no image size.
    """
    if not isinstance(name, str | Path | nn.Module):
        raise UnknownModelError(
            f"expected a name, a path, or a model of open_clip's or transformers'; received {name!r}, "
            f"of type {type(name).__name__}"
        )
    sizes = (image_size,) if isinstance(image_size, int) else image_size
    if sizes is not None and not (
        isinstance(sizes, tuple) and len(sizes) in (1, 2) and all(isinstance(x, int) and x > 0 for x in sizes)
    ):
        raise ValueError(
            f"expected image_size as a number of pixels, or height and width; received {image_size!r}"
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        known = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else None
        example = known if isinstance(known, torch.dtype) and known.is_floating_point else torch.float16
        raise ValueError(
            f"expected a dtype of torch's for floating point; received {dtype!r}; pass dtype={example}"
        )
    check_device(device)


def check_device(device: str | torch.device | None) -> None:
    """Check that tensors can lie there.

    Raises:
        ValueError: there is no such device here.
    """
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        gpus = torch.cuda.device_count()
        here = ["cpu", *(f"cuda:{i}" for i in range(gpus))] + ["mps"] * torch.backends.mps.is_available()
        reason = str(error).splitlines()[0].split(". ")[0]
        if isinstance(error, TypeError) or reason.startswith("Expected one of"):
            reason = "torch knows no device of that name; a GPU's is 'cuda'"
        raise ValueError(
            f"expected a device that can be used here ({', '.join(here)}); received {str(device)!r}: {reason}"
        ) from error
