"""A model that looks at each image of a run once, whoever asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from decompclip.cache.decomposition import Decomposition
from decompclip.cache.maps import Convention
from decompclip.models.clip import HookedCLIP


class Remembering(HookedCLIP):
    """`model` that recalls features and terms of the images that it was told to remember; others it looks at.

    So detectors and repairs share every forward pass of a run, and need not know of each other.

    Attributes:
        looks: images that went through the tower.
    """

    def __init__(self, model: HookedCLIP, *, batch_size: int = 64) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(model.__dict__)  # the same tower, text and words
        self.batch_size = batch_size
        self.looks = 0
        self._places: dict[bytes, tuple[int, int]] = {}
        self._sets: list[Tensor] = []
        self._seen: dict[tuple[int, str], Any] = {}
        self._awake = True

    def remember(self, pixels: Float[Tensor, "image 3 h w"]) -> None:
        """Images in [0, 1] that are asked for again and again; they are looked at when they are first asked for."""
        images = self.normalize(pixels)
        for row, key in enumerate(_keys(images)):
            self._places.setdefault(key, (len(self._sets), row))
        self._sets.append(images)

    def terms(self, pixels: Float[Tensor, "image 3 h w"], convention: Convention) -> Decomposition:
        """Terms of unit features."""
        return self.decompose(self.normalize(pixels), convention=convention, normalize=True)

    @torch.no_grad()
    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        recalled = self._recall(images, "features")
        if recalled is None:
            self.looks += len(images)
            return super().encode_image(images, normalize)
        return nn.functional.normalize(recalled, dim=-1) if normalize else recalled

    @torch.no_grad()
    def decompose(
        self,
        images: Tensor,
        *,
        convention: Convention = "centred",
        normalize: bool = False,
        tokens: Any = None,
    ) -> Decomposition:
        recalled = self._recall(images, convention) if normalize and tokens is None else None
        if recalled is None:
            self.looks += len(images)
            return super().decompose(images, convention=convention, normalize=normalize, tokens=tokens)
        return recalled

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """Nothing is recalled: for measurements of time."""
        self._awake = False
        try:
            yield
        finally:
            self._awake = True

    def _recall(self, images: Tensor, kind: str) -> Any:
        """What was seen of these images; None unless they are all of one set."""
        if not (self._awake and len(images)):
            return None
        places = [self._places.get(key) for key in _keys(images)]
        sets = {place[0] if place else None for place in places}
        if len(sets) > 1 or None in sets:
            return None
        (which,) = sets
        assert which is not None
        return self._whole(which, kind)[[place[1] for place in places if place]]

    def _whole(self, which: int, kind: str) -> Any:
        """All that was seen of a set."""
        if (which, kind) not in self._seen:
            parts = self._sets[which].split(self.batch_size)
            self.looks += len(self._sets[which])
            if kind == "features":
                seen: Any = torch.cat([HookedCLIP.encode_image(self, part) for part in parts])
            else:
                seen = Decomposition.cat(
                    [HookedCLIP.decompose(self, part, convention=kind, normalize=True) for part in parts]  # pyright: ignore[reportArgumentType]
                )
            self._seen[which, kind] = seen
        return self._seen[which, kind]


def _keys(images: Tensor) -> Iterator[bytes]:
    for image in images.detach().cpu().contiguous().numpy():
        yield blake2b(image.tobytes(), digest_size=16).digest()
