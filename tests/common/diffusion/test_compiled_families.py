"""Compiled networks of the families: the latents of networks that are not compiled, and a ratio of exactly 1."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ray_ddpo.common.diffusion import POLICIES
from ray_ddpo.common.diffusion.rollout import sample_trajectories, score
from ray_ddpo.common.recipe.registry import build
from ray_ddpo.common.recipe.tables import SamplingTable
from tests.tiny_families import EDITING, MAKERS, policy_table

PROMPTS, SEEDS = ["a cat", "a dog"], [1, 2]
SAMPLING = SamplingTable(num_steps=3, guidance_scale=3.0)


@pytest.mark.compiled
@pytest.mark.parametrize("blocks", [True, False], ids=["blocks", "network"])
@pytest.mark.parametrize("family", sorted(set(MAKERS) - set(EDITING)))
def test_a_compiled_network_samples_the_same_latents_with_ratio_1(family: str, blocks: bool, tmp_path: Path) -> None:
    model = MAKERS[family](tmp_path)

    def loaded(role: Any, **keys: Any) -> Any:
        policy: Any = build(POLICIES, policy_table(family, model, **keys), "policy").load("cpu", SAMPLING, role)
        if keys:
            policy.compile(len(SEEDS))
        return policy

    keys = {"compile": "both", "compile_blocks": blocks}
    eager = sample_trajectories(loaded("sampler"), PROMPTS, SEEDS, SAMPLING)
    compiled = sample_trajectories(loaded("sampler", **keys), PROMPTS, SEEDS, SAMPLING)
    torch.testing.assert_close(compiled.final_latents, eager.final_latents, rtol=1e-4, atol=1e-4)
    assert torch.equal(score(loaded("learner", **keys), compiled), compiled.log_probs)
