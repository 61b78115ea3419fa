"""Return the gradient of one update of the learner, and the inputs with which the slow reference re-computes it."""

import math
from pathlib import Path

import numpy as np
import torch

from ray_ddpo.common.policy_weights import PolicyWeights
from ray_ddpo.learner.learner import Learner
from tests.reference import ddpo_reference as reference
from tests.rounds import SampledRound, components_with, learner_of, sample_round

# One optimizer step without beta1, weight decay or a limit on the norm: AdamW's first moment is then the gradient.
ONE_STEP = {
    "sampling__batches_per_round": 1,
    "learner__adam_beta1": 0.0,
    "learner__weight_decay": 0.0,
    "learner__max_grad_norm": 1e9,
    "learner__log_prob_tolerance": 1.0,  # a round that is made stale by hand is not what any weights would have sampled
}


def gradient_of(learner: Learner) -> dict[str, np.ndarray]:
    moments = learner.state().optimizer
    return {name.removesuffix("/exp_avg"): value for name, value in moments.items() if name.endswith("/exp_avg")}


def relative_error(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    assert actual.keys() == expected.keys()
    difference = math.sqrt(sum(float(((actual[name] - expected[name]) ** 2).sum()) for name in expected))
    return difference / math.sqrt(sum(float((value.astype(np.float64) ** 2).sum()) for value in expected.values()))


def updated(tables: dict, sampled: SampledRound | None = None, **values: object) -> Learner:
    """Return a learner after one update on the given round, or on one sampled for it."""
    components = components_with(tables, **{**ONE_STEP, **values})
    learner = learner_of(components)
    sampled = sampled or sample_round(components, learner.weights()[-1])
    learner.update(sampled.batch, *sampled.trajectories)
    return learner


def reference_network(model: Path, weights: PolicyWeights) -> torch.nn.Module:
    """Return the UNet from diffusers and peft with these adapters, in float64."""
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    network = UNet2DConditionModel.from_pretrained(model / "unet").eval().requires_grad_(False)
    network.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    for name, array in weights.arrays().items():
        network.get_parameter(name).data.copy_(torch.from_numpy(array.copy()))
    return network.double()


def reference_paths(sampled: SampledRound, model: Path) -> list[reference.ImagePath]:
    """Return the round's images one by one, with embeddings re-computed from their prompts."""
    (trajectory,), (report,) = sampled.trajectories, sampled.batch.reports  # of one task
    paths = []
    for row, prompt in enumerate(report.task.prompts):
        latents, next_latents = trajectory.latents[row].double(), trajectory.next_latents[row].double()
        embedding = reference.text_embedding(model, prompt.text).double()
        steps, log_probs = trajectory.steps[row].tolist(), trajectory.log_probs[row].tolist()
        advantage = float(sampled.batch.advantages[row])
        paths.append(reference.ImagePath(embedding, steps, latents, next_latents, log_probs, advantage))
    return paths


def model_alphas(model: Path) -> np.ndarray:
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_pretrained(model / "scheduler").alphas_cumprod.double().numpy()
