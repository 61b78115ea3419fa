"""Train the embedded Stable Diffusion 3 of signs and shapes, from a font to a saved pipeline, in an hour on a core.

python -m ray_ddpo.learner.pretraining.pretrain_words --output common/tiny_words [--seed 0] [--resume]
"""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import multiprocessing

from ray_ddpo.learner.pretraining.autoencoder import encode, load_autoencoder, save_autoencoder, train_autoencoder
from ray_ddpo.learner.pretraining.flow_denoiser import FlowMaterial, train_flow_in_process
from ray_ddpo.learner.pretraining.flow_modules import build_flow_autoencoder, build_letter_tokenizer
from ray_ddpo.learner.pretraining.preview import save_loss_curve
from ray_ddpo.learner.pretraining.shared_training import STEPS_A_LOSS, TrainingPlan, parsed, pretraining_parser
from ray_ddpo.learner.pretraining.signs_and_shapes import random_shapes, random_sign

SIGNS, SHAPES = 20_000, 28_000  # training images


def prepare(signs: int, shapes: int, autoencoder_steps: int, seed: int, work: Path) -> FlowMaterial:
    """Render the training images, train the autoencoder on them unless it is trained already, and encode them."""
    generator = np.random.default_rng(seed)
    drawings = [random_sign(generator) for _ in range(signs)] + [random_shapes(generator) for _ in range(shapes)]
    images = torch.from_numpy(np.stack([drawing.pixels for drawing in drawings])).permute(0, 3, 1, 2).contiguous()
    if not (work / "autoencoder").exists():
        torch.manual_seed(seed)
        autoencoder = build_flow_autoencoder()
        train_autoencoder(autoencoder, images, autoencoder_steps, seed)
        save_autoencoder(autoencoder, work)
    autoencoder = load_autoencoder(work, AutoencoderKL)
    latents = torch.cat([encode(autoencoder, part) for part in images.split(1024)])
    tokenizer = build_letter_tokenizer()
    token_ids = tokenizer(
        [drawing.caption for drawing in drawings] + [""], padding="max_length", return_tensors="pt"
    ).input_ids
    return FlowMaterial(
        latents=(latents * autoencoder.config["scaling_factor"]).half(),
        token_ids=token_ids[:-1].contiguous(),
        no_caption=token_ids[-1].clone(),
        signs=torch.tensor(signs),
    )


def main() -> None:
    """Parse the command line and train."""
    description = "Train the embedded Stable Diffusion 3 of signs and shapes."
    parser = pretraining_parser(description, "runs/tiny_words", 5000, 1300, "transformer and text encoders")
    parser.add_argument("--compiled", action="store_true", help="compile the transformer, which needs a C++ compiler")
    options = parsed(parser)
    if not (options.work / "material.safetensors").exists():
        material = prepare(SIGNS, SHAPES, options.autoencoder_steps, options.seed, options.work)
        material.save(options.work / "material.safetensors")
    plan = TrainingPlan(options.steps, options.seed, options.workers, options.work, options.output)
    multiprocessing.spawn(train_flow_in_process, (plan, options.compiled), nprocs=plan.workers)
    losses = json.loads((options.work / "progress.json").read_text())["losses"]
    save_loss_curve(losses, STEPS_A_LOSS, options.output / "losses.png")


if __name__ == "__main__":
    main()
