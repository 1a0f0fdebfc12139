"""Gradients where the caller has switched them off: under `torch.no_grad()` and `torch.inference_mode()`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def plain(x: T) -> T:
    """A tensor that autograd takes: a copy of one that was made under `torch.inference_mode()`, else the thing itself."""
    return x.clone() if isinstance(x, Tensor) and x.is_inference() else x  # pyright: ignore[reportReturnType]


def differentiable(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function that needs gradients with them, whatever mode its caller is in and made its tensors under."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.enable_grad():
            given = [plain(x) for x in args]
            named = {key: plain(x) for key, x in kwargs.items()}
            return function(*given, **named)  # pyright: ignore[reportCallIssue]

    return run
