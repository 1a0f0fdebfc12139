"""Seeded splits: the validation part fits means and prototypes, the evaluation part measures them."""

from __future__ import annotations

import torch
from jaxtyping import Int
from sklearn.model_selection import train_test_split
from torch import Tensor


def split_indices(n: int, fraction: float, seed: int) -> tuple[Int[Tensor, " a"], Int[Tensor, " b"]]:
    """Split `0 .. n-1` at random into `round(fraction * n)` indices and the others, both in rising order.

    The paper's validation part is `fraction=0.2`, its evaluation part the rest.

    Raises:
        ValueError: a part would be empty.
    """
    size = round(fraction * n)
    if not 0 < size < n:
        raise ValueError(
            f"expected two parts with images in both; received {n} images and the fraction {fraction}, which "
            f"leaves one part empty; take a fraction between 0 and 1, and more images if there are few"
        )
    first, second = train_test_split(range(n), train_size=size, test_size=n - size, random_state=seed)
    return torch.tensor(sorted(first)), torch.tensor(sorted(second))
