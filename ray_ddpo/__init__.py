"""Reinforcement-learning fine-tuning of diffusion models on Ray.

    from ray_ddpo import Recipe, train

    def redness(images, prompts, metadata):  # uint8 [B, H, W, 3], B texts, B dictionaries -> B numbers
        return images[..., 0].mean(axis=(1, 2)) / 255

    run = train(Recipe.load("demo", rounds=2), reward=redness, prompts=["cat", "dog"], serial=True)
    run.metrics, run.images(1), run.lora, run.report()

| name | use |
|---|---|
| `Recipe` | a run's configuration: `Recipe.load` takes a path or the name of a shipped recipe |
| `train`, `Run` | train a recipe; look at a run's metrics, images, weights and report |
| `Reward`, `PromptSource`, `Prompt` | base classes for a reward and a source of prompts; a plain function is enough for both |
| `Algorithm`, `TransitionLoss` | base class for an algorithm, and its loss |
| `PolicyGradient`, `ClippedPolicyGradient`, `ForwardProcess` | an `Algorithm` with more of it written already |
| `Tracker`, `LiveTracker`, `RunInfo` | base classes for a tracker, and what a tracker is told of its run |
| `PolicyConfig`, `Policy`, `Transition` | base classes for a model family, and the distribution of one denoising step |

A name is imported when it is first used, so that `import ray_ddpo` takes a blink and loads no torch.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_ddpo.actors.rewards.reward import Reward
    from ray_ddpo.api import train
    from ray_ddpo.common.diffusion.policy import Policy, PolicyConfig
    from ray_ddpo.common.diffusion.transition import Transition
    from ray_ddpo.common.prompts import Prompt, PromptSource
    from ray_ddpo.common.recipe.recipe import Recipe
    from ray_ddpo.common.trackers.tracker import LiveTracker, RunInfo, Tracker
    from ray_ddpo.learner.algorithms.algorithm import Algorithm, TransitionLoss
    from ray_ddpo.learner.algorithms.forward_process import ForwardProcess
    from ray_ddpo.learner.algorithms.policy_gradient import ClippedPolicyGradient, PolicyGradient
    from ray_ddpo.run import Run

__all__ = [
    "Algorithm",
    "ClippedPolicyGradient",
    "ForwardProcess",
    "LiveTracker",
    "Policy",
    "PolicyConfig",
    "PolicyGradient",
    "Prompt",
    "PromptSource",
    "Recipe",
    "Reward",
    "Run",
    "RunInfo",
    "Tracker",
    "Transition",
    "TransitionLoss",
    "train",
]

_MODULES = {
    "actors.rewards.reward": ("Reward",),
    "api": ("train",),
    "common.diffusion.policy": ("Policy", "PolicyConfig"),
    "common.diffusion.transition": ("Transition",),
    "common.prompts": ("Prompt", "PromptSource"),
    "common.recipe.recipe": ("Recipe",),
    "common.trackers.tracker": ("LiveTracker", "RunInfo", "Tracker"),
    "learner.algorithms.algorithm": ("Algorithm", "TransitionLoss"),
    "learner.algorithms.forward_process": ("ForwardProcess",),
    "learner.algorithms.policy_gradient": ("ClippedPolicyGradient", "PolicyGradient"),
    "run": ("Run",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """The package. Its `train` is the function, also after an import of the driver, the module `ray_ddpo.train`."""

    @property
    def train(self) -> Any:
        return __getattr__("train")

    @train.setter
    def train(self, module: ModuleType) -> None:
        """Ignore the module: Python stores every imported module in its package, here over the function."""


sys.modules[__name__].__class__ = _Package
