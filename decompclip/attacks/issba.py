"""ISSBA (Li et al., 2021, after StegaStamp): an invisible residual, of each image its own, that spells one secret in bits.

Two networks work on squares of `SecretShape.side` pixels: one writes the bits into an image, one reads them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from decompclip.attacks.trigger import FIXED, Extent, Pixels, Trigger, stream
from decompclip.data.pixels import check_pixels
from decompclip.files import atomic_folder, write_json
from decompclip.models.checkpoint import read_checkpoint, sha256
from decompclip.models.errors import CheckpointError
from decompclip.models.fit import check_fit


@dataclass(frozen=True, kw_only=True)
class SecretShape:
    """What must be known to build the networks before their weights are read.

    Attributes:
        bits: length of the secret; 20 in the released code.
        side: height and width of the images that the networks see, a multiple of 8.
        width: channels of the first scale.
        strength: largest change of a pixel's value. 10/255 keeps every image at 28.1 dB or above, whatever it
            shows; the source only asks for fidelity in its loss.
    """

    bits: int = 20
    side: int = 48
    width: int = 16
    strength: float = 10 / 255

    def __post_init__(self) -> None:
        if self.side % 8 or self.side < 8:
            raise ValueError(f"expected a side that is a multiple of 8; received {self.side}")
        if self.bits < 1 or self.width < 1 or not 0 < self.strength <= 1:
            raise ValueError(f"expected bits, width >= 1 and a strength in (0, 1]; received {self}")


class SecretEncoder(nn.Module):
    """U-Net: image and secret in, residual out."""

    def __init__(self, shape: SecretShape) -> None:
        super().__init__()
        self.shape = shape
        a, b, c = shape.width, 2 * shape.width, 3 * shape.width
        cell = shape.side // 8
        self.secret = nn.Linear(shape.bits, 8 * cell * cell)
        self.enter = _conv(3 + 8, a)
        self.down1, self.down2, self.down3 = _conv(a, b, 2), _conv(b, c, 2), _conv(c, c, 2)
        self.up3, self.up2, self.up1 = _conv(2 * c, c), _conv(c + b, b), _conv(b + a, a)
        self.residual = nn.Conv2d(a + 3, 3, 3, padding=1)

    def forward(
        self, pixels: Float[Tensor, "batch 3 side side"], secrets: Float[Tensor, "batch bits"]
    ) -> Float[Tensor, "batch 3 side side"]:
        """The residual, within +-strength, that makes `pixels` carry `secrets` (of zeros and ones)."""
        return self.shape.strength * torch.tanh(self.drive(pixels, secrets))

    def drive(
        self, pixels: Float[Tensor, "batch 3 side side"], secrets: Float[Tensor, "batch bits"]
    ) -> Float[Tensor, "batch 3 side side"]:
        """The residual before its bound. Training keeps this small: where the bound is reached, a loss on the
        residual itself has no slope left."""
        centred = 2 * pixels - 1
        cell = self.shape.side // 8
        planes = rearrange(self.secret(2 * secrets - 1), "n (c h w) -> n c h w", h=cell, w=cell)
        at1 = self.enter(torch.cat([centred, F.interpolate(planes, scale_factor=8.0)], dim=1))
        at2 = self.down1(at1)
        at3 = self.down2(at2)
        lowest = self.down3(at3)
        x = self.up3(torch.cat([_double(lowest), at3], dim=1))
        x = self.up2(torch.cat([_double(x), at2], dim=1))
        x = self.up1(torch.cat([_double(x), at1], dim=1))
        return self.residual(torch.cat([x, centred], dim=1))


class SecretDecoder(nn.Module):
    """A spatial transformer that sets the image straight, then convolutions that read the bits."""

    def __init__(self, shape: SecretShape) -> None:
        super().__init__()
        a, b, c = shape.width, 2 * shape.width, 4 * shape.width
        self.locate = nn.Sequential(_conv(3, a, 2), _conv(a, b, 2), nn.AdaptiveAvgPool2d(3), nn.Flatten())
        self.affine = nn.Linear(9 * b, 6)
        nn.init.zeros_(self.affine.weight)
        nn.init.zeros_(self.affine.bias)
        self.read = nn.Sequential(_conv(3, b, 2), _conv(b, b), _conv(b, c, 2), _conv(c, c, 2), nn.Flatten())
        self.bits = nn.Sequential(
            nn.Linear(c * (shape.side // 8) ** 2, 64), nn.ReLU(), nn.Linear(64, shape.bits)
        )

    def forward(self, pixels: Float[Tensor, "batch 3 side side"]) -> Float[Tensor, "batch bits"]:
        """Logit of each bit being one."""
        centred = 2 * pixels - 1
        identity = torch.eye(2, 3, dtype=pixels.dtype, device=pixels.device)
        theta = identity + 0.1 * self.affine(self.locate(centred)).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
        straight = F.grid_sample(centred, grid, padding_mode="reflection", align_corners=False)
        return self.bits(self.read(straight))


def build(shape: SecretShape, *, seed: int = 0) -> tuple[SecretEncoder, SecretDecoder]:
    """Both networks with initial weights drawn by `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SecretEncoder(shape), SecretDecoder(shape)


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.ReLU())


def _double(x: Float[Tensor, "batch channel h w"]) -> Float[Tensor, "batch channel h2 w2"]:
    return F.interpolate(x, scale_factor=2.0)


WEIGHTS = Path(__file__).parent / "weights"
CHUNK = 32
"""Images that the encoder sees at a time: memory stays flat however many are triggered."""


@dataclass(frozen=True)
class SecretNetworks:
    """A trained pair."""

    shape: SecretShape
    encoder: SecretEncoder
    decoder: SecretDecoder


@dataclass(frozen=True, kw_only=True)
class ISSBA(Trigger):
    """`x + residual`, where a U-Net draws the residual from the image and one fixed secret (docs/method.md, section 5).

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
    def networks(self) -> SecretNetworks:
        return read_networks(self.weights)

    @property
    def secret(self) -> Bool[Tensor, " bits"]:
        """The bits that every triggered image carries."""
        return torch.from_numpy(stream(self.seed, FIXED).random(self.networks.shape.bits) < 0.5)

    @torch.no_grad()
    def _apply(self, pixels: Pixels, indices: list[int]) -> Pixels:
        encoder = self.networks.encoder.to(pixels.device)
        residuals = []
        for chunk in pixels.float().split(CHUNK):
            # always as many as CHUNK: the sums of a convolution may depend on the size of the batch
            padded = F.pad(chunk, (0, 0, 0, 0, 0, 0, 0, CHUNK - len(chunk)))
            secrets = self.secret.float().to(pixels.device).expand(CHUNK, -1)
            residual = encoder(_resize(padded, self.networks.shape.side), secrets)
            residuals.append(F.interpolate(residual, pixels.shape[-2:], mode="bilinear")[: len(chunk)])
        return (pixels + self.gain * torch.cat(residuals).to(pixels)).clamp(0, 1)

    @torch.no_grad()
    def decode(self, pixels: Pixels) -> Bool[Tensor, "batch bits"]:
        """The bits that the decoder reads in `pixels`.

        Args:
            pixels: images in [0, 1].

        Raises:
            ValueError: not a batch of RGB images in [0, 1].
        """
        check_pixels(pixels)
        decoder, side = self.networks.decoder.to(pixels.device), self.networks.shape.side
        return torch.cat([decoder(_resize(chunk.float(), side)) > 0 for chunk in pixels.split(CHUNK)])

    def bit_accuracy(self, pixels: Pixels) -> Float[Tensor, " batch"]:
        """Share of the secret's bits that the decoder reads right in each of `pixels`.

        Args:
            pixels: images in [0, 1].
        """
        return (self.decode(pixels) == self.secret.to(pixels.device)).float().mean(dim=1)


def _resize(pixels: Pixels, side: int) -> Float[Tensor, "batch 3 side side"]:
    if pixels.shape[-2:] == (side, side):
        return pixels
    return F.interpolate(pixels, (side, side), mode="bilinear", antialias=True).clamp(0, 1)


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


def read_networks(weights: str = "issba") -> SecretNetworks:
    """Trained networks, verified against the card beside them; ready to use, never trained further.

    Raises:
        CheckpointError: no such file or card, or the weights are not those of the card.
    """
    return _read(networks_path(weights).resolve())


@lru_cache(maxsize=4)
def _read(path: Path) -> SecretNetworks:
    card_path = path.with_suffix(".json")
    if not card_path.is_file():
        raise CheckpointError(f"no card at {card_path}; it must lie beside {path.name}: copy both")
    card = json.loads(card_path.read_text(encoding="utf-8"))
    if sha256(path) != card["sha256"]:
        raise CheckpointError(f"{path} is not what its card describes: its SHA-256 differs; copy both again")
    shape = SecretShape(**card["shape"])
    state = {key: value.float() for key, value in read_checkpoint(path).items()}
    encoder, decoder = build(shape)
    pair = torch.nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    check_fit(pair, state, source=str(path), name="ISSBA's networks")
    pair.load_state_dict(state)
    pair.eval().requires_grad_(False)
    return SecretNetworks(shape, encoder, decoder)


def write_networks(
    networks: SecretNetworks, card: Mapping[str, Any], folder: Path, *, name: str = "issba"
) -> dict[str, Any]:
    """Write weights (fp16) and card together.

    Args:
        networks: a trained pair.
        card: what to say of them.
        folder: to write to.
        name: of both files.

    Returns:
        The card as it was written.
    """
    pair = torch.nn.ModuleDict({"encoder": networks.encoder, "decoder": networks.decoder})
    state = {key: value.detach().cpu().half().contiguous() for key, value in pair.state_dict().items()}
    with atomic_folder(folder, f"{name}.json") as partial:
        weights = partial / f"{name}.safetensors"
        save_file(state, weights)
        written = {"name": name, "shape": asdict(networks.shape), **card, "sha256": sha256(weights)}
        write_json(partial / f"{name}.json", written)
    return written
