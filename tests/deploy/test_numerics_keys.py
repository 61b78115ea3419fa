"""Recipe keys for numerics on GPUs: TF32, batch sizes, and roles that need too many GPUs. Runs without a GPU."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import ray
import torch

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.tables import RuntimeTable
from ray_ddpo.common.runtime import settle
from ray_ddpo.deploy.commands.doctor.resources import place_findings, roles_of
from ray_ddpo.deploy.driver import workers
from ray_ddpo.deploy.driver.components import Components, components_of
from ray_ddpo.deploy.driver.numerics_notes import rows_note
from ray_ddpo.learner.checkpoints.resume import FREE, _differences
from tests.accepted_page import assert_accepted, assert_refused
from tests.deploy.manifests import ROOT


@pytest.fixture
def switches() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_off_or_on_in_convolutions_and_matrix_products_alike(tf32: bool, switches: None) -> None:
    assert_accepted("`runtime.tf32`")
    assert RuntimeTable().tf32 is False
    torch.backends.cudnn.allow_tf32 = not tf32
    settle(RuntimeTable(tf32=tf32))
    assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is tf32


@pytest.mark.parametrize("deterministic", [False, True])
def test_attention_has_the_same_kernels_with_and_without_determinism(deterministic: bool, switches: None) -> None:
    assert_accepted("`runtime.deterministic`")
    cuda = torch.backends.cuda
    cuda.enable_cudnn_sdp(True)
    cuda.enable_flash_sdp(False)
    try:
        settle(RuntimeTable(deterministic=deterministic))
        assert not cuda.cudnn_sdp_enabled()
        assert cuda.flash_sdp_enabled() and cuda.mem_efficient_sdp_enabled() and cuda.math_sdp_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_run_from_before_the_key_resumes() -> None:
    defaults = {"policy": {"compile_blocks": False}, "runtime": {"tf32": False}}
    assert _differences({"policy": {}}, {"policy": {"cuda_graphs": "auto"}}, list(FREE), defaults) == []
    assert _differences({"policy": {}}, {"policy": {"compile_blocks": False}}, [], defaults) == []
    assert _differences({"runtime": {"threads": 1}}, {"runtime": {"threads": 1, "tf32": False}}, [], defaults) == []
    assert _differences({"runtime": {"tf32": True}}, {"runtime": {"tf32": False}}, [], defaults)


def components_of_tables(tables: dict, **changes: Any) -> Components:
    gpus = {"samplers": {"num_gpus": 0.4}, "policy": {**tables["policy"], "dtype": "bfloat16"}}
    return components_of(Recipe.parse({**tables, **gpus, **changes}))


def test_batches_of_different_rows_in_half_precision_are_reported(tables: dict) -> None:
    assert_accepted("different batch rows of sampler and learner on a GPU, in half precision")
    note = rows_note(components_of_tables(tables))
    assert note and "learner.micro_batch_size is 8 and sampling.batch_size 4" in note and 'ratio = "proximal"' in note
    equal = {"learner": {**tables["learner"], "micro_batch_size": 4}}
    for changes in (
        equal,
        {"policy": tables["policy"]},
        {"samplers": {}},
        {"runtime": {"device": "cpu"}},
        {"algorithm": {**tables["algorithm"], "off_policy": {"ratio": "proximal"}}},
        {"algorithm": {"name": "rwr", "noised_samples": 2}},
    ):
        assert rows_note(components_of_tables(tables, **changes)) is None, changes
    auto = {"learner": {**tables["learner"], "micro_batch_size": "auto"}}
    assert "is 'auto' and" in (rows_note(components_of_tables(tables, **auto)) or "")


def test_roles_that_do_not_fit_together_are_refused_at_once(tables: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    scorers = {
        "scorers": [{"name": "jpeg_compressibility", "label": "other"}],
        "every": 1,
        "workers": {"num_gpus": 0.1},
    }
    many = {"samplers": {"count": 3, "num_gpus": 1}, "reward_workers": {"num_gpus": 0.1}, "evaluation": scorers}
    recipe = Recipe.parse({**tables, **many, "learner": {**tables["learner"], "num_gpus": 0.9}})
    node = {"CPU": 64.0, "GPU": 4.0}
    monkeypatch.setattr(ray, "cluster_resources", lambda: node)
    monkeypatch.setattr(workers, "attaches", lambda: False)
    with pytest.raises(ValueError, match="4.1 GPUs = learner 0.9") as refused:
        workers._refuse_too_many_gpus(recipe)
    assert_refused("roles that ask for more GPUs together than the machine has", f"ddpo train: {refused.value}")
    less = recipe.model_copy(update={"learner": recipe.learner.model_copy(update={"num_gpus": 0.8})})
    workers._refuse_too_many_gpus(less)


def test_the_families_recipes_fit_on_the_gpus_that_they_name() -> None:
    files = sorted((ROOT / "deploy" / "recipes" / "families").glob("*.toml"))
    for file in files:
        (count,) = re.findall(r"^# For (\d+) GPUs? of \d+ GB", file.read_text(), re.MULTILINE)
        node = {"CPU": 256.0, "GPU": float(count)}
        assert not [each for each in place_findings(roles_of(Recipe.load(str(file))), [node]) if each.level != "ok"]
    assert len(files) > 15
