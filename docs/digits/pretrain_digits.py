"""Pretrain the model that is fine-tuned: render digits in a few fonts, and train the transformer by flow matching."""

import argparse
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from digit_transformer import DigitTransformer
from jaxtyping import Float, Int
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

FOLDER = Path(matplotlib.get_data_path()) / "fonts" / "ttf"  # matplotlib ships with fonts
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif")
SIZE, FINER = 16, 4  # pixels per side of an image, and how much finer it is rendered
BATCH, ANY_DIGIT = 64, 0.1  # share of images without their digit as an input, for guidance


def rendered(
    digit: int, font: str, height: float, angle: float, place: tuple[float, float]
) -> Float[np.ndarray, "S S"]:
    """Return a digit's image, −1 black and 1 white.

    Args:
        digit: the digit.
        font: the font's name.
        height: the font's height in pixels.
        angle: the rotation in degrees.
        place: the offset from the image's center in pixels.
    """
    side = SIZE * FINER
    image = Image.new("L", (side, side))
    letters = ImageFont.truetype(FOLDER / f"{font}.ttf", round(FINER * height))
    middle = (side / 2 + FINER * place[0], side / 2 + FINER * place[1])
    ImageDraw.Draw(image).text(middle, str(digit), fill=255, font=letters, anchor="mm")
    small = image.rotate(angle, Image.Resampling.BILINEAR).resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 127.5 - 1


def data(count: int, seed: int = 0) -> tuple[Float[Tensor, "N 1 S S"], Int[Tensor, "N"]]:
    """Return images and their digits."""
    generator = np.random.default_rng(seed)
    digits = generator.integers(10, size=count)
    images = [
        rendered(
            digit,
            str(generator.choice(FONTS)),
            generator.uniform(14, 17),
            generator.normal(0, 4),
            (generator.normal(0, 0.5), generator.normal(0, 0.5)),
        )
        for digit in digits
    ]
    return torch.from_numpy(np.stack(images)).unsqueeze(1), torch.from_numpy(digits)


def flow_matching_loss(
    network: DigitTransformer, clean: Float[Tensor, "B 1 S S"], digit: Float[Tensor, "B 10"]
) -> Float[Tensor, ""]:
    """Return E |v − (ε − x0)|² at x_σ = (1 − σ) x0 + σ ε (Lipman et al. 2023)."""
    noise, sigma = torch.randn_like(clean), torch.sigmoid(torch.randn(len(clean)))
    share = sigma.view(-1, 1, 1, 1)
    velocity = network((1 - share) * clean + share * noise, 1000 * sigma, digit)
    return F.mse_loss(velocity, noise - clean)


def pretrain(steps: int, images: int, seed: int = 0) -> DigitTransformer:
    """Train a network. Return the moving average of its weights."""
    clean, digits = data(images, seed)
    torch.manual_seed(seed)
    network = DigitTransformer(SIZE)
    average: Any = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for step in range(steps):
        chosen = torch.randint(len(clean), (BATCH,))
        condition = (torch.rand(BATCH, 1) >= ANY_DIGIT) * F.one_hot(digits[chosen], 10).float()
        loss = flow_matching_loss(network, clean[chosen], condition)
        optimizer.param_groups[0]["lr"] = 2e-3 * math.cos(math.pi / 2 * step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(network)
        if step % 200 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return average.module


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="runs/pretrained", help="the folder for the network")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--images", type=int, default=4000)
    options = parser.parse_args()
    pretrain(options.steps, options.images).save_pretrained(options.output, safe_serialization=True)
    print(options.output)
