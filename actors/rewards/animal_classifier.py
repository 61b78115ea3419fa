"""Classify the prompted animal, by a linear head on features of a pretrained ImageNet network."""

import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from ray_ddpo.actors.rewards.reward import Images, LoadedReward, Reward

PROBE_FILE = Path(__file__).parents[2] / "common" / "tiny_animals" / "probe.safetensors"


class AnimalClassifier(Reward):
    """Linear probe of the embedded model: the score of the animal that the prompt names, one of 45 classes."""

    measure: Literal["log_prob", "top1"] = "log_prob"
    """Natural logarithm of the animal's probability (`log_prob`), or 1 if no class is more probable, else 0 (`top1`)."""

    def load(self, device: str) -> LoadedReward:
        """Load the probe.

        The loaded reward raises ValueError if a prompt names none of the classes, or several.
        """
        import torch

        from ray_ddpo.common.image_models.linear_probe import load_image_features, load_probe

        probe, features = load_probe(PROBE_FILE), load_image_features(device)
        weight, bias = probe.weight.to(device), probe.bias.to(device)

        def score(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> Float[np.ndarray, "B"]:
            asked = torch.tensor([class_index(prompt, probe.classes) for prompt in prompts], device=device)
            log_probs = torch.log_softmax(features(images) @ weight.T + bias, dim=1)
            if self.measure == "top1":
                return (log_probs.argmax(1) == asked).float().cpu().numpy()
            return log_probs.gather(1, asked[:, None])[:, 0].cpu().numpy()

        return score


def class_index(prompt: str, classes: list[str]) -> int:
    """Return the class whose name is a word of the prompt."""
    named = sorted(set(re.findall(r"\w+", prompt.lower())) & set(classes))
    if len(named) != 1:
        shown = repr(prompt if len(prompt) <= 200 else f"{prompt[:200]}…")
        raise ValueError(f"prompt {shown} names {named or 'no animal'}: animal_classifier needs one of {classes}")
    return classes.index(named[0])
