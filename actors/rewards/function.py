"""A function of the user's as a reward: any `module:function` that can be imported, or a Python object."""

from collections.abc import Callable
from typing import Any

from pydantic import Field, PrivateAttr

from ray_ddpo.actors.rewards.contract import under_contract
from ray_ddpo.actors.rewards.reward import LoadedReward, Reward
from ray_ddpo.common.recipe.registry import import_object
from ray_ddpo.common.user_code.by_value import is_by_value, reference, source_of


class FunctionReward(Reward):
    """Function of your own, called with (images uint8 [B, H, W, 3], prompts, metadata); it returns scores [B].

    A function that no module holds, such as a lambda, is handed over by `FunctionReward.of` and travels by value.
    """

    path: str = Field(pattern=r"^([\w.]+:\w+|<python>:.+)$")
    """The function, as `module:function`."""
    independent: bool = False
    """Promise that an image's score has the same bits in any batch. Scores can then be cached."""
    _given: Callable[..., Any] | None = PrivateAttr(default=None)

    @classmethod
    def of(cls, function: Callable[..., Any], independent: bool = False) -> "FunctionReward":
        """Make the reward of a Python function. If its module can be imported, only its path is kept."""
        reward = cls(path=reference(function), independent=independent)
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

    def load(self, device: str) -> LoadedReward:
        """Import the function, if it was not handed over.

        Raises:
            RewardMistake: the function cannot be called as a reward is (`actors/rewards/contract.py`).
            ValueError: there is no such function, or it was handed over to an earlier process only.
        """
        if self._given is None and is_by_value(self.path):
            raise ValueError(
                f"reward.path is {self.path!r}: this function was handed to train() by a Python program, and no file holds it: "
                "hand it over again with Run(folder).report(reward=…) or train(…, reward=…, resume=True), or name one of a "
                'module with --reward \'{ name = "function", path = "module:function" }\''
            )
        function = self._given or import_object(self.path, "reward.path")
        who = f"reward={self.path.partition(':')[2]}" if self._given else f"reward.path = {self.path!r}"
        return under_contract(function, who)
