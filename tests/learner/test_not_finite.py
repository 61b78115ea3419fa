"""A gradient or weight that is no finite number is never applied, published or written, and names what went wrong."""

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from ray_ddpo import cli
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.learner.algorithms import policy_gradient
from ray_ddpo.learner.checkpoints.checkpoint import load_checkpoint, newest_checkpoint
from ray_ddpo.learner.learner import Learner
from ray_ddpo.learner.optimization.optimizer_steps import NotFinite
from tests.accepted_page import assert_refused
from tests.failure_page import assert_documented
from tests.rounds import components_with, learner_of, sample_round

MODES = {
    "float32": {},
    "bfloat16": {"policy__dtype": "bfloat16"},
    "float16": {"policy__dtype": "float16"},
    "the whole network": {"policy__train": "full"},
}


@contextmanager
def planted(learner: Learner) -> Iterator[None]:
    """Make one number of a gradient NaN at the second optimizer step."""
    parameter = next(iter(learner._parameters.values()))
    calls = []

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) != 2:
            return gradient
        poisoned = gradient.clone()
        poisoned.view(-1)[0] = torch.nan
        return poisoned

    handle = parameter.register_hook(poison)
    try:
        yield
    finally:
        handle.remove()


def is_finite(arrays: dict[str, np.ndarray]) -> bool:
    return all(np.isfinite(array).all() for array in arrays.values())


@pytest.mark.rotated(every=3)
@pytest.mark.parametrize("mode", MODES)
def test_a_step_whose_gradient_is_not_finite_is_not_applied(mode: str, tables: dict) -> None:
    components = components_with(tables, learner__batch_size=2, **MODES[mode])
    learner = learner_of(components)
    sampled = sample_round(components, learner.weights()[-1])
    with planted(learner):
        if mode == "float16":  # an overflow of its scaled gradients looks just so, and is the scaler's daily bread
            metrics, state = learner.update(sampled.batch, *sampled.trajectories)
            assert metrics["optimizer_steps_not_finite"] == metrics["optimizer_steps_skipped"] == 1
            assert metrics["optimizer_steps"] == 4 and np.isfinite(metrics["grad_norm"])
            assert np.isfinite(state.trained.buffer).all()
        else:
            with pytest.raises(NotFinite) as refused:
                learner.update(sampled.batch, *sampled.trajectories)
            text = str(refused.value)
            assert text.startswith(
                "round 0, optimizer step 2 of 4: the loss (policy) is finite and its gradient is not"
            )
            assert "1 of the round's steps" in text and "learner.learning_rate = 0.001" in text
    assert all(value.isfinite().all() for value in learner._parameters.values())
    assert is_finite(learner.state().optimizer)
    assert len(learner.weights()) == 1 and np.isfinite(learner.weights()[-1].buffer).all()


def test_after_the_error_the_learner_resumes_from_its_last_state_to_the_same_bits(tables: dict) -> None:
    components = components_with(tables)
    whole, learner = learner_of(components), learner_of(components)
    sampled = sample_round(components, learner.weights()[-1])
    state = learner.state()
    with planted(learner), pytest.raises(NotFinite):
        learner.update(sampled.batch, *sampled.trajectories)
    learner.load_state(state)
    assert (
        learner.update(sampled.batch, *sampled.trajectories)[1].trained.fingerprint
        == whole.update(sampled.batch, *sampled.trajectories)[1].trained.fingerprint
    )


def test_float16_whose_scaler_has_nothing_left_to_halve_is_at_its_end(tables: dict) -> None:
    components = components_with(tables, policy__dtype="float16", learner__batch_size=2)
    learner = learner_of(components)
    state = learner.state()
    learner.load_state(dataclasses.replace(state, scaler={**state.scaler, "scale": 1.0}))
    sampled = sample_round(components, learner.weights()[-1])
    with planted(learner), pytest.raises(NotFinite, match='"float16" overflows'):
        learner.update(sampled.batch, *sampled.trajectories)


@pytest.mark.parametrize("part", ["policy", "kl"])
def test_the_part_of_the_loss_that_is_not_finite_is_named(
    part: str, tables: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {"policy": "decoupled_surrogate", "kl": "gaussian_kl"}[part]
    whole = getattr(policy_gradient, broken)
    monkeypatch.setattr(policy_gradient, broken, lambda *given: whole(*given) * torch.nan)
    components = components_with({**tables, "algorithm": {"name": "ddpo_is", "kl_coef": 0.1}})
    learner = learner_of(components)
    sampled = sample_round(components, learner.weights()[-1])
    with pytest.raises(NotFinite, match=re.escape(f"optimizer step 1 of 2: the loss ({part}) is not finite")):
        learner.update(sampled.batch, *sampled.trajectories)


def test_weights_that_an_update_makes_infinite_are_never_published(tables: dict) -> None:
    components = components_with(tables, learner__batch_size=8)
    learner = learner_of(components)
    sampled = sample_round(components, learner.weights()[-1])
    parameter = next(iter(learner._parameters.values()))
    learner._optimizer.register_step_post_hook(lambda *_: parameter.data.view(-1)[:1].fill_(torch.inf))
    with pytest.raises(NotFinite, match=r"round 0: the weights \S+ are not finite after it; .* 0.001 is too high"):
        learner.update(sampled.batch, *sampled.trajectories)
    assert [weights.policy_version for weights in learner.weights()] == [0]


@pytest.fixture
def third_round_poisoned(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    whole = Learner._learn_from

    def poisoned(self: Learner, batch: object, trajectories: object) -> None:
        if batch.round != 2:
            return whole(self, batch, trajectories)
        with planted(self):
            return whole(self, batch, trajectories)

    monkeypatch.setattr(Learner, "_learn_from", poisoned)
    return monkeypatch


def train(tables: dict, folder: Path, capfd: pytest.CaptureFixture, *options: str) -> tuple[int, str]:
    import tomli_w

    file = folder / "recipe.toml"
    file.write_text(tomli_w.dumps(tables))
    exit_code = cli.main(["train", str(file), "--serial", *options])
    captured = capfd.readouterr()
    return exit_code, captured.out + captured.err


def test_a_run_ends_with_complete_files_and_resumes(
    tables: dict, tmp_path: Path, capfd: pytest.CaptureFixture, third_round_poisoned: pytest.MonkeyPatch
) -> None:
    tables |= {"rounds": 3}
    tables["learner"] |= {"batch_size": 2}
    exit_code, printed = train(tables, tmp_path, capfd)
    assert_documented("a gradient is not finite", exit_code, printed)
    assert "round 2, optimizer step 2 of 4" in printed
    folder = RunFolder(Recipe.parse(tables).run_path())
    newest = newest_checkpoint(folder.checkpoints)
    assert newest is not None and load_checkpoint(newest).rounds_done == 2
    lora = Path(folder.location) / "lora" / "pytorch_lora_weights.safetensors"
    assert is_finite(load_file(lora))
    third_round_poisoned.undo()
    exit_code, printed = train(tables, tmp_path, capfd, "--resume", "auto")
    assert exit_code == 0 and "round 3/3" in printed and "round 2/3" not in printed
    arrays = load_file(lora)
    name = sorted(arrays)[0]
    arrays[name] = arrays[name].copy()
    arrays[name].flat[0] = np.inf
    from safetensors import safe_open

    with safe_open(lora, "numpy") as file:
        metadata = file.metadata()
    save_file(arrays, lora, metadata)
    for verb in (
        ["report", folder.location],
        ["sample", "--lora", folder.location, "cat"],
        ["evaluate", folder.location],
    ):
        exit_code = cli.main(verb)
        captured = capfd.readouterr()
        assert exit_code == 2 and f"{lora}: the tensor {name}" in captured.err
        assert_refused("weights in a file that are NaN or infinite", captured.err)


def test_a_run_whose_first_gradient_is_not_finite_blames_no_learning_rate(
    tables: dict, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = policy_gradient.decoupled_surrogate
    monkeypatch.setattr(policy_gradient, "decoupled_surrogate", lambda *given: whole(*given) * torch.nan)
    exit_code, printed = train(tables, tmp_path, capfd)
    assert_documented("another gradient is not finite before any step", exit_code, printed)
    assert "learning_rate" not in printed
