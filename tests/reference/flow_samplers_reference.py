"""The published stochastic samplers of flow models again, in float64 and from their authors' code, independent of ours.

Sources: `flux_step` of XueZeyue/DanceGRPO (fastvideo/train_grpo_flux.py), and the branches "sde" and "cps" of
`sde_step_with_logprob` of yifan123/flow_grpo (flow_grpo/diffusers_patch/sd3_sde_with_logprob.py).
"""

import math

from torch import Tensor


def flow_sde(x: Tensor, v: Tensor, sigmas: list[float], index: int, level: float) -> tuple[Tensor, float]:
    """Return mean and standard deviation of Flow-GRPO's step, branch "sde"."""
    sigma, following = sigmas[index], sigmas[index + 1]
    dt = following - sigma
    std_dev_t = math.sqrt(sigma / (1 - (sigmas[1] if sigma == 1 else sigma))) * level
    of_sample = 1 + std_dev_t**2 / (2 * sigma) * dt
    of_output = (1 + std_dev_t**2 * (1 - sigma) / (2 * sigma)) * dt
    return x * of_sample + v * of_output, std_dev_t * math.sqrt(-dt)


def dance_sde(x: Tensor, v: Tensor, sigmas: list[float], index: int, eta: float) -> tuple[Tensor, float]:
    """Return mean and standard deviation of DanceGRPO's step: an Euler step, and the score times η²/2."""
    sigma, dsigma = sigmas[index], sigmas[index + 1] - sigmas[index]
    predicted_original = x - sigma * v
    score = -(x - predicted_original * (1 - sigma)) / sigma**2
    return x + dsigma * v - 0.5 * eta**2 * score * dsigma, eta * math.sqrt(-dsigma)


def cps(x: Tensor, v: Tensor, sigmas: list[float], index: int, level: float) -> tuple[Tensor, float]:
    """Return mean and standard deviation of coefficients-preserving sampling (arXiv 2509.05952), branch "cps"."""
    sigma, following = sigmas[index], sigmas[index + 1]
    std_dev_t = following * math.sin(level * math.pi / 2)
    predicted_original, noise_estimate = x - sigma * v, x + v * (1 - sigma)
    kept = math.sqrt(max(following**2 - std_dev_t**2, 0.0))
    return predicted_original * (1 - following) + noise_estimate * kept, std_dev_t


def log_prob(next_latents: Tensor, mean: Tensor, std: float) -> float:
    """Return the Gaussian log-density, mean over elements, as the authors write it for their "sde" branch."""
    squares = -((next_latents - mean) ** 2) / (2 * std**2)
    return float((squares - math.log(std) - math.log(math.sqrt(2 * math.pi))).mean())


def log_prob_without_constants(next_latents: Tensor, mean: Tensor) -> float:
    """Return what Flow-GRPO's "cps" branch calls the log-prob: the negative mean square, without the division by 2 std²."""
    return float((-((next_latents - mean) ** 2)).mean())


SAMPLERS = {"flow": flow_sde, "dance": dance_sde, "cps": cps}


class MixGRPOWindows:
    """MixGRPO's progressive window, counted as `GRPOTrainingStates` of Tencent-Hunyuan/MixGRPO does, one call a round.

    Theirs shortens at the end of the steps; this one ends at the last start of a whole window, as ours does.
    """

    def __init__(self, size: int, stride: int, iterations: int, steps: int, roll_back: bool, k: float, threshold: int):
        self.size, self.stride, self.iterations, self.last = size, stride, iterations, steps - size
        self.roll_back, self.k, self.threshold = roll_back, k, threshold
        self.start = self.turn = 0

    def next_window(self) -> list[int]:
        """Return the window of this iteration, and count it."""
        window = list(range(self.start, self.start + self.size))
        self.turn += 1
        if self.turn >= math.ceil(self.iterations * math.exp(-self.k * max(0, self.start - self.threshold))):
            self.turn, moved = 0, self.start + self.stride
            self.start = moved if moved <= self.last else (0 if self.roll_back else self.start)
        return window


def exact_velocity(x: Tensor, sigma: float, mean: float, spread: float) -> Tensor:
    """Return E[ε − x0 | x_σ = x] if x0 is N(mean, spread²): the velocity that a perfect network predicts."""
    signal = 1 - sigma
    variance = signal**2 * spread**2 + sigma**2
    return (sigma - signal * spread**2) / variance * (x - signal * mean) - mean


def exact_marginal(sigma: float, mean: float, spread: float) -> tuple[float, float]:
    """Return mean and standard deviation of x_σ."""
    return (1 - sigma) * mean, math.hypot((1 - sigma) * spread, sigma)
