"""A function of the user's as a reward: any `module:function` that can be imported, or a Python object."""

from collections.abc import Callable
from typing import Any

from pydantic import Field, PrivateAttr

from ray_ddpo.actors.rewards.contract import under_contract
from ray_ddpo.actors.rewards.reward import LoadedReward, Reward
from ray_ddpo.common.recipe.registry import import_object
from ray_ddpo.common.user_code.by_value import is_by_value, reference, source_of


class Function(Reward):
    """`path` is module:function; the function takes (images uint8 [B,H,W,3], prompts, metadata) and returns [B]: contract.py.

    A function that no module holds, such as a lambda, is handed over by `Function.of` and travels by value.
    """

    path: str = Field(pattern=r"^([\w.]+:\w+|<python>:.+)$")
    independent: bool = False  # whether it scores an image alike, to the bit, in whatever batch
    _given: Callable[..., Any] | None = PrivateAttr(default=None)

    @classmethod
    def of(cls, function: Callable[..., Any], independent: bool = False) -> "Function":
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
