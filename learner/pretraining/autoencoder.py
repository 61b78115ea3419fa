"""Train an embedded model's autoencoder on images, encode them, and decode latents."""

import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from jaxtyping import Float, UInt8
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional

from ray_ddpo.learner.pretraining.drawings import Drawing

BATCH = 16
LEARNING_RATE = 2e-3
LATENT_NOISE = 0.15  # makes the decoder robust to errors of the UNet
LATENT_PENALTY = 2e-3  # keeps latents near zero, so that this noise matters
PIXELS = 64

Autoencoder = AutoencoderTiny | AutoencoderKL


def augmented_images(
    drawings: list[Drawing], variants: int, seed: int, size: int = PIXELS
) -> UInt8[Tensor, "drawings {2*variants} 3 {size} {size}"]:
    """Render each drawing at random scales and positions, and mirror each image; `size` pixels on a side."""
    random = np.random.default_rng(seed)
    images = np.empty((len(drawings), 2 * variants, size, size, 3), np.uint8)
    for row, drawing in zip(images, drawings, strict=True):
        for variant in range(variants):
            scale = random.uniform(0.84, 0.98)
            shift = random.uniform(-0.04, 0.04, 2)
            row[2 * variant] = drawing.render(size, scale, (shift[0], shift[1]))
            row[2 * variant + 1] = row[2 * variant, :, ::-1]
    return torch.from_numpy(images).permute(0, 1, 4, 2, 3).contiguous()


def to_unit(pixels: UInt8[Tensor, "*B 3 H W"]) -> Float[Tensor, "*B 3 H W"]:
    """Scale 0 ... 255 to -1 ... 1."""
    return pixels.float() / 127.5 - 1


def train_autoencoder(autoencoder: Autoencoder, images: UInt8[Tensor, "N 3 64 64"], steps: int, seed: int) -> None:
    """Train an autoencoder, and set its scaling factor so that latents have a standard deviation of 1."""
    _fit(autoencoder, images, steps, seed)
    autoencoder.requires_grad_(False).eval()
    latents = encode(autoencoder, images[torch.randperm(len(images))[:1024]])
    autoencoder.register_to_config(scaling_factor=1 / latents.std().item())


def save_autoencoder(autoencoder: Autoencoder, work: Path) -> None:
    """Save the autoencoder in float32, in diffusers' format."""
    autoencoder.save_pretrained(work / "autoencoder")


def load_autoencoder(work: Path, kind: type[Autoencoder] = AutoencoderTiny) -> Autoencoder:
    """Load the autoencoder that `save_autoencoder` saved."""
    return kind.from_pretrained(work / "autoencoder", use_safetensors=True).requires_grad_(False).eval()


def _fit(autoencoder: Autoencoder, images: UInt8[Tensor, "N 3 64 64"], steps: int, seed: int) -> None:
    """Minimize the loss by AdamW with a cosine schedule, and show progress."""
    optimizer = torch.optim.AdamW(autoencoder.parameters(), LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    generator = torch.Generator().manual_seed(seed)
    started, squared_errors = time.monotonic(), []
    with Progress() as progress:
        bar = progress.add_task("autoencoder", total=steps)
        for step in range(steps):
            chosen = torch.randint(len(images), (BATCH,), generator=generator)
            clean = _prepared(autoencoder, images[chosen])
            loss, squared_error = _loss(autoencoder, clean, generator)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            squared_errors.append(squared_error)
            progress.advance(bar)
            if (step + 1) % 200 == 0:
                error, minutes = np.mean(squared_errors[-200:]), (time.monotonic() - started) / 60
                progress.console.print(f"autoencoder step {step + 1}: MSE {error:.5f}, {minutes:.1f} minutes")


def _loss(
    autoencoder: Autoencoder, clean: Float[Tensor, "B 3 64 64"], generator: torch.Generator
) -> tuple[Float[Tensor, ""], float]:
    """Return the loss (L1, MSE and a penalty of large latents), and the MSE."""
    with torch.autocast("cpu", torch.bfloat16):
        latents = means(autoencoder, clean)
        noise = torch.randn(latents.shape, generator=generator)
        decoded = autoencoder.decoder(latents + LATENT_NOISE * noise)
    error = decoded.float() - clean
    squared_error = error.square().mean()
    penalty = LATENT_PENALTY * latents.float().square().mean()
    return error.abs().mean() + 2 * squared_error + penalty, squared_error.item()


def _prepared(autoencoder: Autoencoder, pixels: UInt8[Tensor, "B 3 64 64"]) -> Float[Tensor, "B 3 64 64"]:
    """Return pixels in -1 ... 1, in the memory format in which the autoencoder is fastest on a CPU."""
    fastest = torch.channels_last if isinstance(autoencoder, AutoencoderTiny) else torch.contiguous_format
    return to_unit(pixels).contiguous(memory_format=fastest)


def means(autoencoder: Autoencoder, pixels: Float[Tensor, "B 3 64 64"]) -> Float[Tensor, "B C 16 16"]:
    """Return the latents of pixels in -1 ... 1; of a variational encoder, their mean."""
    encoded = autoencoder.encoder(pixels)
    return encoded.chunk(2, dim=1)[0] if isinstance(autoencoder, AutoencoderKL) else encoded


@torch.no_grad()
def encode(autoencoder: Autoencoder, images: UInt8[Tensor, "N 3 64 64"]) -> Float[Tensor, "N C 16 16"]:
    """Return latents before scaling."""
    batches = [_prepared(autoencoder, batch) for batch in images.split(64)]
    return torch.cat([means(autoencoder, batch) for batch in batches]).contiguous()


@torch.no_grad()
def decode(autoencoder: Autoencoder, latents: Float[Tensor, "N C 16 16"]) -> UInt8[Tensor, "N 3 64 64"]:
    """Return pixels from latents before scaling."""
    decoded = torch.cat([autoencoder.decoder(batch) for batch in latents.split(64)])
    return ((functional.hardtanh(decoded) + 1) * 127.5).round().to(torch.uint8)
