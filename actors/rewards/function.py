"""A function of the user's as a reward: any `module:function` that can be imported, or a Python object."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pydantic import Field, PrivateAttr

from ray_ddpo.actors.rewards.contract import (
    asks_for_clips,
    asks_for_inputs,
    check_signature,
    requires_inputs,
    under_contract,
)
from ray_ddpo.actors.rewards.reward import Images, LoadedReward, Reward, RewardMistake
from ray_ddpo.common.differentiable_reward import DifferentiableReward
from ray_ddpo.common.prompts import Prompt, refuse_without_inputs
from ray_ddpo.common.recipe.registry import import_object
from ray_ddpo.common.user_code.by_value import is_by_value, reference, source_of


class FunctionReward(Reward):
    """Function of your own, called with (images uint8 [B, H, W, 3], prompts, metadata); it returns scores [B].

    If it has a parameter `inputs`, it gets the prompts' input images, at the images' size. With a default, prompts may
    have none. If its first parameter is called `clips`, it gets complete clips of a video family, uint8 [B, F, H, W, 3].
    A function that no module holds, such as a lambda, is handed over by `FunctionReward.of` and travels by value.
    """

    path: str = Field(pattern=r"^([\w.]+:\w+|<python>:.+)$")
    """The function, as `module:function`."""
    independent: bool = False
    """Promise that an image's score has the same bits in any batch. Scores can then be cached."""
    differentiable: bool = False
    """Call the function with a float tensor [B, 3, H, W] from 0 to 1 instead. It returns a tensor [B] with a gradient."""
    _given: Callable[..., Any] | None = PrivateAttr(default=None)

    @classmethod
    def of(
        cls, function: Callable[..., Any], independent: bool = False, differentiable: bool = False
    ) -> "FunctionReward":
        """Make the reward of a Python function. If its module can be imported, only its path is kept."""
        reward = cls(path=reference(function), independent=independent, differentiable=differentiable)
        if is_by_value(reward.path):
            reward._given = function
        return reward

    def user_modules(self) -> dict[str, str]:
        return {**super().user_modules(), **({} if is_by_value(self.path) else {"path": self.path.partition(":")[0]})}

    def user_texts(self) -> dict[str, str]:
        return {**super().user_texts(), **({"path": source_of(self._given)} if self._given else {})}

    @property
    def independent_of_batch(self) -> bool:
        return self.independent

    @property
    def takes_clips(self) -> bool:
        try:
            return asks_for_clips(self._function())
        except ValueError:  # loading reports it
            return False

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        try:
            function = self._function()
        except ValueError:  # loading reports it
            return
        self._refuse_arrays_with_gradient(function)
        if requires_inputs(function):
            refuse_without_inputs(prompts, self.users_code)

    def _refuse_arrays_with_gradient(self, function: Any) -> None:
        """Raise RewardMistake if the function is called with tensors, and asks for input images or clips."""
        asked = "inputs" if asks_for_inputs(function) else "clips" if asks_for_clips(function) else None
        if self.differentiable and asked:
            raise RewardMistake(
                f"{self.users_code} has a parameter {asked}, and differentiable is true: a differentiable function "
                "gets images, prompts and metadata alone; leave one of the two out"
            )

    def _function(self) -> Any:
        """Return what the path names, which is no function if the user mistook it.

        Raises:
            ValueError: it was handed over to an earlier process only.
        """
        if self._given is None and is_by_value(self.path):
            raise ValueError(
                f"reward.path is {self.path!r}: this function was handed to train() by a Python program, and no file holds it: "
                "hand it over again with Run(folder).report(reward=…) or train(…, reward=…, resume=True), or name one of a "
                'module with --reward \'{ name = "function", path = "module:function" }\''
            )
        return self._given or import_object(self.path, "reward.path")

    def load(self, device: str) -> LoadedReward:
        """Import the function, if it was not handed over.

        Raises:
            RewardMistake: the function cannot be called as a reward is (`actors/rewards/contract.py`).
            ValueError: there is no such function, or it was handed over to an earlier process only.
        """
        function = self._function()
        self._refuse_arrays_with_gradient(function)
        called = _on_arrays(function, device) if self.differentiable else function
        return under_contract(called, self.users_code, not self.differentiable and asks_for_inputs(function))

    @property
    def users_code(self) -> str:
        """Return the key and value that name the function."""
        return f"reward={self.path.partition(':')[2]}" if self._given else f"reward.path = {self.path!r}"

    @property
    def is_differentiable(self) -> bool:
        return self.differentiable

    def load_differentiable(self, device: str) -> DifferentiableReward:
        """Import the function, as `load` does."""
        if not self.differentiable:
            return super().load_differentiable(device)
        self.load(device)  # the same checks
        function: Callable[..., Any] = self._given or import_object(self.path, "reward.path")
        return lambda pixels, prompts, metadata: _scores(function(pixels, prompts, metadata))


def _scores(answer: Any) -> Any:
    """Return the scores of (scores, metadata), as TRL's functions return them."""
    return answer[0] if isinstance(answer, tuple) and len(answer) == 2 else answer


def _on_arrays(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """Return a function on tensors as one on uint8 images, as reward workers call it."""
    check_signature(function, f"{getattr(function, '__name__', type(function).__name__)}")

    def score(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
        import torch

        with torch.no_grad():
            pixels = torch.from_numpy(np.array(images)).to(device).permute(0, 3, 1, 2).float() / 255
            return _scores(function(pixels, prompts, metadata))

    return score
