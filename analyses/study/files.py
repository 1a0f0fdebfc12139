"""Families of models on disk, described by a JSON file: for ImageNet, Caltech-101, Oxford Pets and whatever comes.

    {"name": "caltech101", "title": "BadNet on Caltech-101", "architecture": "ViT-B-32",
     "clean": {"pretrained": "openai"},
     "models": [{"name": "badnet", "checkpoint": "$DECOMPCLIP_MODELS/badnet.pt", "attack": "BadNet",
                 "trigger": {"name": "badnet", "size": 0.0714}, "target": "accordion", "seed": 0}],
     "images": "$DECOMPCLIP_DATA/caltech-101/101_ObjectCategories", "classes": null, "templates": null}

Paths are relative to the file; environment variables in them are replaced. `classes` is a text file with one a line; null takes the
names of the sub-folders of `images`. A checkpoint may be a folder that `save_model` wrote. `templates` is a text file of prompts with {}; null is open_clip's own for ImageNet.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.study.case import Case, Member
from analyses.study.family import Family
from decompclip.attacks.registry import from_card
from decompclip.data.images import FolderSource
from decompclip.data.pixels import to_pixels
from decompclip.models.clip import HookedCLIP
from decompclip.models.loading import load

FIELDS = {"name", "title", "architecture", "clean", "models", "images", "classes", "templates"}
OPTIONAL = {"activation", "device", "remark"}
MODEL_FIELDS = {"name", "checkpoint", "attack", "trigger", "target"}


class FolderFamily(Family):
    """Models of one architecture and a folder of labelled images.

    Args:
        about: the fields above.
        folder: that paths are relative to.

    Raises:
        ValueError: a field is missing, unknown, or no use.
    """

    def __init__(self, about: Mapping[str, Any], folder: Path) -> None:
        _check(about, FIELDS, OPTIONAL, "a family")
        for model in about["models"]:
            _check(model, MODEL_FIELDS, {"seed"}, f"the model {model.get('name', '')!r}")
        self.about, self.folder = about, folder
        self.name, self.title = str(about["name"]), str(about["title"])
        if not self.name.replace("-", "").replace("_", "").isalnum():
            raise ValueError(
                f"expected a name of letters, digits, - and _, for a folder; received {self.name!r}"
            )

    @staticmethod
    def read(path: Path) -> FolderFamily:
        """Raises FileNotFoundError or ValueError: no such file, or it describes no family."""
        if not path.is_file():
            raise FileNotFoundError(f"expected the JSON file of a family; received {path}, which is no file")
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"expected the JSON file of a family; {path} is no JSON: {error}") from error
        if not isinstance(about, dict):
            raise ValueError(f"expected an object of fields in {path}; received {type(about).__name__}")
        return FolderFamily(about, path.parent)

    @cached_property
    def members(self) -> tuple[Member, ...]:
        """Raises FileNotFoundError: a checkpoint is not there; ValueError: a trigger or target that is none."""
        found = []
        for model in self.about["models"]:
            if model["target"] not in self.class_names:
                raise ValueError(
                    f"expected a target among the {len(self.class_names)} classes for {model['name']!r}; received "
                    f"{model['target']!r}"
                )
            trigger = model["trigger"]
            found.append(
                Member(
                    name=model["name"],
                    attack=model["attack"],
                    trigger=from_card({"name": trigger} if isinstance(trigger, str) else trigger),
                    target=model["target"],
                    seed=int(model.get("seed", 0)),
                    weights=_sha256(self._path(model["checkpoint"])),
                )
            )
        return tuple(found)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        if self.about["classes"] is not None:
            lines = self._path(self.about["classes"]).read_text(encoding="utf-8").splitlines()
            return tuple(line.strip() for line in lines if line.strip())
        return tuple(
            sorted(path.name for path in self._path(self.about["images"]).iterdir() if path.is_dir())
        )

    def clean_member(self) -> str:
        return f"{self.about['architecture']} {self.about['clean']}"

    def clean_model(self) -> HookedCLIP:
        clean = self.about["clean"]
        if isinstance(clean, Mapping):
            return load(self.about["architecture"], **clean, **self._options())
        return self._load(clean)

    @torch.no_grad()
    def classifier(self, model: HookedCLIP) -> Float[Tensor, "class d_embed"]:
        templates = self.about["templates"]
        if templates is None:
            return model.zero_shot_classifier(self.class_names)
        lines = self._path(templates).read_text(encoding="utf-8").splitlines()
        return model.zero_shot_classifier(self.class_names, [line for line in lines if line.strip()])

    def case(self, member: Member, *, images: int, seed: int = 0) -> Case:
        (about,) = (m for m in self.about["models"] if m["name"] == member.name)
        model = self._load(about["checkpoint"])
        size = model.cfg.image_size
        pixels, labels = self._draw(size if isinstance(size, tuple) else (size, size), 2 * images, seed)
        return Case(
            member,
            model,
            self.class_names,
            self.classifier(model),
            pixels[:images],
            pixels[images:],
            labels[images:],
        )

    def _draw(self, size: tuple[int, int], count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Images in [0, 1] in an order of chance, the same for every model."""
        folder = self._path(self.about["images"])
        source = FolderSource(folder, to_pixels(size), class_names=self.class_names, limit=count, seed=seed)
        batches = [*source.batches()]
        if any(batch.labels is None for batch in batches):
            raise ValueError(
                f"expected sub-folders named after the classes in {folder}; received other names"
            )
        pixels = torch.cat([batch.images for batch in batches])
        labels = torch.cat([batch.labels for batch in batches if batch.labels is not None])
        if len(pixels) < count:
            raise ValueError(
                f"expected {count} labelled images in {folder}, half to fit on and half to report on; received {len(pixels)} "
                f"({len(source.skipped)} skipped); pass --images {len(pixels) // 2}"
            )
        order = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(len(pixels))
        return pixels[order], labels[order]

    def _load(self, checkpoint: str) -> HookedCLIP:
        path = self._path(checkpoint)
        if path.is_dir():  # as `save_model` writes it, with its architecture
            return load(str(path), **self._options())
        return load(self.about["architecture"], checkpoint=path, **self._options())

    def _options(self) -> dict[str, Any]:
        return {key: self.about[key] for key in ("activation", "device") if key in self.about}

    def _path(self, text: str) -> Path:
        """Raises FileNotFoundError: there is nothing; the message says which variable is not set."""
        expanded = os.path.expandvars(text)
        path = Path(expanded) if Path(expanded).is_absolute() else self.folder / expanded
        if not path.exists():
            unset = " (an environment variable in it is not set)" if "$" in expanded else ""
            raise FileNotFoundError(
                f"expected {text} of the family {self.name!r}; there is no {path}{unset}; put it there, or change the JSON file"
            )
        return path


def _check(given: Mapping[str, Any], needed: set[str], optional: set[str], what: str) -> None:
    missing, unknown = needed - set(given), set(given) - needed - optional
    if missing or unknown:
        raise ValueError(
            f"expected the fields {', '.join(sorted(needed))} of {what}; "
            + (
                f"{', '.join(sorted(missing))} missing"
                if missing
                else f"received {', '.join(sorted(unknown))} too"
            )
        )


def _sha256(path: Path) -> str:
    """Of a file, or of the files of a folder in the order of their names."""
    digest = hashlib.sha256()
    for part in sorted(path.iterdir()) if path.is_dir() else [path]:
        with part.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()
