"""Check before anything is sampled that the rewards can score the run's prompts."""

from collections.abc import Iterable

from ray_ddpo.actors.evaluation.eval_set import build_eval_set
from ray_ddpo.actors.rewards import REWARDS
from ray_ddpo.actors.rewards.reward import Reward
from ray_ddpo.common.prompts import Prompt, PromptList
from ray_ddpo.common.user_code.blame import call_if_own
from ray_ddpo.deploy.driver.components import Components
from ray_ddpo.deploy.driver.trial_prompts import MOST_CHECKED, trial_prompts


def check_rewards_prompts(components: Components, trains: bool = True) -> None:
    """Check the run's prompts with the rewards, and the prompts of evaluation with rewards and scorers.

    If a function samples the prompts, two of its prompts represent the run's. Without `trains`, only the prompts of
    evaluation are checked.

    Raises:
        ValueError: a reward cannot score a prompt; the message names the prompt.
    """
    checked = {
        name: reward
        for name, reward in (components.rewards | components.scorers).items()
        if type(reward).check_prompts is not Reward.check_prompts
    }
    if not checked:
        return
    source = components.prompts
    own: Iterable[Prompt] = ()
    if trains:
        own = source.sampled() if isinstance(source, PromptList) else trial_prompts(components)
    evaluated = build_eval_set(components.recipe.evaluation, source).prompts
    for name, reward in checked.items():
        prompts = [*(own if name in components.rewards else ()), *evaluated][:MOST_CHECKED]
        call_if_own(reward, REWARDS, "check_prompts", prompts)
