"""Families: models that one clean CLIP and one set of attacks gave, and the images that they are looked at with.

`shapes`, `cifar10` and `photos` are bundled; a JSON file describes any other (`analyses.study.files`, `analyses/families/`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.study.case import Case, Member
from decompclip.attacks.registry import from_card
from decompclip.bench.plan import Samples, draw_samples
from decompclip.bench.run import weights_of
from decompclip.models.bundled import bundled, card, load_bundled
from decompclip.models.clip import HookedCLIP
from decompclip.zoo.recipes import WORLDS

LABELS = {
    "badnet": "BadNet",
    "badnet-3percent": "BadNet, 3 %",
    "badnet-noise": "BadNet, noise",
    "blended": "Blended",
    "blended-strong": "Blended, 0.2",
    "blended-noise": "Blended, noise",
    "label-consistent": "Label-Consistent",
    "issba": "ISSBA",
    "issba-strong": "ISSBA, gain 2",
    "badclip": "BadCLIP",
    "kitty": "Kitty",
    "reflection": "Reflection",
    "sig": "SIG",
    "wanet": "WaNet",
}
"""Attacks of bundled twins, in the order of figures: as docs/method.md, section 5 lists them. One of your own has its own name."""


class Family(ABC):
    """Models and images; results of a family lie in a folder of its name."""

    name: str
    title: str

    @property
    @abstractmethod
    def members(self) -> tuple[Member, ...]:
        """The backdoored models, attack by attack."""

    @abstractmethod
    def clean_member(self) -> str:
        """Name of the clean model."""

    @abstractmethod
    def clean_model(self) -> HookedCLIP:
        """The model before any attack."""

    @abstractmethod
    def classifier(self, model: HookedCLIP) -> Float[Tensor, "class d_embed"]:
        """Of the family's classes, for one of its models."""

    @abstractmethod
    def case(self, member: Member, *, images: int, seed: int = 0) -> Case:
        """A member, loaded, with `images` clean images to fit on and as many others to report on.

        Raises:
            ValueError: more images than there are.
            FileNotFoundError: weights or images are not where the family says.
        """

    def measured(
        self, members: tuple[Member, ...], config: Any, measure: Callable[[Case, Any], Any]
    ) -> dict[str, Any]:
        """What `measure(case, config)` says of each member, with `config.images` images and `config.seed`; one is held at a time.

        Raises:
            ValueError, FileNotFoundError: as `case`.
        """
        return {
            "models": {
                member.name: measure(self.case(member, images=config.images, seed=config.seed), config)
                for member in members
            }
        }

    def select(self, names: tuple[str, ...] = ()) -> tuple[Member, ...]:
        """Members by model or by attack; all without names.

        Raises:
            ValueError: a name that is none.
        """
        chosen = tuple(m for m in self.members if not names or {m.name, m.attack} & set(names))
        known = {word for m in chosen for word in (m.name, m.attack)}
        if missing := [name for name in names if name not in known]:
            raise ValueError(
                f"expected models or attacks of {self.name}, {', '.join(m.name for m in self.members)}; "
                f"received {missing[0]!r}"
            )
        return chosen


class BundledFamily(Family):
    """A bundled clean model and its twins.

    Raises:
        ValueError: no such clean model.
    """

    def __init__(self, name: str) -> None:
        if name not in WORLDS:
            raise ValueError(f"expected a family of {', '.join(WORLDS)}, or a JSON file; received {name!r}")
        self.name, self.world = name, WORLDS[name]
        self.title = {
            "shapes": "twins of shapes (procedural images, 48 px, 1.7 M parameters)",
            "cifar10": "twins of cifar10 (photographs, 32 px, 1.7 M parameters)",
            "photos": "twins of photos (photographs of 200 classes, 64 px, 7.3 M parameters)",
        }[name]

    @property
    def members(self) -> tuple[Member, ...]:
        found = []
        for twin in bundled():
            backdoor = card(twin)["backdoor"]
            if backdoor is None or card(twin)["training"]["base"] != self.name:
                continue
            seed = card(twin)["training"]["seed"]
            kind = twin.removeprefix(f"{self.name}-").removesuffix(f"-{seed}" if seed else "")
            found.append(
                Member(
                    name=twin,
                    attack=LABELS.get(kind, kind),
                    trigger=from_card(backdoor["trigger"]),
                    target=backdoor["target"],
                    seed=seed,
                    weights=weights_of(twin),
                )
            )
        order = [*LABELS.values(), *sorted({m.attack for m in found} - {*LABELS.values()})]
        return tuple(sorted(found, key=lambda m: (order.index(m.attack), m.seed)))

    def clean_member(self) -> str:
        return self.name

    def clean_model(self) -> HookedCLIP:
        return load_bundled(self.name)

    @torch.no_grad()
    def classifier(self, model: HookedCLIP) -> Float[Tensor, "class d_embed"]:
        return self.world.classifier(model)

    def case(self, member: Member, *, images: int, seed: int = 0) -> Case:
        samples, model = self.samples(images, seed), load_bundled(member.name)
        return Case(
            member,
            model,
            self.world.class_names,
            self.classifier(model),
            samples.fit,
            samples.clean,
            samples.labels,
        )

    def samples(self, images: int, seed: int) -> Samples:
        """Streams that no twin was trained on, and no choice made: those of the leaderboard."""
        return draw_samples(self.world, images=images, seed=seed)


def open_family(name: str) -> Family:
    """The bundled family of that name, or the one that a JSON file describes.

    Raises:
        ValueError, FileNotFoundError: neither.
    """
    if name.endswith(".json"):
        from analyses.study.files import FolderFamily

        return FolderFamily.read(Path(name))
    return BundledFamily(name)
