"""The known differences of TRL 0.23.1, shown exactly."""

from pathlib import Path

import numpy as np
import pytest

from ray_ddpo.deploy.driver.components import Components
from ray_ddpo.learner.algorithms.advantages import extend_statistics, per_prompt_advantages
from tests.parity.our_side import described, prompted, rewards_of
from tests.parity.sides import run_both, run_ours
from tests.rounds import components_with
from tests.tiny_pipeline import save_tiny_pipeline

pytestmark = pytest.mark.parity

SHORT = {
    "rounds": 1,
    "sampling__num_steps": 4,
    "learner__batch_size": 4,
    "learner__gradient_accumulation_steps": 2,
    "learner__micro_batch_size": 8,
    "algorithm__advantages__buffer_size": 8,
    "algorithm__advantages__min_count": 2,
}


def our_advantages(components: Components, rewards: list[np.ndarray], prompts: list[str]) -> np.ndarray:
    """Return our advantages of the first round with these prompts."""
    settings = components.algorithm.advantages
    statistics = extend_statistics({}, prompts, rewards[0], settings.buffer_size)
    return per_prompt_advantages(statistics, prompts, rewards[0], settings.min_count)


def test_trl_gives_prompts_that_its_tokenizer_cannot_tell_apart_the_same_statistics(
    tables: dict, tmp_path: Path
) -> None:
    tables = prompted(tables, tmp_path, "Elephant", "elephants")  # the tiny tokenizer has room for six letters
    components = components_with(tables, **SHORT)
    rewards = rewards_of(components.recipe)
    prompts = described(components, rewards)[0]["prompts"]
    assert {prompts.count("Elephant"), prompts.count("elephants")}.isdisjoint({0, 1})
    both = run_both(components, rewards, tmp_path / "job")
    assert both.trl["round0/advantages"] == pytest.approx(our_advantages(components, rewards, ["elepha"] * 8), abs=1e-5)
    assert both.ours["round0/advantages"] == pytest.approx(our_advantages(components, rewards, prompts), abs=1e-5)
    assert both.largest_difference("advantages") > 0.01


def test_trl_truncates_the_advantages_of_integers_to_integers(tables: dict, tmp_path: Path) -> None:
    tables = prompted(tables, tmp_path, "cat")
    components = components_with(tables, **SHORT)
    rewards = [np.array([3, 1, 4, 1, 5, 9, 2, 6])]  # such as file sizes in bytes, or votes
    both = run_both(components, rewards, tmp_path / "job")
    assert both.trl["round0/advantages"].tolist() == [0, -1, 0, -1, 0, 1, 0, 0]  # of the array that held the rewards
    assert both.ours["round0/advantages"] == pytest.approx((rewards[0] - 3.875) / np.sqrt(6.609375), abs=1e-5)


def test_trl_takes_the_last_step_as_if_alpha_never_came_to_one(tables: dict, tmp_path: Path) -> None:
    tables = prompted(tables, tmp_path, "cat")
    model = save_tiny_pipeline(tmp_path / "to_one", set_alpha_to_one=True)
    components = components_with(tables, **SHORT, policy__model=model)
    rewards = rewards_of(components.recipe)
    both = run_both(components, rewards, tmp_path / "job")
    # Ours ends at ᾱ = 1, as diffusers does: a step without noise, so not one to learn from.
    assert both.ours["round0/log_probs"].shape == (8, 3)
    assert both.trl["round0/log_probs"][:, :3] == pytest.approx(both.ours["round0/log_probs"], abs=3e-6)
    # TRL never reads the scheduler's last ᾱ: its path is ours on a scheduler without set_alpha_to_one.
    other = components_with(tables, **SHORT)
    assert both.trl["round0/latents"] == pytest.approx(run_ours(other, rewards)["round0/latents"], abs=1e-4)


def test_in_half_precision_trl_s_ratio_is_far_from_one_before_any_update(tables: dict, tmp_path: Path) -> None:
    tables = prompted(tables, tmp_path, "cat")
    components = components_with(tables, **SHORT, policy__dtype="bfloat16", algorithm__clip_range=1e-4)
    both = run_both(components, rewards_of(components.recipe), tmp_path / "job")
    # It scores the latents that it samples before it rounds them, and later those that it has rounded.
    outside = {
        name: np.abs(side["round0/ratios"] - 1) > 1e-4 for name, side in (("trl", both.trl), ("ours", both.ours))
    }
    print({name: f"{value.mean():.1%}" for name, value in outside.items()}, outside["trl"].mean((0, 1)))
    assert outside["trl"].mean() > 0.1 and not outside["ours"].any()
