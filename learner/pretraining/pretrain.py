"""Train the embedded Stable Diffusion of 45 animals, from npm packages to a saved pipeline, in an hour on 2 cores.

python -m ray_ddpo.learner.pretraining.pretrain --output common/tiny_animals [--seed 0] [--resume]
"""

import json
from pathlib import Path

import torch
from torch import multiprocessing

from ray_ddpo.learner.pretraining.autoencoder import (
    augmented_images,
    encode,
    load_autoencoder,
    save_autoencoder,
    train_autoencoder,
)
from ray_ddpo.learner.pretraining.denoiser import Material, train_in_process
from ray_ddpo.learner.pretraining.drawings import Drawing, prompted_animals, read_drawings
from ray_ddpo.learner.pretraining.modules import build_autoencoder, build_tokenizer
from ray_ddpo.learner.pretraining.preview import save_loss_curve, save_sheet
from ray_ddpo.learner.pretraining.shared_training import STEPS_A_LOSS, TrainingPlan, parsed, pretraining_parser

OTHER_ANIMALS = 0.15  # of a batch
VARIANTS = 16  # sizes and positions of a drawing, each also mirrored


def captions_of(drawings: list[Drawing]) -> list[str]:
    """Return the captions of the prompted animals in their order, then of the others."""
    return list(dict.fromkeys(prompted_animals() + [drawing.animal for drawing in drawings]))


def words_of(captions: list[str]) -> list[str]:
    """Return the words that each get a token."""
    return list(dict.fromkeys(" ".join(captions).split()))


def prepare(drawings: list[Drawing], autoencoder_steps: int, seed: int, work: Path) -> Material:
    """Render the drawings, train the autoencoder on them unless it is trained already, and encode them."""
    images = augmented_images(drawings, VARIANTS, seed)
    if not (work / "autoencoder").exists():
        torch.manual_seed(seed)
        autoencoder = build_autoencoder()
        train_autoencoder(autoencoder, images.flatten(0, 1), autoencoder_steps, seed)
        save_autoencoder(autoencoder, work)
    autoencoder = load_autoencoder(work)
    latents = encode(autoencoder, images.flatten(0, 1)).unflatten(0, images.shape[:2])
    captions = captions_of(drawings)
    rows = torch.tensor([captions.index(drawing.animal) for drawing in drawings])
    tokenizer = build_tokenizer(words_of(captions))
    token_ids = tokenizer([*captions, ""], padding="max_length", return_tensors="pt").input_ids
    # All prompted animals are equally frequent, however many drawings each has; so are all others, at a lower
    # frequency.
    of_animal = 1 / torch.bincount(rows)[rows].float()
    prompted = rows < len(prompted_animals())
    share = torch.where(prompted, 1 - OTHER_ANIMALS, OTHER_ANIMALS)
    weights = of_animal * share / torch.where(prompted, of_animal[prompted].sum(), of_animal[~prompted].sum())
    return Material(latents * autoencoder.config["scaling_factor"], rows, token_ids, weights)


def main() -> None:
    """Parse the command line and train."""
    description = "Train the embedded Stable Diffusion of 45 animals."
    parser = pretraining_parser(description, "runs/tiny_animals", 6500, 3200, "UNet and text encoder")
    options = parsed(parser)
    drawings = read_drawings(other_animals=True)
    if not (options.work / "material.safetensors").exists():
        material = prepare(drawings, options.autoencoder_steps, options.seed, options.work)
        material.save(options.work / "material.safetensors")
    words = words_of(captions_of(drawings))
    plan = TrainingPlan(options.steps, options.seed, options.workers, options.work, options.output)
    multiprocessing.spawn(train_in_process, (plan, words), nprocs=plan.workers)
    losses = json.loads((options.work / "progress.json").read_text())["losses"]
    save_loss_curve(losses, STEPS_A_LOSS, options.output / "losses.png")
    save_sheet(options.output, prompted_animals(), options.output / "animals.png")


if __name__ == "__main__":
    main()
