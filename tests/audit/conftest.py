"""A small CLIP with random weights, written and loaded as the bundled models are; and audits with drawn answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from decompclip.attacks.patch import BadNet
from decompclip.audit import AuditConfig, AuditResult, run_audit
from decompclip.audit.checks import Scorer, Setting
from decompclip.audit.collect import open_source
from decompclip.data.shapes import CONTEXT_LENGTH, PROPERTIES, vocabulary
from decompclip.models import bundled as zoo
from decompclip.models.clip import HookedCLIP
from decompclip.models.loading import load
from decompclip.models.text import WordTokenizer

TOKENIZER = WordTokenizer(vocabulary(), CONTEXT_LENGTH)
ARCHITECTURE = {
    "embed_dim": 16,
    "quick_gelu": False,
    "vision_cfg": {"layers": 3, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 24},
    "text_cfg": {
        "context_length": CONTEXT_LENGTH,
        "vocab_size": TOKENIZER.vocab_size,
        "width": 16,
        "heads": 2,
        "layers": 1,
    },
}


def write_random(name: str, seed: int, folder: Path) -> None:
    """A model of random weights; those of a name that has a dash carry a card of BadNet's trigger."""
    model = zoo.build_open_clip(ARCHITECTURE, seed=seed)
    trigger = BadNet(size=1 / 3, place="centre").card()
    card = {
        "name": name,
        "architecture": ARCHITECTURE,
        "tokenizer": {"words": list(TOKENIZER.words), "context_length": CONTEXT_LENGTH},
        "preprocess": {"mean": [0.5] * 3, "std": [0.25] * 3, "size": 24, "interpolation": "bicubic"},
        "templates": {"shape": ["a {}"]},
        "class_names": list(PROPERTIES["shape"]),
        "backdoor": {"target": "star", "trigger": trigger} if "-" in name else None,
    }
    zoo.write_bundled(model, card, folder)


@pytest.fixture
def random_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for the bundled models: `shapes` and `shapes-badnet`, of random weights."""
    folder = tmp_path / "weights"
    write_random("shapes", 0, folder)
    write_random("shapes-badnet", 1, folder)
    for function in (zoo.bundled, zoo.card, zoo.load_bundled):
        if function.__kwdefaults__:
            monkeypatch.setitem(function.__kwdefaults__, "folder", folder)
        else:
            monkeypatch.setattr(function, "__defaults__", (folder,))
    return folder


@pytest.fixture
def model(random_zoo: Path) -> HookedCLIP:
    return load("shapes-badnet")


def setting(
    success: float, control: float, *, labelled: bool = True, images: int = 400, accuracy: float = 0.9
) -> Setting:
    """Of images of three other classes these shares are taken for class 3 of 12."""
    labels, places = torch.arange(images) % 3, torch.arange(images)

    def answers(part: float, right: float) -> torch.Tensor:
        other = torch.where(places.flip(0) < images * (1 - right), (labels + 1) % 3, labels)
        return torch.where(places < round(part * images), torch.full_like(labels, 3), other)

    known = labels if labelled else None
    return Scorer(known, known, 3, 12)("a setting", answers(control, accuracy), answers(success, 1.0))


@pytest.fixture
def made(model: HookedCLIP) -> AuditResult:
    """An audit of the small model, as if of 400 images; its settings are to be replaced."""
    clean, suspect = (
        open_source(spec, model, PROPERTIES["shape"], limit=40) for spec in ("shapes", "shapes:badnet")
    )
    found = run_audit(model, clean, suspect, PROPERTIES["shape"], target="star", config=AuditConfig(zeta=2))
    return replace(found, counts={"validation": 100, "clean": 400, "suspect": 400, "held_out": 0})
