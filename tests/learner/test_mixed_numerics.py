"""Samplers and learner of different numerics: refused with the behavior ratio, accepted with the proximal one."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ray_ddpo.common.diffusion import diffusers_policy
from ray_ddpo.common.diffusion.compiled import CompiledNetwork
from ray_ddpo.common.diffusion.families.stable_diffusion import StableDiffusion
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.deploy.driver.components import build_components, components_of
from ray_ddpo.learner.weight_check import WeightsDidNotArrive, computes_as_samplers
from tests.conftest import small_tables
from tests.model_copies import copied
from tests.rounds import components_with, learner_of, moved, sample_round

HALF = {"policy__sampler_dtype": "bfloat16"}
OWN = {"algorithm__off_policy__ratio": "proximal"}


def test_the_plain_ratio_is_refused_with_the_keys_that_are_at_odds(tables: dict) -> None:
    with pytest.raises(ValueError, match='sampler_dtype .bfloat16.*ratio = "proximal"'):
        components_with(tables, **HALF)
    assert components_of(components_with(tables, **HALF, **OWN).recipe).policy.numerics_differ
    sf = {**tables, "algorithm": {"name": "ddpo_sf"}}  # looks at no log-prob of the sampler's
    assert (
        build_components(components_with(sf, **HALF, learner__batch_size=8).recipe).policy.sampler_dtype == "bfloat16"
    )


def test_the_samplers_rounding_changes_no_proximal_ratio(tables: dict) -> None:
    components = components_with(tables, **HALF, **OWN, learner__batch_size=8)
    learner = learner_of(components)
    sampled = sample_round(components, learner.weights()[-1])
    metrics, state = learner.update(sampled.batch, *sampled.trajectories)
    assert metrics["ratio/max_abs_log"] > 1e-5  # the sampler's log-probs are another network's
    assert metrics["clip_fraction"] == 0.0  # and the loss's ratio is 1 before any update
    assert metrics["log_prob_check/rounding"] > 1e-5
    assert metrics["log_prob_check/max_abs"] == 0.0  # computed as the sampler does, they are the same bits
    assert state.weights[-1].fingerprint != sampled.batch.reports[0].fingerprint


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize("lag", [0, 1])
def test_no_rounding_ends_a_run_and_weights_that_did_not_arrive_do(lag: int, tables: dict) -> None:
    """The tolerance is far below rounding in half precision: equal numerics are compared."""
    keys = {"learner__log_prob_tolerance": 1e-9, "learner__batch_size": 8, "max_policy_lag": lag}
    components = components_with(tables, **HALF, **OWN, **keys)
    learner = learner_of(components)
    for round_index in range(2):
        claimed = learner.weights()[0]
        sampled = sample_round(components, claimed, round_index)
        wrong = sample_round(components, moved(claimed, seed=2), round_index)
        with pytest.raises(WeightsDidNotArrive, match="in the sampler's numerics"):
            learner.update(wrong.with_reports(fingerprint=claimed.fingerprint), *wrong.trajectories)
        learner.update(sampled.batch, *sampled.trajectories)


def test_merged_adapters_in_half_precision_are_compared_with_merged_ones(tables: dict) -> None:
    keys = {"policy__dtype": "bfloat16", "policy__merge_adapters": True, "learner__log_prob_tolerance": 1e-9}
    components = components_with(tables, **OWN, **keys)
    learner = learner_of(components)
    sampled = sample_round(components, learner.weights()[-1])
    metrics, _ = learner.update(sampled.batch, *sampled.trajectories)
    assert metrics["log_prob_check/rounding"] > 0.0


def test_a_second_network_is_kept_only_where_the_first_computes_otherwise() -> None:
    def computes_alike(micro_batch_size: int | str, **keys: Any) -> bool:
        tables = small_tables(Path("nowhere"), Path("nowhere"))
        tables["learner"] |= {"micro_batch_size": micro_batch_size}
        return computes_as_samplers(StableDiffusion(model="tiny_animals", **keys), Recipe.parse(tables))

    assert computes_alike(8) and computes_alike(8, dtype="bfloat16") and computes_alike(8, merge_adapters=True)
    assert computes_alike(4, dtype="bfloat16", compile="both")
    assert not computes_alike(8, dtype="bfloat16", compile="both")
    assert not computes_alike("auto", dtype="bfloat16", compile="both")
    assert not computes_alike(8, sampler_dtype="bfloat16")
    assert not computes_alike(4, dtype="bfloat16", merge_adapters=True, compile="both")


def test_a_merged_sampler_in_float32_stays_within_the_usual_tolerance(tables: dict) -> None:
    components = components_with(tables, policy__merge_adapters=True)
    learner = learner_of(components)
    sampled = sample_round(components, learner.weights()[-1])
    metrics, _ = learner.update(sampled.batch, *sampled.trajectories)
    assert 0 < metrics["ratio/max_abs_log"] < 1e-5


@pytest.fixture(scope="module")
def one_block_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline with one down and one up block, which compiles in a third of the time of the tiny network."""
    from diffusers import UNet2DConditionModel

    folder = copied(tiny_model, tmp_path_factory.mktemp("one_block") / "model")
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    ).save_pretrained(folder / "unet")
    return folder


ONE_SHAPE = {"learner__micro_batch_size": 4}  # as a sampler's rows, so that each network is compiled for them alone


@pytest.mark.compiled
def test_compiled_both_learn_the_same_as_eager_within_rounding(one_block_model: Path, tmp_path: Path) -> None:
    def learned(**keys: str) -> tuple[dict[str, float], torch.Tensor]:
        components = components_with(small_tables(one_block_model, tmp_path), **ONE_SHAPE, **keys)
        learner = learner_of(components)
        start = torch.cat([torch.from_numpy(each.copy()).flatten() for each in learner.weights()[-1].arrays().values()])
        sampled = sample_round(components, learner.weights()[-1])
        metrics, state = learner.update(sampled.batch, *sampled.trajectories)
        after = torch.cat([torch.from_numpy(each.copy()).flatten() for each in state.weights[-1].arrays().values()])
        return metrics, after - start

    (eager, moved), (compiled, moved_too) = learned(), learned(policy__compile="both")
    assert compiled["ratio/max_abs_log"] < 1e-5
    assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-3, abs=1e-5)
    # Of AdamW's steps, which hardly depend on a gradient's size, most are the same.
    assert torch.nn.functional.cosine_similarity(moved, moved_too, dim=0) > 0.99


class RoundsByGradMode(CompiledNetwork):
    """Imitate a network that is compiled again without gradients and then rounds otherwise. Nothing is compiled."""

    def __init__(self, call: Callable[..., Tensor], rows: int, blocks: Iterable[nn.Module] = ()) -> None:
        self._call = call

    def __call__(self, **inputs: Tensor) -> Tensor:
        output = self._call(**inputs)
        return output if torch.is_grad_enabled() else output * 1.01


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.compiled)])
def test_compiled_in_half_precision_the_proximal_ratio_is_1_until_the_weights_move(
    real: bool, one_block_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ratio is 1 at both optimizer steps of a round, because a rate of 1e-30 changes no float32 weight."""
    if not real:
        monkeypatch.setattr(diffusers_policy, "CompiledNetwork", RoundsByGradMode)
    tables = small_tables(one_block_model, tmp_path)
    keys = {"policy__dtype": "bfloat16", "policy__compile": "both", "algorithm__clip_range": 1e-12}
    still = {"learner__learning_rate": 1e-30, "learner__weight_decay": 0, "learner__batch_size": 4}
    components = components_with(tables, **OWN, **keys, **still, **ONE_SHAPE)
    learner = learner_of(components)
    sampled = sample_round(components, learner.weights()[-1])
    metrics, state = learner.update(sampled.batch, *sampled.trajectories)
    assert state.weights[-1].fingerprint == sampled.batch.reports[0].fingerprint
    assert metrics["optimizer_steps"] == 2 and metrics["clip_fraction"] == 0.0
    limited = np.float32(sampled.batch.advantages).clip(-5, 5)
    assert metrics["loss"] == pytest.approx(-float(limited.mean()), rel=1e-5)
