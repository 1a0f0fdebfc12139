"""Small models of open_clip's own, made known to it as ViT-tiny-8, ViT-tiny-8-quickgelu and ViT-mini-8."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip import factory
from open_clip.model import CLIP

from decompclip.models.spec import build_open_clip

MakeSource = Callable[..., CLIP]


@pytest.fixture
def config() -> dict[str, Any]:
    """open_clip's configuration of a model for images of 24 x 16 pixels: 2 layers of 4 heads."""
    vision = {
        "image_size": [24, 16],
        "patch_size": 8,
        "width": 32,
        "layers": 2,
        "head_width": 8,
        "mlp_ratio": 1.5,
    }
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    return {"embed_dim": 20, "vision_cfg": vision, "text_cfg": text}


@pytest.fixture
def make_source(config: dict[str, Any]) -> MakeSource:
    """`make_source(quick_gelu=..., **vision)`: open_clip's model of that configuration, nothing in it trivial."""

    def make(*, quick_gelu: bool = False, seed: int = 0, **vision: Any) -> CLIP:
        changed: dict[str, Any] = {**deepcopy(config), "quick_gelu": quick_gelu}
        changed["vision_cfg"] |= vision
        model = build_open_clip(changed, seed=seed)
        assert isinstance(model, CLIP)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                # gains, biases, LayerScales: a mistake in ones and zeros would not show
                if parameter.ndim == 1:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
        return model.eval()

    return make


@pytest.fixture
def source(make_source: MakeSource) -> CLIP:
    return make_source()


@pytest.fixture(autouse=True)
def known(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """ViT-mini-8 is a name without a `-quickgelu` twin."""
    quick = config | {"quick_gelu": True}
    for name, entry in (("ViT-tiny-8", config), ("ViT-tiny-8-quickgelu", quick), ("ViT-mini-8", config)):
        monkeypatch.setitem(factory._MODEL_CONFIGS, name, entry)


@pytest.fixture
def tagged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: CLIP) -> Callable[..., Path]:
    """`tagged("openai", quick_gelu=True)` gives both ViT-tiny-8 this pretrained tag, of a file already fetched."""

    def tag(name: str, **facts: Any) -> Path:
        path = tmp_path / f"{name}.pt"
        torch.save(source.state_dict(), path)
        tags = {name: {"file": str(path), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), **facts}}
        for model in ("ViT-tiny-8", "ViT-tiny-8-quickgelu"):
            monkeypatch.setitem(open_clip.pretrained._PRETRAINED, model, tags)
        return path

    return tag
