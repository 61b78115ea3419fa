"""Pretrain the model that is fine-tuned: train the network to predict the noise in images of four shapes."""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from shape_network import ShapeNetwork
from shapes import CLASSES, LATENT_SHAPE, SCHEDULE
from torch import Tensor

from ray_ddpo.common.diffusion.schedulers.ddim import ddim_table

BATCH, ANY_CLASS = 64, 0.1  # share of images without their class as an input, for guidance
SIZE = LATENT_SHAPE[1]


def rendered(labels: Int[Tensor, "N"]) -> Float[Tensor, "N 3 S S"]:
    """Return a shape of each class at a random position, in a random color on black; −1 is dark and 1 is bright."""
    count, rows = len(labels), torch.arange(SIZE).float()
    centre = 5 + 5 * torch.rand(2, count, 1, 1)
    down, across = rows.view(1, -1, 1) - centre[0], rows.view(1, 1, -1) - centre[1]
    radius, largest = (down.square() + across.square()).sqrt(), torch.maximum(down.abs(), across.abs())
    cross = torch.minimum(down.abs(), across.abs())
    shapes = torch.stack([radius < 4.5, largest < 4, (cross < 1.5) & (largest < 5), (radius - 4).abs() < 1.2])
    colour = 0.4 + 0.6 * torch.rand(count, 3, 1, 1)
    return 2 * shapes[labels, torch.arange(count)].unsqueeze(1) * colour - 1


def pretrain(steps: int, seed: int = 0) -> ShapeNetwork:
    """Train a network for `steps` steps."""
    torch.manual_seed(seed)
    network, table = ShapeNetwork(len(CLASSES)), ddim_table(SCHEDULE, 10, 1.0, "cpu")
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    for step in range(steps):
        labels = torch.randint(len(CLASSES), (BATCH,))
        clean = rendered(labels)
        noised, times, target = table.add_noise(clean, torch.randn_like(clean), torch.randint(1000, (BATCH,)))
        condition = torch.where(torch.rand(BATCH) < ANY_CLASS, len(CLASSES), labels)
        loss = F.mse_loss(network(noised, times, condition), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 200 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return network


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="shapes.pt", help="the file for the weights")
    parser.add_argument("--steps", type=int, default=1500)
    options = parser.parse_args()
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    torch.save(pretrain(options.steps).state_dict(), options.output)
    print(options.output)
