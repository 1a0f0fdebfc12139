"""The same weights under another activation: the one place that knows where activations stand in a model."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import Tensor, nn

from decompclip.models.clip import HookedCLIP
from decompclip.models.mlp import ACTIVATIONS, MLP

WORDS = {"gelu": "GELU", "quick_gelu": "QuickGELU", "gelu_tanh": "tanh-GELU", "silu": "SiLU"}


class _Activation(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.name](x)  # pyright: ignore[reportArgumentType]


def with_activation(model: HookedCLIP, activation: str) -> HookedCLIP:
    """`model` with this activation in both towers, as `load(activation=...)` gives it; the weights are shared."""
    kept = (*model.parameters(), *model.buffers(), model.tokenizer, model.preprocess)
    twin = copy.deepcopy(model, {id(thing): thing for thing in kept})
    for mlp in _image_mlps(twin):
        mlp.act = ACTIVATIONS[activation]  # pyright: ignore[reportArgumentType]
    for mlp in _text_mlps(twin):
        mlp.gelu = _Activation(activation)
    return twin


def in_image_tower(model: HookedCLIP) -> set[str]:
    """Names of the activations that the image tower's MLPs run."""
    known = {id(function): name for name, function in ACTIVATIONS.items()}
    return {known.get(id(mlp.act), "another") for mlp in _image_mlps(model)}


def in_text_tower(model: HookedCLIP) -> set[str]:
    """Names of the activations of open_clip's own text tower; none for those of other libraries."""
    known = {"GELU": "gelu", "QuickGELU": "quick_gelu"}
    return {known.get(type(mlp.gelu).__name__, "another") for mlp in _text_mlps(model)}


def _image_mlps(model: HookedCLIP) -> Iterator[MLP]:
    return (module for module in model.visual.modules() if isinstance(module, MLP))


def _text_mlps(model: HookedCLIP) -> Iterator[nn.Sequential]:
    return (m for m in model.text.modules() if isinstance(m, nn.Sequential) and hasattr(m, "gelu"))
