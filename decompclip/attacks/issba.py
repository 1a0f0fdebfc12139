"""ISSBA (Li et al., 2021): an invisible residual, of each image its own, that spells one secret in bits."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from decompclip.attacks.issba_networks import Decoder, Encoder, Shape, build
from decompclip.attacks.trigger import FIXED, Extent, Trigger, check_pixels, stream
from decompclip.files import atomic_folder, write_json
from decompclip.models.checkpoint import check_fit, read_checkpoint, sha256
from decompclip.models.errors import CheckpointError

WEIGHTS = Path(__file__).parent / "weights"
CHUNK = 32
"""Images that the encoder sees at a time: memory stays flat however many are triggered."""


@dataclass(frozen=True)
class Networks:
    """A trained pair."""

    shape: Shape
    encoder: Encoder
    decoder: Decoder


@dataclass(frozen=True, kw_only=True)
class ISSBA(Trigger):
    """`x + residual`, where a U-Net draws the residual from the image and one fixed secret (METHOD 5).

    The networks see the image at their own size; the residual is brought back to the image's. It differs from image
    to image, but about 60 % of its energy is one pattern that recurs with the secret: `structured`, then,
    although the paper counts this attack as noise.

    Args:
        seed: of the secret.
        gain: the residual times this: less invisible, easier to learn. With the bundled networks, which saw no
            photograph, ImageNet photos at 224 pixels carry 99.7 % of the bits at 37 dB; with a gain of 2, all of
            them at 31 dB.
        weights: a bundled pair of networks (`"issba"`), or the path of a file that `write_networks` wrote.

    Raises:
        ValueError: a gain that is not positive; when used, CheckpointError as `read_networks`.
    """

    name: ClassVar[str] = "issba"
    extent: ClassVar[Extent] = "global"

    gain: float = 1.0
    weights: str = "issba"

    def __post_init__(self) -> None:
        if not 0 < self.gain < math.inf:
            raise ValueError(f"expected a gain above 0; received {self.gain}")

    @cached_property
    def networks(self) -> Networks:
        return read_networks(self.weights)

    @property
    def secret(self) -> Bool[Tensor, " bits"]:
        """The bits that every triggered image carries."""
        return torch.from_numpy(stream(self.seed, FIXED).random(self.networks.shape.bits) < 0.5)

    @torch.no_grad()
    def _apply(
        self, images: Float[Tensor, "batch 3 h w"], indices: Sequence[int]
    ) -> Float[Tensor, "batch 3 h w"]:
        encoder = self.networks.encoder.to(images.device)
        residuals = []
        for chunk in images.float().split(CHUNK):
            # always as many as CHUNK: the sums of a convolution may depend on the size of the batch
            padded = F.pad(chunk, (0, 0, 0, 0, 0, 0, 0, CHUNK - len(chunk)))
            secrets = self.secret.float().to(images.device).expand(CHUNK, -1)
            residual = encoder(_resize(padded, self.networks.shape.side), secrets)
            residuals.append(F.interpolate(residual, images.shape[-2:], mode="bilinear")[: len(chunk)])
        return (
            (images + self.gain * torch.cat(residuals).to(images)).clamp(0, 1)
            if residuals
            else images.clone()
        )

    @torch.no_grad()
    def decode(self, images: Float[Tensor, "batch 3 h w"]) -> Bool[Tensor, "batch bits"]:
        """The bits that the decoder reads in `images`.

        Raises:
            ValueError: not a batch of RGB images in [0, 1].
        """
        check_pixels(images)
        decoder, side = self.networks.decoder.to(images.device), self.networks.shape.side
        return torch.cat([decoder(_resize(chunk.float(), side)) > 0 for chunk in images.split(CHUNK)])

    def bit_accuracy(self, images: Float[Tensor, "batch 3 h w"]) -> Float[Tensor, " batch"]:
        """Share of the secret's bits that the decoder reads right in each of `images`."""
        return (self.decode(images) == self.secret.to(images.device)).float().mean(dim=1)


def _resize(images: Float[Tensor, "batch 3 h w"], side: int) -> Float[Tensor, "batch 3 side side"]:
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True).clamp(0, 1)


def networks_path(weights: str) -> Path:
    """The file that `weights` names: a bundled one, or a path.

    Raises:
        CheckpointError: neither; the bundled ones are listed.
    """
    for path in (WEIGHTS / f"{weights}.safetensors", Path(weights)):
        if path.is_file() and path.suffix == ".safetensors":
            return path
    known = sorted(path.stem for path in WEIGHTS.glob("*.safetensors"))
    raise CheckpointError(
        f"no networks of ISSBA at {weights!r}; expected one of {known} or the path of a .safetensors file beside "
        "its card; `python -m analyses.train_issba` trains them"
    )


def read_networks(weights: str = "issba") -> Networks:
    """Trained networks, verified against the card beside them; ready to use, never trained further.

    Raises:
        CheckpointError: no such file or card, or the weights are not those of the card.
    """
    return _read(networks_path(weights).resolve())


@lru_cache(maxsize=4)
def _read(path: Path) -> Networks:
    card_path = path.with_suffix(".json")
    if not card_path.is_file():
        raise CheckpointError(f"no card at {card_path}; it must lie beside {path.name}: copy both")
    card = json.loads(card_path.read_text(encoding="utf-8"))
    if sha256(path) != card["sha256"]:
        raise CheckpointError(f"{path} is not what its card describes: its SHA-256 differs; copy both again")
    shape = Shape(**card["shape"])
    state = {key: value.float() for key, value in read_checkpoint(path).items()}
    encoder, decoder = build(shape)
    pair = torch.nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    check_fit(pair, state, source=str(path), name="ISSBA's networks")
    pair.load_state_dict(state)
    pair.eval().requires_grad_(False)
    return Networks(shape, encoder, decoder)


def write_networks(
    networks: Networks, card: Mapping[str, Any], folder: Path, *, name: str = "issba"
) -> dict[str, Any]:
    """Write weights (fp16) and card together; returns the card."""
    pair = torch.nn.ModuleDict({"encoder": networks.encoder, "decoder": networks.decoder})
    state = {key: value.detach().cpu().half().contiguous() for key, value in pair.state_dict().items()}
    with atomic_folder(folder, f"{name}.json") as partial:
        weights = partial / f"{name}.safetensors"
        save_file(state, weights)
        written = {"name": name, "shape": asdict(networks.shape), **card, "sha256": sha256(weights)}
        write_json(partial / f"{name}.json", written)
    return written
