"""A sampler that computes otherwise than the learner: refused by the plain ratio, learned from against the learner's own."""

import pytest
import torch

from deploy.parts import entries_of, parts_of
from learner.weight_check import WeightsDidNotArrive
from tests.rounds import draw_round, learner_of, parts_with

HALF = {"policy__sampler_dtype": "bfloat16"}
OWN = {"algorithm__off_policy__ratio": "proximal"}


def test_the_plain_ratio_is_refused_with_the_keys_that_are_at_odds(tables: dict) -> None:
    with pytest.raises(ValueError, match='sampler_dtype .bfloat16.*ratio = "proximal"'):
        parts_with(tables, **HALF)
    assert entries_of(parts_with(tables, **HALF, **OWN).recipe).policy.numerics_differ
    sf = {**tables, "algorithm": {"name": "ddpo_sf"}}  # looks at no log-prob of the sampler's
    assert parts_of(parts_with(sf, **HALF, learner__batch_size=8).recipe).policy.sampler_dtype == "bfloat16"


def test_the_samplers_rounding_moves_no_ratio_where_it_is_to_the_learners_own_log_probs(tables: dict) -> None:
    parts = parts_with(tables, **HALF, **OWN, learner__batch_size=8)
    learner = learner_of(parts)
    drawn = draw_round(parts, learner.weights()[-1])
    metrics, state = learner.update(drawn.batch, *drawn.trajectories)
    assert metrics["ratio/max_abs_log"] > 1e-4  # the sampler's log-probs are another network's
    assert metrics["clip_fraction"] == 0.0  # and the loss's ratio is 1 before any update
    assert metrics["log_prob_check/max_abs"] < 1e-2
    assert state.weights[-1].fingerprint != drawn.batch.reports[0].fingerprint


def test_with_the_tolerance_of_float32_the_rounding_is_taken_for_other_weights(tables: dict) -> None:
    parts = parts_with(tables, **HALF, **OWN, learner__log_prob_tolerance=1e-5)
    learner = learner_of(parts)
    drawn = draw_round(parts, learner.weights()[-1])
    with pytest.raises(WeightsDidNotArrive, match="sampler and learner compute differently"):
        learner.update(drawn.batch, *drawn.trajectories)


def test_a_merged_sampler_in_float32_stays_within_the_usual_tolerance(tables: dict) -> None:
    parts = parts_with(tables, policy__merge_adapters=True)
    learner = learner_of(parts)
    drawn = draw_round(parts, learner.weights()[-1])
    metrics, _ = learner.update(drawn.batch, *drawn.trajectories)
    assert 0 < metrics["ratio/max_abs_log"] < 1e-5


@pytest.mark.compiled
def test_compiled_both_learn_the_same_as_eager_within_rounding(tables: dict) -> None:
    def learned(**keys: str) -> tuple[dict[str, float], torch.Tensor]:
        parts = parts_with(tables, **keys)
        learner = learner_of(parts)
        start = torch.cat([torch.from_numpy(each.copy()).flatten() for each in learner.weights()[-1].arrays().values()])
        drawn = draw_round(parts, learner.weights()[-1])
        metrics, state = learner.update(drawn.batch, *drawn.trajectories)
        after = torch.cat([torch.from_numpy(each.copy()).flatten() for each in state.weights[-1].arrays().values()])
        return metrics, after - start

    (eager, moved), (compiled, moved_too) = learned(), learned(policy__compile="both")
    assert compiled["ratio/max_abs_log"] < 1e-5
    assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-3, abs=1e-5)
    # Of AdamW's steps, which hardly depend on a gradient's size, most are the same.
    assert torch.nn.functional.cosine_similarity(moved, moved_too, dim=0) > 0.99
