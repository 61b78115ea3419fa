"""The program compared with TRL 0.23.1: equal noise and rewards give equal trajectories, losses and gradients.

Both compute in float32 with the same kernels, in batches composed differently: so they differ by rounding and no more.
Each tolerance is a few times what was measured.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.parity.our_side import described, prompted, rewards_of
from tests.parity.sides import BothSides, run_both
from tests.rounds import components_with
from tests.tiny_pipeline import save_tiny_pipeline

pytestmark = pytest.mark.parity

ANIMALS = ("cat", "dog", "horse", "bear")  # of eight images, some animals have several and some hardly any
ON_POLICY = {  # one optimizer step on a whole round, its gradient as it is
    "sampling__num_steps": 8,
    "sampling__guidance_scale": 5.0,
    "algorithm__clip_range": 1e-4,
    "algorithm__advantages__kind": "round",
    "learner__batch_size": 4,
    "learner__gradient_accumulation_steps": 2,
    "learner__micro_batch_size": 16,
    "learner__max_grad_norm": 1e9,
    "rounds": 1,
}
THREE_ROUNDS = {  # two optimizer steps a round, of two batches each; the norm is limited
    "sampling__num_steps": 6,
    "sampling__guidance_scale": 5.0,
    "algorithm__clip_range": 2e-4,
    "algorithm__advantages__buffer_size": 5,
    "algorithm__advantages__min_count": 3,
    "learner__batch_size": 2,
    "learner__gradient_accumulation_steps": 2,
    "learner__micro_batch_size": 12,
    "learner__max_grad_norm": 0.01,
    "learner__weight_decay": 0.1,
    "rounds": 3,
}
STALE = {  # the policy goes on over the same round, until the clip holds it
    "sampling__num_steps": 6,
    "sampling__guidance_scale": 2.0,
    "sampling__eta": 0.6,
    "algorithm__clip_range": 1e-3,
    "algorithm__advantage_clip": 0.9,
    "algorithm__advantages__kind": "round",
    "learner__inner_epochs": 3,
    "learner__learning_rate": 3e-3,
    "learner__micro_batch_size": 24,
    "rounds": 1,
}


def assert_equal_but_for_rounding(both: BothSides, clip_range: float) -> None:
    assert both.trl.keys() == both.ours.keys()
    scale = float(np.abs(both.all_of("latents")[0]).max())
    names = ("log_probs", "advantages", "ratios", "losses")
    seen = {"latents / largest": both.largest_difference("latents") / scale}
    seen |= {name: both.largest_difference(name) for name in names}
    seen |= {"gradient": np.max(both.gradient_errors()), "movement": np.max(both.movement_errors())}
    print(", ".join(f"{name} {value:.1e}" for name, value in seen.items()))
    # At the clip's edge a pair has its whole gradient or none: rounding would choose. Another seed, should it come
    # near.
    assert np.abs(np.abs(both.all_of("ratios")[0] - 1) - clip_range).min() > 2e-6
    assert seen["latents / largest"] < 1e-5
    assert seen["log_probs"] < 3e-6  # of values to 2.6: float32 has 2.4e-7 there
    assert seen["advantages"] < 3e-6  # TRL has the statistics in float32, we in float64
    assert seen["ratios"] < 6e-6
    assert seen["losses"] < 6e-6  # advantage × ratio
    assert seen["gradient"] < 1e-4  # deviations divided by the last steps' small σ
    assert (
        seen["movement"] < 1e-3
    )  # 7e-4 where v is predicted; AdamW divides by the gradient's size, also where there is next to none


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_round_and_one_update_are_those_of_trl(prediction_type: str, tables: dict, tmp_path: Path) -> None:
    model = save_tiny_pipeline(tmp_path / "model", prediction_type=prediction_type)
    components = components_with(prompted(tables, tmp_path, *ANIMALS), **ON_POLICY, policy__model=model)
    both = run_both(components, rewards_of(components.recipe), tmp_path / "job")
    assert_equal_but_for_rounding(both, clip_range=1e-4)
    assert np.abs(both.ours["round0/ratios"] - 1).max() < 1e-6  # before any update
    pixels = (both.trl["round0/images"].transpose(0, 2, 3, 1) * 255).round()
    assert np.abs(pixels - both.ours["round0/images"]).max() <= 1  # a value may lie on the edge between two


def test_three_rounds_with_statistics_of_each_prompt_are_those_of_trl(tables: dict, tmp_path: Path) -> None:
    components = components_with(prompted(tables, tmp_path, *ANIMALS), **THREE_ROUNDS)
    rewards = rewards_of(components.recipe)
    rounds = described(components, rewards)
    first, all_rounds = Counter(rounds[0]["prompts"]), Counter(sum((one["prompts"] for one in rounds), []))
    assert min(first.values()) < 3 <= max(first.values())  # below and above min_count
    assert max(all_rounds.values()) > 5  # and a ring that has lost its oldest
    both = run_both(components, rewards, tmp_path / "job")
    assert_equal_but_for_rounding(both, clip_range=2e-4)
    assert len(both.gradient_errors()) == 6
    last = [both.trl[f"round2/step1/gradient/{name}"] for name in both.start]
    assert np.sqrt(sum(float((gradient**2).sum()) for gradient in last)) == pytest.approx(0.01, rel=1e-3)  # limited


def test_an_update_on_stale_data_is_clipped_as_in_trl(tables: dict, tmp_path: Path) -> None:
    components = components_with(prompted(tables, tmp_path, *ANIMALS), **STALE)
    both = run_both(components, rewards_of(components.recipe), tmp_path / "job")
    assert_equal_but_for_rounding(both, clip_range=1e-3)
    ratios, advantages = both.ours["round0/ratios"], both.ours["round0/advantages"][:, np.newaxis]
    held = ((ratios > 1 + 1e-3) & (advantages > 0)) | ((ratios < 1 - 1e-3) & (advantages < 0))
    print(f"{held.mean():.0%} of the pairs have no gradient, {(np.abs(ratios - 1) > 1e-3).mean():.0%} are outside")
    assert 0.1 < held.mean() < 0.9
    assert (np.abs(ratios - 1) > 1e-3).mean() > held.mean()  # on the other side the clip does not hold
    assert np.abs(advantages).max() > 0.9  # and the advantage's own limit has something to do
