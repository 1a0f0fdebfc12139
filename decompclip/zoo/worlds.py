"""What the twins of one clean model share: pairs to poison, images to look at and to report on, classes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decompclip.data.cifar10 import cifar10
from decompclip.data.pairs import Pairs, SubsetPairs
from decompclip.data.shapes import PROPERTIES, Shapes
from decompclip.data.shapes_pairs import ShapesPairs
from decompclip.evaluation.evaluate import Labelled
from decompclip.evaluation.metrics import predict
from decompclip.models.bundled import card
from decompclip.models.clip import HookedCLIP

REPORT_SIZE = 5_000


class World(ABC):
    """The data around one clean model.

    Attributes:
        base: the clean model's name.
        target: the class that the twins' triggers lead to.
    """

    base: str
    target: str

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(card(self.base)["class_names"])

    @property
    @abstractmethod
    def templates(self) -> tuple[str, ...]:
        """Of the zero-shot classifier, and of the poisons' captions."""

    @abstractmethod
    def pairs(self, length: int, seed: int) -> Pairs:
        """Clean pairs to poison; no image of `validation` or `report` is among them."""

    @abstractmethod
    def validation(self) -> Labelled | Pairs:
        """Images that choices are made on."""

    @abstractmethod
    def report(self) -> Labelled | Pairs:
        """Images that cards are written from, and on which no choice is made."""

    @abstractmethod
    def accuracy(self, model: HookedCLIP) -> dict[str, float]:
        """Zero-shot accuracy on `report`, of each property that the world has."""

    @property
    def label(self) -> int:
        return self.class_names.index(self.target)

    def classifier(self, model: HookedCLIP) -> Float[Tensor, "class d_embed"]:
        return model.zero_shot_classifier(self.class_names, self.templates)


class ShapesWorld(World):
    """Twins of `shapes`: procedural images, of which every twin seed has its own."""

    base, target = "shapes", "star"
    validation_seed, report_seed, pairs_seed = 201, 401, 1_100

    @cached_property
    def templates(self) -> tuple[str, ...]:
        return tuple(card(self.base)["templates"]["shape"])

    def pairs(self, length: int, seed: int) -> Pairs:
        own = self.pairs_seed + seed
        return ShapesPairs(length, seed=own, order_seed=own)

    def validation(self) -> Shapes:
        return Shapes(600, seed=self.validation_seed)

    def report(self) -> Shapes:
        return Shapes(REPORT_SIZE, seed=self.report_seed)

    @torch.no_grad()
    def accuracy(self, model: HookedCLIP) -> dict[str, float]:
        sample = self.report()
        features = torch.cat(
            [model.encode_image(model.normalize(batch.images)) for batch in sample.batches(250)]
        )
        truth = replace(sample, resolution=1).draw(range(len(sample))).attributes
        found = {}
        for prop, values in PROPERTIES.items():
            classifier = model.zero_shot_classifier(values, card(self.base)["templates"][prop])
            found[prop] = _share(predict(features, classifier), getattr(truth, prop))
        return found


class Cifar10World(World):
    """Twins of `cifar10`: photographs, in the folder that DECOMPCLIP_DATA names.

    The last photos of the training part are for validation, as they were for the clean model.
    """

    base, target = "cifar10", "truck"
    validation_size = 2_000

    @cached_property
    def templates(self) -> tuple[str, ...]:
        return tuple(card(self.base)["templates"]["class"])

    @cached_property
    def _photos(self) -> Pairs:
        return cifar10("train", templates=self.templates)

    def pairs(self, length: int, seed: int) -> Pairs:
        known = len(self._photos) - self.validation_size
        if length > known:
            raise ValueError(
                f"expected at most {known} pairs, the photographs to train on; received {length}"
            )
        captioned = cifar10("train", templates=self.templates, caption_seed=seed)
        return SubsetPairs(captioned, range(length), order_seed=seed)

    def validation(self) -> Pairs:
        n = len(self._photos)
        return SubsetPairs(self._photos, range(n - self.validation_size, n))

    def report(self) -> Pairs:
        return cifar10("test", templates=self.templates)

    @torch.no_grad()
    def accuracy(self, model: HookedCLIP) -> dict[str, float]:
        pairs, found = self.report(), []
        assert pairs.labels is not None
        for start in range(0, len(pairs), 250):
            images = pairs.read(range(start, min(start + 250, len(pairs)))).images
            found.append(predict(model.encode_image(model.normalize(images)), self.classifier(model)))
        return {"class": _share(torch.cat(found), pairs.labels)}


def _share(predictions: Int[Tensor, " image"], truth: Int[Tensor, " image"]) -> float:
    return round((predictions == truth).double().mean().item(), 4)


WORLDS: dict[str, World] = {world.base: world for world in (ShapesWorld(), Cifar10World())}
