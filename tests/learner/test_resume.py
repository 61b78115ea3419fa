"""Where a run resumes, and which changes of its recipe forbid it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_ddpo.common.policy_weights import pack
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.deploy.driver.components import Components
from ray_ddpo.learner.checkpoints.checkpoint import Checkpoint, save_checkpoint
from ray_ddpo.learner.checkpoints.learner_state import LearnerState
from ray_ddpo.learner.checkpoints.resume import resume_point
from tests.rounds import components_with


def folder_of(components: Components) -> RunFolder:
    return RunFolder(components.recipe.run_path())


def begun(tables: dict, rounds_done: int | None = None) -> RunFolder:
    """Return a run's folder with its recipe, and with a checkpoint if `rounds_done` is given."""
    components = components_with(tables)
    folder = folder_of(components)
    folder.create()
    folder.write_recipe(components.resolved())
    if rounds_done:
        weights = pack(rounds_done, {"a": np.ones((2, 2))})
        state = Checkpoint(rounds_done, LearnerState(rounds_done, (weights,), {}, {}), {"joined": {"a cat": (1.0,)}})
        save_checkpoint(folder.checkpoints, state, keep=2)
    return folder


def test_an_empty_folder_begins_with_or_without_resume(tables: dict) -> None:
    components = components_with(tables)
    assert resume_point(folder_of(components), components.resolved(), resume=True) is None
    assert resume_point(folder_of(components), components.resolved(), resume=False) is None


def test_a_run_is_not_overwritten_unasked(tables: dict) -> None:
    folder = begun(tables)
    with pytest.raises(ValueError, match=f"the run folder {folder.location} exists: resume it with --resume auto"):
        resume_point(folder, components_with(tables).resolved(), resume=False)


def test_a_run_resumes_from_its_newest_checkpoint(tables: dict) -> None:
    folder = begun(tables, rounds_done=7)
    found = resume_point(folder, components_with(tables).resolved(), resume=True)
    assert found is not None and found.rounds_done == 7 and found.statistics == {"joined": {"a cat": (1.0,)}}


def test_a_run_without_a_checkpoint_begins_again(tables: dict) -> None:
    assert resume_point(begun(tables), components_with(tables).resolved(), resume=True) is None


@pytest.mark.rotated(every=5)
@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("seed", 5, "seed was 0 and is 5"),
        ("learner__learning_rate", 2e-3, "learner.learning_rate was 0.001 and is 0.002"),
        pytest.param(
            *("learner__optimizer", "adamw_8bit", "learner.optimizer was 'adamw' and is 'adamw_8bit'"),
            marks=pytest.mark.eight_bit,
        ),
        ("algorithm__clip_range", 2e-4, "algorithm.clip_range was 0.001 and is 0.0002"),
        ("algorithm__advantages__min_count", 3, "algorithm.advantages.min_count was 16 and is 3"),
        ("policy__lora__rank", 8, "policy.lora.rank was 4 and is 8"),
        ("reward__weight", 2.0, "reward.weight was 1.0 and is 2.0"),
        ("reward_workers__batch_size", 2, "reward_workers.batch_size was 64 and is 2"),
        ("max_policy_lag", 1, "max_policy_lag was 0 and is 1"),
        ("runtime__threads", 2, "runtime.threads was 1 and is 2"),
        ("runtime__deterministic", "false", "runtime.deterministic was True and is False"),
        ("runtime__device", "cpu", "runtime.device was 'auto' and is 'cpu'"),
        ("learner__micro_batch_size", 4, "learner.micro_batch_size was 8 and is 4"),
    ],
)
def test_what_decides_the_weights_may_not_change(key: str, value: Any, text: str, tables: dict) -> None:
    folder = begun(tables, rounds_done=7)
    with pytest.raises(
        ValueError, match=f"was made with another recipe: {text}; to train its weights further .* --from "
    ):
        resume_point(folder, components_with(tables, **{key: value}).resolved(), resume=True)


@pytest.mark.rotated(every=4)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rounds", 30),
        ("samplers__count", 4),
        ("samplers__num_cpus", 2),
        ("samplers__straggler_factor", 9.0),
        ("samplers__resources", "{sampler = 1.0}"),
        ("reward_workers__count", 3),
        ("reward_workers__min", 1),
        ("reward_workers__max", 5),
        ("reward_workers__num_cpus", 2),
        ("reward_workers__num_gpus", 1),
        ("reward_workers__resources", "{scorer = 1.0}"),
        ("reward_workers__accelerator_type", "A100"),
        ("reward_workers__timeout_seconds", 9.0),
        ("reward_workers__attempts", 9),
        ("reward_workers__max_dropped", 0),
        ("reward_workers__cache", 9),
        ("learner__num_cpus", 2),
        ("learner__num_gpus", 1),
        ("learner__resources", "{learner = 1.0}"),
        ("learner__accelerator_type", "A100"),
        ("learner__log_prob_tolerance", 0.5),
        ("learner__colocated", "true"),
        ("runtime__ready_seconds", 9.0),
        ("runtime__watchdog_seconds", 9.0),
        ("runtime__max_restarts", 0),
        ("rollouts__keep", "false"),
        ("rollouts__images_every", 5),
        ("media__every", 1),
        ("media__images", 1),
        ("checkpoint__every", 1),
        ("checkpoint__keep", 9),
        ("evaluation__images", 8),
        ("evaluation__split", "tuning"),
    ],
)
def test_what_does_not_decide_the_weights_may_change(key: str, value: Any, tables: dict) -> None:
    found = resume_point(begun(tables, rounds_done=7), components_with(tables, **{key: value}).resolved(), resume=True)
    assert found is not None and found.rounds_done == 7


def test_a_moved_folder_and_other_trackers_are_no_other_recipe(tables: dict, tmp_path: Path) -> None:
    folder = begun(tables, rounds_done=7)
    moved = Path(folder.location).rename(tmp_path / "moved")
    other = {**tables, "output_dir": str(tmp_path), "trackers": [{"name": "tensorboard"}]}
    assert resume_point(RunFolder(moved), components_with(other).resolved(), resume=True) is not None


def test_a_run_from_before_keys_existed_resumes_with_their_defaults_only(tables: dict) -> None:
    components = components_with(tables, learner__world_size=2)
    folder, defaults = begun({**tables, "learner": {**tables["learner"], "world_size": 2}}, 7), components.defaults()
    folder.write_recipe(without_defaults(components.resolved(), defaults))
    now = components.resolved()
    assert "warmup_steps" not in folder.recipe_tables()["learner"]
    assert resume_point(folder, now, resume=True, defaults=defaults) is not None
    for key, value, text in (
        ("learner__warmup_steps", 5, "learner.warmup_steps was 0 and is 5"),
        ("learner__shard_weights", "true", "learner.shard_weights was False and is True"),
        ("algorithm__selection__fraction", 0.5, "algorithm.selection.fraction was 1.0 and is 0.5"),
    ):
        later = components_with(tables, learner__world_size=2, **{key: value})
        with pytest.raises(ValueError, match=text):
            resume_point(folder, later.resolved(), resume=True, defaults=later.defaults())


def without_defaults(resolved: dict, defaults: dict) -> dict:
    """Return the tables without the keys that have their default, as a program without these keys would write them."""
    kept = {}
    for key, value in resolved.items():
        if isinstance(value, dict):
            kept[key] = without_defaults(value, defaults.get(key) or {})
        elif key not in defaults or value != defaults[key]:
            kept[key] = value
    return kept


def test_a_key_given_at_its_default_is_the_same_recipe(tables: dict) -> None:
    folder = begun(tables, rounds_done=7)
    spelled_out = components_with(tables, sampling__eta=1.0, learner__world_size=1, policy__lora__alpha=4)
    assert resume_point(folder, spelled_out.resolved(), resume=True) is not None


def test_of_several_rewards_workers_may_change_and_weights_and_order_may_not(tables: dict) -> None:
    first = {"name": "jpeg_compressibility", "weight": 0.5, "workers": {"count": 1, "batch_size": 4}}
    second = {"name": "animal_classifier"}
    one_reward = {key: value for key, value in tables.items() if key != "reward"}

    def with_rewards(*rewards: dict) -> dict[str, Any]:
        return components_with({**one_reward, "rewards": list(rewards)}).resolved()

    folder = begun({**one_reward, "rewards": [first, second]}, rounds_done=7)
    more = {**first, "workers": {"count": 8, "batch_size": 4, "num_gpus": 0.5}}
    assert resume_point(folder, with_rewards(more, second), resume=True) is not None
    for changed, text in (
        (({**first, "weight": 2.0}, second), "rewards.0.weight was 0.5 and is 2.0"),
        (({**first, "workers": {"batch_size": 8}}, second), "rewards.0.workers.batch_size was 4 and is 8"),
        ((second, first), "rewards.0.name was 'jpeg_compressibility' and is 'animal_classifier'"),
    ):
        with pytest.raises(ValueError, match=text):
            resume_point(folder, with_rewards(*changed), resume=True)


def test_where_files_are_may_change_for_their_fingerprints_say_what_they_are(tables: dict, tmp_path: Path) -> None:
    folder = begun(tables, rounds_done=7)
    (tmp_path / "elsewhere").symlink_to(tables["policy"]["model"], target_is_directory=True)
    moved = components_with(tables, policy__model=str(tmp_path / "elsewhere")).resolved()
    assert resume_point(folder, moved, resume=True, places={"policy.model"}) is not None
    with pytest.raises(ValueError, match="policy.model was .* and is .*elsewhere"):
        resume_point(folder, moved, resume=True)
