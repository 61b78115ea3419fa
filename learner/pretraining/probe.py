"""Fit the linear probe of the 45 animals, and report its accuracy on unseen and generated images.

python -m ray_ddpo.learner.pretraining.probe --model common/tiny_animals
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from jaxtyping import Float, Int, UInt8
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ray_ddpo.common.image_models.linear_probe import (
    FEATURES,
    ImageFeatures,
    LinearProbe,
    load_image_features,
    save_probe,
)
from ray_ddpo.learner.pretraining.autoencoder import augmented_images, decode, encode
from ray_ddpo.learner.pretraining.drawings import Drawing, prompted_animals, read_drawings
from ray_ddpo.learner.pretraining.preview import load_pipeline, sample_images

HELD_OUT_STYLE = "noto-v1"
VARIANTS = 6  # per drawing and kind of image, each also mirrored
LARGE = 160  # pixels
WEIGHT_DECAY = 1e-3
FIT_STEPS = 400
GENERATED_SEEDS = 8


def fit(features: Float[Tensor, "N 1280"], labels: Int[Tensor, "N"], classes: list[str]) -> LinearProbe:
    """Fit a multinomial logistic regression with weight decay on standardized features, deterministically."""
    mean, std = features.mean(0), features.std(0).clamp_min(1e-3)
    standard = (features - mean) / std
    # Classes with more drawings are not more likely in prompts.
    class_weight = len(labels) / (len(classes) * torch.bincount(labels, minlength=len(classes)).clamp_min(1).float())
    weight = torch.zeros(len(classes), FEATURES, requires_grad=True)
    bias = torch.zeros(len(classes), requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], 0.01)
    for _ in range(FIT_STEPS):
        optimizer.zero_grad()
        logits = standard @ weight.T + bias
        loss = torch.nn.functional.cross_entropy(logits, labels, class_weight, label_smoothing=0.05)
        (loss + WEIGHT_DECAY * weight.square().sum() / 2).backward()
        optimizer.step()
    scaled = (weight / std).detach()
    return LinearProbe(scaled, (bias - scaled @ mean).detach(), classes)


def fitting_images(
    drawings: list[Drawing], autoencoder: AutoencoderTiny, seed: int
) -> list[UInt8[np.ndarray, "N H W 3"]]:
    """Render augmented drawings three times: small, small and passed through the autoencoder, and large."""
    small = augmented_images(drawings, VARIANTS, seed).flatten(0, 1)
    passed = decode(autoencoder, encode(autoencoder, augmented_images(drawings, VARIANTS, seed + 1).flatten(0, 1)))
    large = augmented_images(drawings, VARIANTS, seed + 2, LARGE).flatten(0, 1)
    return [images.permute(0, 2, 3, 1).numpy() for images in (small, passed, large)]


def features_of(images: UInt8[np.ndarray, "N H W 3"], features: ImageFeatures) -> Float[Tensor, "N 1280"]:
    """Compute features in batches of 32."""
    batches = [images[start : start + 32] for start in range(0, len(images), 32)]
    return torch.cat([features(batch) for batch in track(batches, "features")])


def accuracy(probe: LinearProbe, features: Float[Tensor, "N 1280"], labels: Int[Tensor, "N"]) -> float:
    """Return the fraction of images whose animal the probe ranks first."""
    return (probe.logits(features).argmax(1) == labels).float().mean().item()


def labels_of(drawings: list[Drawing], repeats: int) -> Int[Tensor, "N"]:
    """Return the class of each image, for `repeats` neighboring images of each drawing."""
    animals = prompted_animals()
    return torch.tensor([animals.index(drawing.animal) for drawing in drawings]).repeat_interleave(repeats)


def fit_on_drawings(model: Path, features: ImageFeatures, seed: int, console: Console) -> LinearProbe:
    """Fit on all styles but one, and print the accuracy on that one."""
    autoencoder = AutoencoderTiny.from_pretrained(
        model, subfolder="vae", torch_dtype=torch.float32, use_safetensors=True
    ).eval()
    drawings = read_drawings()
    known = [drawing for drawing in drawings if drawing.style != HELD_OUT_STYLE]
    unseen = [drawing for drawing in drawings if drawing.style == HELD_OUT_STYLE]
    images = fitting_images(known, autoencoder, seed)
    labels = labels_of(known, 2 * VARIANTS)
    probe = fit(torch.cat([features_of(p, features) for p in images]), labels.repeat(len(images)), prompted_animals())
    for size in (64, LARGE):
        rendered = np.stack([drawing.render(size, 0.92) for drawing in unseen])
        share = accuracy(probe, features_of(rendered, features), labels_of(unseen, 1))
        console.print(f"{HELD_OUT_STYLE}, not fitted on, {len(unseen)} drawings of {size} px: named first {share:.3f}")
    return probe


def report_generated(model: Path, probe: LinearProbe, features: ImageFeatures, console: Console) -> None:
    """Print how often the probe ranks the prompted animal first in images of the embedded model."""
    pipeline, labels = load_pipeline(model), torch.arange(len(probe.classes))
    for guidance_scale in (3.0, 4.0, 5.0):
        hits = []
        for seed in range(GENERATED_SEEDS):
            images = sample_images(pipeline, probe.classes, 1000 * seed, guidance_scale)
            hits.append(probe.logits(features(images)).argmax(1) == labels)
        share = torch.stack(hits).float().mean(0)
        worst = ", ".join(f"{probe.classes[i]} {share[i]:.2f}" for i in share.argsort()[:12].tolist())
        console.print(f"generated, guidance {guidance_scale}: named first {share.mean():.3f}; worst {worst}")


def main() -> None:
    """Parse the command line, fit, save, report."""
    parser = argparse.ArgumentParser(description="Fit the linear probe of the 45 animals and report on it.")
    parser.add_argument("--model", type=Path, default=Path("common/tiny_animals"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console, features = Console(), load_image_features()
    probe = fit_on_drawings(options.model, features, options.seed, console)
    save_probe(probe, options.model / "probe.safetensors")
    report_generated(options.model, probe, features, console)


if __name__ == "__main__":
    main()
