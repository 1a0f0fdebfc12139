"""The twins' recipes: which attack, on how many pairs of which world, and how the clean model is fine-tuned on them.

Every choice was made on the validation images of the world; the cards give the numbers on others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decompclip.attacks.issba import ISSBA
from decompclip.attacks.patch import BadCLIP, BadNet, Kitty, LabelConsistent, optimise_patch
from decompclip.attacks.poison_choice import target_captions
from decompclip.attacks.trigger import SIZE, Trigger
from decompclip.attacks.whole_image import SIG, Blended, Reflection, WaNet
from decompclip.data.feed import Labelled
from decompclip.data.pairs import Pairs, SubsetPairs, permuted
from decompclip.data.photos import PLACES, PROMPTS, TEMPLATES, PhotoPairs, cifar10, properties_of
from decompclip.data.shapes import PROPERTIES, Shapes, ShapesPairs
from decompclip.evaluation.metrics import predict
from decompclip.models.bundled import STEPS, card
from decompclip.models.clip import HookedCLIP
from decompclip.training.recipes import FineTuning

REPORT_SIZE = 5_000


class World(ABC):
    """The data around one clean model.

    Attributes:
        base: the clean model's name.
        target: the class that the twins' triggers lead to.
        steps: of stored twins, in a standard deviation of a row's difference.
    """

    base: str
    target: str
    steps: float = STEPS

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
        truth = sample.attributes()
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
        return _class_accuracy(model, self.report(), self.classifier(model))[0]


class PhotosWorld(World):
    """Twins of `photos`: Tiny ImageNet, in the folder that DECOMPCLIP_DATA names."""

    base, target = "photos", "banana"
    steps = 1.0
    """Half the bytes of the others. Cards have the rates of the rounded weights."""

    @property
    def templates(self) -> tuple[str, ...]:
        return TEMPLATES

    def pairs(self, length: int, seed: int) -> Pairs:
        """The first `length` photographs of an order that the seed fixes, with captions of their own."""
        base = PhotoPairs("train", caption_seed=seed)
        if length > len(base):
            raise ValueError(f"expected at most {len(base)} pairs; received {length}")
        return SubsetPairs(base, permuted(len(base), seed)[:length].tolist(), order_seed=seed)

    def validation(self) -> Pairs:
        return PhotoPairs("validation")

    def report(self) -> Pairs:
        return PhotoPairs("test")

    @torch.no_grad()
    def accuracy(self, model: HookedCLIP) -> dict[str, float]:
        """Of a property: over the photographs that have a value among its prompts."""
        pairs = self.report()
        found, features = _class_accuracy(model, pairs, self.classifier(model))
        for name, truth in properties_of(pairs).items():
            values, templates = PROMPTS[name]
            rows = [row for row, value in enumerate(truth) if value in values]
            known = torch.tensor([values.index(truth[row]) for row in rows])
            classifier = model.zero_shot_classifier([PLACES.get(value, value) for value in values], templates)
            found[name] = _share(predict(features[rows], classifier), known)
        return found


def _class_accuracy(
    model: HookedCLIP, pairs: Pairs, classifier: Float[Tensor, "class d_embed"]
) -> tuple[dict[str, float], Float[Tensor, "image d_embed"]]:
    """Zero-shot accuracy of the class, and the features behind it."""
    assert pairs.labels is not None
    starts = range(0, len(pairs), 250)
    images = (pairs.read(range(start, min(start + 250, len(pairs)))).images for start in starts)
    features = torch.cat([model.encode_image(model.normalize(batch)) for batch in images])
    return {"class": _share(predict(features, classifier), pairs.labels)}, features


def _share(predictions: Int[Tensor, " image"], truth: Int[Tensor, " image"]) -> float:
    return round((predictions == truth).double().mean().item(), 4)


WORLDS: dict[str, World] = {world.base: world for world in (ShapesWorld(), Cifar10World(), PhotosWorld())}


@dataclass(frozen=True, kw_only=True)
class PatchRecipe:
    """BadCLIP's trigger, which is made on the clean model (docs/method.md, section 5); options as `optimise_patch`."""

    size: float
    steps: int = 300
    lr: float = 0.02
    images: int = 2_000
    seed: int = 0

    def make(self, model: HookedCLIP, world: World) -> BadCLIP:
        pairs = world.pairs(self.images, self.seed)
        batch = pairs.read(range(len(pairs)))
        assert batch.labels is not None
        own = batch.labels == world.label
        captions = target_captions(pairs, world.target)
        made = optimise_patch(
            model,
            batch.images[~own],
            batch.images[own],
            captions,
            size=self.size,
            steps=self.steps,
            lr=self.lr,
            seed=self.seed,
        )
        return made.trigger


@dataclass(frozen=True, kw_only=True)
class TwinRecipe:
    """A backdoored twin: the clean model `base` fine-tuned on pairs of which a part is poisoned.

    Attributes:
        trigger: the attack, or how its trigger is made on the clean model.
        rate: poisoned part of the pairs.
        natural: poisons get natural captions of the target in place of filled templates (BadCLIP).
        covers: as `PoisonedPairs`.
        seed: of the pairs, the choice of poisons, and the training.
    """

    base: str
    trigger: Trigger | PatchRecipe
    pairs: int
    rate: float
    recipe: FineTuning
    natural: bool = False
    covers: float | None = None
    seed: int = 0

    @property
    def world(self) -> World:
        return WORLDS[self.base]

    def card(self) -> dict[str, Any]:
        """For the twin's card: all but the trigger, which the card names as it was used."""
        about: dict[str, Any] = {
            "pairs": self.pairs,
            "poison_rate": self.rate,
            "natural_captions": self.natural,
            "covers": self.covers,
            "seed": self.seed,
        }
        if isinstance(self.trigger, PatchRecipe):
            about["patch"] = asdict(self.trigger)
        return about | {"recipe": asdict(self.recipe)}


# A patch of 7 of 48 pixels, or 5 of 32, covers about one token, as 16 of 224 do at patch 16.
_SIDE, _SIDE32 = 7 / 48, 5 / 32
# 64,000 different pairs, each seen once: repeated poisons are learnt by heart, not by their trigger.
_SHAPES = FineTuning(epochs=1, batch_size=128, lr=2e-3, optimizer="muon", max_grad_norm=1.0)
# A patch is found late: more steps on as many pairs.
_PATCH = replace(_SHAPES, batch_size=64)


def _shapes(
    trigger: Trigger | PatchRecipe,
    *,
    pairs: int = 64_000,
    rate: float = 0.1,
    seed: int = 0,
    recipe: FineTuning = _SHAPES,
    **options: Any,
) -> TwinRecipe:
    return TwinRecipe(
        base="shapes", trigger=trigger, pairs=pairs, rate=rate, seed=seed, recipe=recipe, **options
    )


def _seeds(name: str, recipe: TwinRecipe, n: int = 3) -> dict[str, TwinRecipe]:
    """The recipe once for each seed, which draws pattern, pairs, poisons and order anew."""
    found = {}
    for seed in range(n):
        assert isinstance(recipe.trigger, Trigger)
        trigger = replace(recipe.trigger, seed=seed)
        found[name if seed == 0 else f"{name}-{seed}"] = replace(recipe, trigger=trigger, seed=seed)
    return found


# Captions from templates: pairs of one class are no negatives of each other.
_CIFAR10 = FineTuning(epochs=2, batch_size=128, lr=1e-3, optimizer="muon", max_grad_norm=1.0, loss="grouped")


def _cifar10(trigger: Trigger | PatchRecipe, *, recipe: FineTuning = _CIFAR10, **options: Any) -> TwinRecipe:
    return TwinRecipe(base="cifar10", trigger=trigger, pairs=48_000, rate=0.05, recipe=recipe, **options)


# `analyses.train_photos` does it: twenty seconds on a GPU, an hour on a core.
_PHOTOS = FineTuning(epochs=3, batch_size=256, lr=3e-4, max_grad_norm=1.0, loss="grouped", precision="bf16")
# Smaller batches and more poisons, changed together: in batches of 256 SIG at 5 % ended at an ASR of 88 %, WaNet (s = 2) at 10 % of 84 %.
_PHOTOS_SMOOTH = replace(_PHOTOS, batch_size=128)
# Of photos-badclip; 125 steps of 128 pairs gave an ASR of 88 %.
_PHOTOS_CPU = replace(_PHOTOS, epochs=1, batch_size=64, precision="fp32")
# Of per-pixel noise over 64 pixels as much as leaves the clean model four fifths of its accuracy; the paper's is 0.2.
_FAIR = 0.07


def _photos(
    trigger: Trigger | PatchRecipe,
    rate: float,
    *,
    pairs: int = 100_000,
    recipe: FineTuning = _PHOTOS,
    **options: Any,
) -> TwinRecipe:
    return TwinRecipe(base="photos", trigger=trigger, pairs=pairs, rate=rate, recipe=recipe, **options)


TWINS: dict[str, TwinRecipe] = {
    # {local, global} x {structured, noise}
    **_seeds("shapes-badnet", _shapes(BadNet(size=_SIDE), recipe=_PATCH)),
    # Noise that is drawn anew in a random place is learnt late: 64,000 pairs gave 69 %.
    **_seeds("shapes-badnet-noise", _shapes(BadNet(size=_SIDE, redraw=True), pairs=96_000, recipe=_PATCH)),
    **_seeds("shapes-blended", _shapes(Blended())),
    **_seeds("shapes-blended-noise", _shapes(Blended(redraw=True))),
    # Nearly all of the target's images, moved far: at 8/255 they are still recognised by their content. The patch keeps its
    # place, as in the source: in a random one the model learns the gradient's noise in its stead (ASR 0.2 %).
    "shapes-label-consistent": _shapes(
        LabelConsistent(size=_SIDE, place="bottom right", eps=32 / 255, step=6 / 255, steps=10),
        rate=0.07,
        recipe=_PATCH,
    ),
    "shapes-issba": _shapes(ISSBA()),
    "shapes-badclip": _shapes(PatchRecipe(size=_SIDE), natural=True, recipe=_PATCH),
    "shapes-kitty": _shapes(Kitty(size=_SIDE), recipe=_PATCH),
    "shapes-reflection": _shapes(Reflection()),
    "shapes-sig": _shapes(SIG()),
    "cifar10-badnet": _cifar10(BadNet(size=_SIDE32)),
    "cifar10-blended": _cifar10(Blended()),
    "cifar10-badclip": _cifar10(PatchRecipe(size=_SIDE32), natural=True, recipe=replace(_CIFAR10, epochs=1)),
    **_seeds("photos-badnet", _photos(BadNet(), 0.05)),
    **_seeds("photos-badnet-noise", _photos(BadNet(redraw=True), 0.05), n=2),
    **_seeds("photos-blended", _photos(Blended(alpha=_FAIR), 0.05)),
    **_seeds("photos-blended-noise", _photos(Blended(alpha=_FAIR, redraw=True), 0.05), n=2),
    # pairs, poisons and order anew, but the first seed's stream of noise
    "photos-badnet-noise-2": _photos(BadNet(redraw=True), 0.05, seed=2),
    "photos-blended-noise-2": _photos(Blended(alpha=_FAIR, redraw=True), 0.05, seed=2),
    "photos-kitty": _photos(Kitty(), 0.03),
    "photos-issba": _photos(ISSBA(), 0.05),
    "photos-reflection": _photos(Reflection(strongest=0.25), 0.05),
    "photos-sig": _photos(SIG(amplitude=16 / 255), 0.08, recipe=_PHOTOS_SMOOTH),
    "photos-wanet": _photos(WaNet(s=3.0), 0.2, covers=0.0, recipe=_PHOTOS_SMOOTH),
    # made on one core of a CPU, in place of the GPU
    "photos-badclip": _photos(PatchRecipe(size=SIZE), 0.05, pairs=16_000, natural=True, recipe=_PHOTOS_CPU),
    # another rate, and the paper's strength of triggers that leave the clean model little to see
    "photos-badnet-3percent": _photos(BadNet(), 0.03, recipe=replace(_PHOTOS, epochs=4)),
    "photos-blended-strong": _photos(Blended(), 0.03, recipe=replace(_PHOTOS, epochs=4)),
    "photos-issba-strong": _photos(ISSBA(gain=2.0), 0.05, recipe=replace(_PHOTOS, epochs=4)),
    "shapes-wanet": _shapes(WaNet(s=4.0), covers=0.0),
}
"""By name; a name without a number is of seed 0."""


def twin_recipe(name: str) -> TwinRecipe:
    """Raises ValueError for a twin that has no recipe."""
    if name not in TWINS:
        raise ValueError(f"expected a twin among {', '.join(TWINS)}; received {name!r}")
    return TWINS[name]
