"""DDPO as its papers write it: plain loops in float64, slow, and without a line of the program's own."""

import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

TRAIN_STEPS = 1000


def alphas_cumprod(beta_start: float = 0.00085, beta_end: float = 0.012) -> np.ndarray:
    """Return ᾱ of Stable Diffusion's noise schedule: betas linear in their square root."""
    alphas, product = [], 1.0
    for index in range(TRAIN_STEPS):
        root = beta_start**0.5 + (beta_end**0.5 - beta_start**0.5) * index / (TRAIN_STEPS - 1)
        product *= 1 - root**2
        alphas.append(product)
    return np.array(alphas)


def leading_timesteps(num_steps: int, offset: int = 1) -> list[int]:
    return [index * (TRAIN_STEPS // num_steps) + offset for index in reversed(range(num_steps))]


def trailing_timesteps(num_steps: int) -> list[int]:
    return [round(TRAIN_STEPS - index * TRAIN_STEPS / num_steps) - 1 for index in range(num_steps)]


def next_alpha(alphas: np.ndarray, timestep: int, num_steps: int, set_alpha_to_one: bool) -> float:
    """Return ᾱ at the end of the step that starts at `timestep`."""
    following = timestep - TRAIN_STEPS // num_steps
    if following >= 0:
        return float(alphas[following])
    return 1.0 if set_alpha_to_one else float(alphas[0])


def ddim_sigma(alpha: float, following_alpha: float, eta: float) -> float:
    """Return σ of DDIM (Song et al. 2021), equation 16."""
    return eta * math.sqrt((1 - following_alpha) / (1 - alpha)) * math.sqrt(1 - alpha / following_alpha)


def clean_and_noise(prediction_type: str, latents, output, alpha: float):
    """Return x0 and ε from a prediction of ε, of v = √ᾱ ε − √(1−ᾱ) x0, or of x0; for arrays and tensors."""
    signal, spread = math.sqrt(alpha), math.sqrt(1 - alpha)
    if prediction_type == "epsilon":
        noise = output
        return (latents - spread * noise) / signal, noise
    clean = output if prediction_type == "sample" else signal * latents - spread * output
    return clean, (latents - signal * clean) / spread


def ddim_mean(clean, noise, following_alpha: float, sigma: float):
    """Return the mean of DDIM, equation 12 without noise; for arrays and tensors."""
    return math.sqrt(following_alpha) * clean + math.sqrt(max(1 - following_alpha - sigma**2, 0.0)) * noise


def gaussian_log_density(value: np.ndarray, mean: np.ndarray, sigma: float) -> float:
    """Return ln N(value; mean, σ² I), divided by the number of elements."""
    total = 0.0
    for x, centre in zip(value.ravel().tolist(), mean.ravel().tolist(), strict=True):
        total += -((x - centre) ** 2) / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi))
    return total / value.size


class PerPromptTracker:
    """Rewards of each prompt in a ring; an advantage is a reward's distance from their mean, in their deviations."""

    def __init__(self, buffer_size: int, min_count: int) -> None:
        self.buffer_size, self.min_count = buffer_size, min_count
        self.rings: dict[str, deque[float]] = {}

    def update(self, prompts: list[str], rewards: list[float]) -> list[float]:
        for prompt, reward in zip(prompts, rewards, strict=True):
            self.rings.setdefault(prompt, deque(maxlen=self.buffer_size)).append(reward)
        advantages = []
        for prompt, reward in zip(prompts, rewards, strict=True):
            ring = list(self.rings[prompt])
            mean, deviation = _mean_and_deviation(ring if len(ring) >= self.min_count else rewards)
            advantages.append((reward - mean) / (deviation + 1e-6))
        return advantages


def _mean_and_deviation(values: list[float]) -> tuple[float, float]:
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))


def clipped_surrogate(log_prob: float, old_log_prob: float, advantage: float, clip_range: float) -> float:
    """Return the loss of PPO (Schulman et al. 2017), equation 7."""
    ratio = math.exp(log_prob - old_log_prob)
    if ratio > 1 + clip_range:
        held = 1 + clip_range
    elif ratio < 1 - clip_range:
        held = 1 - clip_range
    else:
        held = ratio
    return -min(ratio * advantage, held * advantage)


def decoupled_surrogate(
    log_probs: tuple[float, float, float], advantage: float, clip_range: float, band: float | None
) -> float:
    """Return the loss of decoupled PPO (AReaL, arXiv 2505.24298) from current, proximal and behavior log-probs."""
    log_prob, proximal, behavior = log_probs
    weight = 1.0 if band is None else math.exp(min(max(proximal - behavior, -band), band))
    return weight * clipped_surrogate(log_prob, proximal, advantage, clip_range)


def gaussian_kl(mean: np.ndarray, other_mean: np.ndarray, sigma: float) -> float:
    """Return the KL of N(mean, σ² I) to N(other_mean, σ² I), in nats."""
    pairs = zip(mean.ravel().tolist(), other_mean.ravel().tolist(), strict=True)
    return math.fsum((one - other) ** 2 for one, other in pairs) / (2 * sigma**2)


@dataclass(frozen=True)
class ImagePath:
    """An image: its prompt's embedding, its trained steps, and its advantage."""

    embedding: Tensor  # [1, L, D]
    steps: list[int]
    latents: Tensor  # [W, C, H, W2] entering these steps
    next_latents: Tensor  # leaving them
    old_log_probs: list[float]
    advantage: float


@dataclass(frozen=True)
class Setting:
    """What the recipe says of sampling and of the loss."""

    alphas: np.ndarray  # as the model's scheduler rounded them
    num_steps: int
    guidance_scale: float
    clip_range: float
    eta: float = 1.0


def text_embedding(model: Path, prompt: str) -> Tensor:
    """Return CLIP's last hidden state, from transformers."""
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(model / "text_encoder").eval()
    length = encoder.config.max_position_embeddings
    tokens = tokenizer([prompt], padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    with torch.no_grad():
        return encoder(tokens.input_ids).last_hidden_state


def ddpo_gradient(
    unet: nn.Module, unconditional: Tensor, paths: list[ImagePath], setting: Setting
) -> dict[str, Tensor]:
    """Compute the gradient of an optimizer step: image by image, step by step, guidance branch by branch."""
    unet.zero_grad()
    for path in paths:
        for place in range(len(path.steps)):
            loss = _step_loss(unet, unconditional, path, place, setting)
            (loss / (len(paths) * len(path.steps))).backward()
    return {name: value.grad.clone() for name, value in unet.named_parameters() if value.grad is not None}


@torch.no_grad()
def ddpo_ratios(unet: nn.Module, unconditional: Tensor, paths: list[ImagePath], setting: Setting) -> list[float]:
    """Return π_θ / π_old of every step of every image."""
    places = [(path, place) for path in paths for place in range(len(path.steps))]
    return [float(_ratio(unet, unconditional, path, place, setting)) for path, place in places]


def _ratio(unet: nn.Module, unconditional: Tensor, path: ImagePath, place: int, setting: Setting) -> Tensor:
    timestep = leading_timesteps(setting.num_steps)[path.steps[place]]
    alpha = float(setting.alphas[timestep])
    following_alpha = next_alpha(setting.alphas, timestep, setting.num_steps, set_alpha_to_one=False)
    latents, next_latents = path.latents[place : place + 1], path.next_latents[place : place + 1]
    without = unet(latents, timestep, unconditional).sample
    with_prompt = unet(latents, timestep, path.embedding).sample
    output = without + setting.guidance_scale * (with_prompt - without)
    sigma = ddim_sigma(alpha, following_alpha, setting.eta)
    mean = ddim_mean(*clean_and_noise("epsilon", latents, output, alpha), following_alpha, sigma)
    constant = math.log(sigma * math.sqrt(2 * math.pi))
    log_prob = (-((next_latents - mean) ** 2) / (2 * sigma**2)).mean() - constant
    return torch.exp(log_prob - path.old_log_probs[place])


def _step_loss(unet: nn.Module, unconditional: Tensor, path: ImagePath, place: int, setting: Setting) -> Tensor:
    ratio = _ratio(unet, unconditional, path, place, setting)
    advantage = min(max(path.advantage, -5.0), 5.0)
    held = torch.clamp(ratio, 1 - setting.clip_range, 1 + setting.clip_range)
    return torch.max(-advantage * ratio, -advantage * held)
