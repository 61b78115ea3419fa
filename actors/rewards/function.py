"""A user's function as a reward: any `module:function` that can be imported."""

from pydantic import Field

from ray_ddpo.actors.rewards.contract import under_contract
from ray_ddpo.actors.rewards.reward import LoadedReward, Reward
from ray_ddpo.common.recipe.registry import import_object


class FunctionReward(Reward):
    """Function of your own, called with (images uint8 [B, H, W, 3], prompts, metadata); it returns scores [B]."""

    path: str = Field(pattern=r"^[\w.]+:\w+$")
    """The function, as `module:function`."""
    independent: bool = False
    """Promise that an image's score has the same bits in any batch. Scores can then be cached."""

    def user_modules(self) -> dict[str, str]:
        return {**super().user_modules(), "path": self.path.partition(":")[0]}

    @property
    def independent_of_batch(self) -> bool:
        return self.independent

    def load(self, device: str) -> LoadedReward:
        """Import the function.

        Raises:
            RewardMistake: the function does not have the signature of a reward (`actors/rewards/contract.py`).
        """
        return under_contract(import_object(self.path, "reward.path"), f"reward.path = {self.path!r}")
