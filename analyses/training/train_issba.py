"""Train ISSBA's encoder and decoder (docs/method.md, section 5; Li et al., 2021), and write them into the package.

Command:   python -m analyses.train_issba          (a killed run resumes and ends with the same bytes)
Run time:  about 12 minutes, one thread on an idle core; the card's 21 were on a shared one.
Writes:    decompclip/attacks/weights/issba.safetensors and issba.json, the card with the numbers.

The images are drawn, not read: half of them from the Shapes world, half textures of coloured 1/f noise, whose
spectra are those of photographs. Between encoder and decoder some are shifted, turned and scaled a little,
which is what the decoder's spatial transformer is for.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from decompclip.attacks.issba import WEIGHTS, SecretNetworks, SecretShape, build, write_networks
from decompclip.attacks.preview import psnr, ssim
from decompclip.data.shapes import draw
from decompclip.training.loop import Recipe, train

REPORT_SEED = 451
"""Stream of the images that the reported numbers are measured on."""


@dataclass(frozen=True)
class Config:
    """What a training depends on."""

    shape: SecretShape = field(default_factory=SecretShape)
    recipe: Recipe = field(default_factory=lambda: Recipe(samples=128_000, batch_size=32, lr=2e-3))
    seed: int = 0
    fidelity: float = 0.1
    """Weight of the squared residual (before its bound, which is one); it rises to this from zero."""
    quiet: float = 0.1
    """Share of the training before the fidelity counts: the bits must be readable first."""
    report_size: int = 1_000
    checkpoint_every: int = 100

    def fidelity_at(self, step: int) -> float:
        done = step / self.recipe.steps
        return self.fidelity * min(1.0, max(0.0, (done - self.quiet) / 0.4))


def batch(step: int, size: int, *, seed: int, side: int) -> Float[Tensor, "batch 3 side side"]:
    """Training images of one step: half Shapes, half textures."""
    world = draw(range(step * (size // 2), (step + 1) * (size // 2)), seed=seed, resolution=side).images
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    return torch.cat([world, textures(size - size // 2, side, generator)])


def textures(count: int, side: int, generator: torch.Generator) -> Float[Tensor, "batch 3 side side"]:
    """Coloured noise of a power spectrum 1/f^2a, a between 0.3 and 2, with random mean and contrast."""
    u = torch.rand(count, 3, 1, 1, generator=generator)
    fy, fx = torch.meshgrid(torch.fft.fftfreq(side), torch.fft.rfftfreq(side), indexing="ij")
    radius = (fx**2 + fy**2).sqrt().clamp_min(1 / side)
    white = torch.randn(count, 3, side, side, generator=generator)
    noise = torch.fft.irfft2(torch.fft.rfft2(white) * radius ** -(0.3 + 1.7 * u[:, :1]), s=(side, side))
    mix = torch.randn(count, 3, 3, generator=generator) * 0.5 + 1  # channels that go together, mostly
    noise = torch.einsum("ncd,ndhw->nchw", mix, noise)
    noise = (noise - noise.mean((1, 2, 3), keepdim=True)) / noise.std((1, 2, 3), keepdim=True)
    return (0.2 + 0.6 * u[:, 1:2] + (0.03 + 0.27 * u[:, 2:3]) * noise).clamp(0, 1)


def disturb(images: Float[Tensor, "batch 3 h w"], generator: torch.Generator) -> Float[Tensor, "batch 3 h w"]:
    """Half of the images shifted, turned and scaled by a few percent, all of them rounded to 8 bits."""
    n = len(images)
    u = 2 * torch.rand(n, 4, generator=generator) - 1
    u = u * (torch.rand(n, 1, generator=generator) < 0.5)
    angle, scale = 0.05 * u[:, 0], 1 + 0.05 * u[:, 1]
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = [torch.stack([cos, -sin, 0.06 * u[:, 2]], 1), torch.stack([sin, cos, 0.06 * u[:, 3]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    rounding = (torch.rand(images.shape, generator=generator) - 0.5) / 255
    return moved + rounding


def measure(
    networks: SecretNetworks, images: Float[Tensor, "batch 3 side side"], seed: int
) -> dict[str, float]:
    """Bit accuracy and fidelity on `images`, each with a secret of its own."""
    generator = torch.Generator().manual_seed(seed)
    secrets = torch.randint(2, (len(images), networks.shape.bits), generator=generator).float()
    with torch.no_grad():
        written = (images + networks.encoder(images, secrets)).clamp(0, 1)
        written = (written * 255).round() / 255  # as a file would keep it
        right = ((networks.decoder(written) > 0) == (secrets > 0)).float().mean()
    return {
        "bit_accuracy": round(right.item(), 4),
        "psnr": round(psnr(images, written).mean().item(), 2),
        "ssim": round(ssim(images, written).mean().item(), 4),
    }


def run(
    config: Config,
    work: Path,
    *,
    folder: Path = WEIGHTS,
    name: str = "issba",
    evaluate_every: int = 100,
    log: Callable[[str], None] = print,
) -> dict[str, object]:
    """Train, measure, write; returns the card."""
    work.mkdir(parents=True, exist_ok=True)
    shape, recipe = config.shape, config.recipe
    encoder, decoder = build(shape, seed=config.seed)
    networks = SecretNetworks(shape, encoder, decoder)

    def loss(step: int) -> Tensor:
        images = batch(step, recipe.batch_size, seed=config.seed + 1, side=shape.side)
        generator = torch.Generator().manual_seed(2_000_003 * (config.seed + 1) + step)
        secrets = torch.randint(2, (len(images), shape.bits), generator=generator).float()
        drive = encoder.drive(images, secrets)
        written = (images + shape.strength * drive.tanh()).clamp(0, 1)
        bits = F.binary_cross_entropy_with_logits(decoder(disturb(written, generator)), secrets)
        return bits + config.fidelity_at(step) * drive.square().mean()

    held_out = batch(0, min(256, config.report_size), seed=REPORT_SEED + 1, side=shape.side)
    history = train(
        {"encoder": encoder, "decoder": decoder},
        loss,
        recipe,
        checkpoint=work / f"{name}.pt",
        evaluate=lambda: measure(networks, held_out, REPORT_SEED),
        evaluate_every=evaluate_every,
        checkpoint_every=config.checkpoint_every,
        log=log,
    )
    for parameter in (*encoder.parameters(), *decoder.parameters()):
        parameter.data = parameter.data.half().float()  # what is measured is what is written
    world = draw(range(config.report_size), seed=REPORT_SEED, resolution=shape.side).images
    noise = textures(config.report_size, shape.side, torch.Generator().manual_seed(REPORT_SEED))
    card = {
        "trained_on": "procedural images alone: the Shapes world and coloured 1/f noise",
        "seed": config.seed,
        "recipe": asdict(recipe) | {"fidelity": config.fidelity, "quiet": config.quiet},
        "seconds": history[-1]["seconds"],
        "shapes": measure(networks, world, REPORT_SEED) | {"images": len(world), "seed": REPORT_SEED},
        "textures": measure(networks, noise, REPORT_SEED) | {"images": len(noise), "seed": REPORT_SEED},
    }
    return write_networks(networks, card, folder, name=name)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train ISSBA's encoder and decoder.")
    parser.add_argument("--work", type=Path, default=Path(".training"), help="folder of the checkpoint")
    parser.add_argument("--samples", type=int, default=Config().recipe.samples)
    arguments = parser.parse_args()
    recipe = Recipe(samples=arguments.samples, batch_size=32, lr=2e-3)
    card = run(Config(recipe=recipe), arguments.work, log=lambda line: print(line, flush=True))
    print({key: card[key] for key in ("shapes", "textures", "seconds", "sha256")})


if __name__ == "__main__":
    torch.set_num_threads(1)  # the same sums on every machine of a kind
    main()
