"""ddpo migrate: every field of TRL's DDPOConfig has a recipe key or a reason, and the recipe trains."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from ray_ddpo.actors.rewards.function import FunctionReward
from ray_ddpo.cli import main
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.deploy.commands.migrate.migrate import Migrated, migrate, read_config
from ray_ddpo.deploy.commands.migrate.trl_config import COUNTERPARTS, DDPOConfig, TrlRun
from ray_ddpo.deploy.driver.components import build_components

ROOT = Path(__file__).parents[2]
SD15 = (1, "stable-diffusion-v1-5/stable-diffusion-v1-5", "aesthetic")  # processes, model and reward
# trl/trainer/ddpo_config.py of TRL 0.23.1, in its order, with the defaults that it has.
FIELDS: dict[str, Any] = {
    **{"run_name": "", "seed": 0, "log_with": None, "tracker_kwargs": {}, "accelerator_kwargs": {}},
    **{"project_kwargs": {}, "tracker_project_name": "trl", "logdir": "logs", "num_epochs": 100, "save_freq": 1},
    **{"num_checkpoint_limit": 5, "mixed_precision": "fp16", "allow_tf32": True, "resume_from": ""},
    **{"sample_num_steps": 50, "sample_eta": 1.0, "sample_guidance_scale": 5.0, "sample_batch_size": 1},
    **{"sample_num_batches_per_epoch": 2, "train_batch_size": 1, "train_use_8bit_adam": False},
    **{"train_learning_rate": 3e-4, "train_adam_beta1": 0.9, "train_adam_beta2": 0.999},
    **{"train_adam_weight_decay": 1e-4, "train_adam_epsilon": 1e-8, "train_gradient_accumulation_steps": 1},
    **{"train_max_grad_norm": 1.0, "train_num_inner_epochs": 1, "train_cfg": True, "train_adv_clip_max": 5.0},
    **{"train_clip_range": 1e-4, "train_timestep_fraction": 1.0, "per_prompt_stat_tracking": False},
    **{"per_prompt_stat_tracking_buffer_size": 16, "per_prompt_stat_tracking_min_count": 16},
    **{"async_reward_computation": False, "max_workers": 2, "negative_prompts": "", "push_to_hub": False},
}
BLOG = {"num_epochs": 200, "sample_batch_size": 6, "train_batch_size": 3, "sample_num_batches_per_epoch": 4}
BLOG |= {"per_prompt_stat_tracking": True, "per_prompt_stat_tracking_buffer_size": 32}
LOST = {
    "log_with": "trackio",
    "tracker_kwargs": {"trackio": {"space": "x"}},
    "accelerator_kwargs": {"cpu": True},
    "project_kwargs": {"logging_dir": "logs"},
    "mixed_precision": "no",
    "resume_from": "save/checkpoints",
    "train_use_8bit_adam": True,
    "train_cfg": False,
    "push_to_hub": True,
}


def paragraphs(migrated: Migrated, heading: str) -> str:
    """The fields' lines under a heading."""
    rest = migrated.notes[migrated.notes.index(heading) + 1 :]
    return "\n".join(note for note in rest if note.startswith("- "))


def recipe_of(migrated: Migrated) -> Recipe:
    return Recipe.parse(tomllib.loads(migrated.toml))


def test_the_fields_and_defaults_are_those_of_trl() -> None:
    assert list(DDPOConfig.model_fields) == ["exp_name", *FIELDS] == list(COUNTERPARTS)
    defaults = DDPOConfig().model_dump(exclude={"exp_name"})  # TRL's is the name of the script that runs
    assert defaults == FIELDS
    assert {key: type(value) for key, value in defaults.items()} == {key: type(value) for key, value in FIELDS.items()}


@pytest.mark.parametrize("config", [{}, BLOG, LOST, {"async_reward_computation": True, "log_with": "wandb"}])
def test_every_field_is_named_once_in_the_notes(config: dict) -> None:
    text = "\n".join(migrate(config, *SD15).notes)
    for field in COUNTERPARTS:
        names = [word for word in text.replace(",", " ").replace(":", " ").split() if word.strip(".") == field]
        assert len(names) - (field == COUNTERPARTS[field].key) == 1, (field, names)


def test_a_default_config_gives_trls_arithmetic() -> None:
    recipe = recipe_of(migrate({}, *SD15))
    assert (recipe.rounds, recipe.images_per_round, recipe.learner.images_per_step) == (100, 2, 1)
    assert (recipe.learner.micro_batch_size, recipe.max_policy_lag, recipe.trackers) == (2, 0, ())
    assert build_components(recipe).algorithm.advantages.kind == "round"


def test_the_blogs_config_is_the_recipe_that_ships() -> None:
    migrated = build_components(recipe_of(migrate(BLOG, *SD15))).resolved()
    shipped = build_components(Recipe.load(ROOT / "deploy/recipes/sd15_aesthetic.toml")).resolved()
    differing = {key for key in shipped if shipped[key] != migrated[key]}
    assert differing == {"name", "checkpoint", "evaluation", "learner"}  # the shipped one is evaluated on the same GPU
    assert migrated["learner"] == {**shipped["learner"], "num_gpus": 0.6}
    assert (migrated["checkpoint"], shipped["checkpoint"]["keep"]) == ({"every": 1, "keep": 5}, 2)


def test_what_has_no_counterpart_is_named_with_its_reason() -> None:
    lost = paragraphs(migrate(LOST, *SD15), "Without a counterpart:")
    expected = (LOST.keys() | {"allow_tf32"}) - {"mixed_precision"}  # in float32 TF32 would have had an effect
    assert {line[2:].partition(":")[0] for line in lost.splitlines()} == expected
    assert all(len(line.partition(": ")[2].split()) > 3 for line in lost.splitlines())


def test_nothing_is_without_a_counterpart_where_nothing_of_the_kind_is_asked_for() -> None:
    assert "Without a counterpart:" not in migrate({}, *SD15).notes


def test_processes_multiply_the_batches_and_the_accumulation() -> None:
    config = BLOG | {"train_gradient_accumulation_steps": 2}
    migrated = migrate(config, 4, *SD15[1:])
    recipe = recipe_of(migrated)
    assert (recipe.sampling.batches_per_round, recipe.images_per_round) == (16, 96)
    assert (recipe.learner.batch_size, recipe.learner.gradient_accumulation_steps) == (3, 8)
    # Each of accelerate's four GPUs samples and learns, as in TRL; the reward worker is on one of them.
    assert (recipe.samplers.count, recipe.learner.world_size) == (4, 4)
    assert recipe.learner.num_gpus == 0.55 and recipe.samplers.num_gpus == pytest.approx(0.45 - 0.1)
    assert "did not take it" in paragraphs(migrated, "Carried over with a difference:")


def test_the_head_names_the_layout() -> None:
    four = migrate(BLOG, 4, *SD15[1:]).toml
    assert "# For 4 GPUs: 4 GPUs, each with a sampler and a learner rank in turns, as many GPUs as" in four
    assert "# For 1 GPU for all roles, as many GPUs as accelerate had." in migrate(BLOG, *SD15).toml
    assert "as many GPUs as" not in migrate(BLOG, 1, "tiny_animals", "jpeg_compressibility").toml


@pytest.mark.parametrize(
    ("steps", "fraction", "kept"),
    [(50, 1.0, 50), (50, 0.5, 25), (15, 0.5, 7), (50, 0.29, 14), (10, 0.99, 9), (7, 0.2, 1)],
)
def test_as_many_steps_are_learned_from_as_trl_cuts_off(steps: int, fraction: float, kept: int) -> None:
    recipe = recipe_of(migrate({"sample_num_steps": steps, "train_timestep_fraction": fraction}, *SD15))
    assert kept == int(steps * fraction) == recipe.sampling.trained_steps(steps)


@pytest.mark.parametrize(
    ("train_batch", "accumulated", "steps", "micro"),
    [(3, 1, 50, 6), (1, 1, 50, 2), (1, 1, 7, 1), (8, 4, 50, 16), (7, 1, 11, 11), (4, 1, 3, 6)],
)
def test_a_micro_batch_divides_an_optimizer_step(train_batch: int, accumulated: int, steps: int, micro: int) -> None:
    config = {"train_batch_size": train_batch, "train_gradient_accumulation_steps": accumulated}
    run = TrlRun(DDPOConfig.model_validate(config | {"sample_num_steps": steps}), processes=1)
    assert run.micro_batch_size == micro and train_batch * accumulated * steps % micro == 0


@pytest.mark.parametrize("processes", [2, 3, 7, 8])
def test_any_number_of_processes_gives_as_many_ranks_that_share_a_step(processes: int) -> None:
    recipe = recipe_of(migrate({"sample_num_steps": 7, "train_batch_size": 2}, processes, *SD15[1:]))
    assert recipe.learner.world_size == recipe.samplers.count == processes
    assert recipe.learner.images_per_rank == 2 and recipe.learner.micro_batch_size == 2  # 2 × 7 transitions a rank


def test_a_buffer_that_never_holds_min_count_is_the_rounds_statistics() -> None:
    migrated = migrate({"per_prompt_stat_tracking": True, "per_prompt_stat_tracking_buffer_size": 8}, *SD15)
    assert migrated.tables["algorithm"]["advantages"] == {"kind": "round"}
    assert "a buffer of 8 never holds a min_count of 16" in "\n".join(migrated.notes)


def test_trackers_workers_folder_and_name_are_carried_over() -> None:
    config = {
        "run_name": "my run/1",
        "log_with": "wandb",
        "tracker_project_name": "images",
        "tracker_kwargs": {"wandb": {"entity": "us", "tags": ["a"], "notes": "b"}},
        "project_kwargs": {"project_dir": "save", "total_limit": 3},
        "async_reward_computation": True,
        "max_workers": 4,
    }
    recipe = recipe_of(migrate(config, *SD15))
    assert (recipe.name, recipe.output_dir, recipe.checkpoint.keep) == ("my-run-1", "save", 3)
    assert [table.table() for table in recipe.trackers] == [
        {"name": "wandb", "project": "images", "entity": "us", "tags": ["a"]}
    ]
    assert (recipe.reward_workers.count, recipe.reward_workers.num_gpus) == (4, 0.025)


def test_wandbs_keywords_are_nothing_to_a_run_that_logged_elsewhere() -> None:
    migrated = migrate({"log_with": "tensorboard", "tracker_kwargs": {"wandb": {"entity": "us"}}}, *SD15)
    assert migrated.tables["trackers"] == [{"name": "tensorboard"}]
    assert "tracker_kwargs" in migrated.notes[-1]  # what has nothing to carry over


def test_what_is_null_in_a_dictionary_is_as_if_it_were_not_there() -> None:
    config = {
        "log_with": "wandb",
        "tracker_kwargs": {"wandb": {"group": None}},
        "project_kwargs": {"total_limit": None},
    }
    recipe = recipe_of(migrate(config, *SD15))
    assert recipe.checkpoint.keep == 5 and "group" not in recipe.trackers[0].table()


def test_a_negative_prompt_is_carried_over() -> None:
    assert recipe_of(migrate({"negative_prompts": "blurred"}, *SD15)).sampling.negative_prompt == "blurred"
    assert "negative_prompt" not in migrate({"negative_prompts": ""}, *SD15).tables["sampling"]


def test_guidance_below_1_is_none_as_in_trl() -> None:
    assert migrate({"sample_guidance_scale": 0.5}, *SD15).tables["sampling"]["guidance_scale"] == 1


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"train_eta": 1.0}, "train_eta is not a key that is known"),
        ({"num_epochs": "many"}, "num_epochs is 'many'"),
        ({"sample_num_steps": 50.5}, "sample_num_steps is 50.5"),
        ({"train_cfg": 1}, "train_cfg is 1"),
        ({"mixed_precision": "fp8"}, "mixed_precision is 'fp8': input should be 'no', 'fp16' or 'bf16'"),
        ({"sample_eta": 0}, "sampling.eta comes from sample_eta"),
        ({"train_clip_range": 0.0}, "algorithm.clip_range comes from train_clip_range"),
        ({"train_timestep_fraction": 0.01}, "sampling.timestep_fraction comes from train_timestep_fraction"),
        ({"train_timestep_fraction": 1.5}, "sampling.timestep_fraction comes from train_timestep_fraction"),
        ({"save_freq": 0}, "checkpoint.every comes from save_freq"),
        ({"train_batch_size": 0}, "learner.batch_size comes from train_batch_size"),
        ({"sample_num_steps": 0}, "sampling.num_steps comes from sample_num_steps"),
        ({"train_batch_size": 3}, "= 2 images a round, which train_batch_size × train_gradient_accumulation_steps"),
    ],
)
def test_a_config_that_gives_no_recipe_is_refused_with_the_fields_at_fault(config: dict, says: str) -> None:
    with pytest.raises(ValueError) as refused:
        migrate(config, *SD15)
    assert says in str(refused.value)


@pytest.mark.parametrize("beside", [(0, *SD15[1:]), (*SD15[:2], "beauty")])
def test_what_stands_beside_a_config_is_checked_too(beside: tuple[int, str, str]) -> None:
    with pytest.raises(ValueError, match="--processes is 0|reward.name is 'beauty': it must be one of"):
        migrate({}, *beside)


@pytest.mark.parametrize("text", ["", "[1]", '{"tracker_kwargs": 1, "tracker_kwargs/wandb/entity": "us"}'])
def test_a_file_that_is_no_config_is_the_users_error(text: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "config.json").write_text(text)
    assert main(["migrate", str(tmp_path / "config.json")]) == 2
    assert "is not JSON" in (said := capsys.readouterr().err) or "holds a list" in said or "lie inside" in said
    assert main(["migrate", str(tmp_path / "absent.json")]) == 2


def test_what_trls_to_dict_flattened_is_read_as_it_was(tmp_path: Path) -> None:
    flat = {"seed": 3, "tracker_kwargs/wandb/entity": "us", "project_kwargs/total_limit": 2}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    nested = {"seed": 3, "tracker_kwargs": {"wandb": {"entity": "us"}}, "project_kwargs": {"total_limit": 2}}
    assert read_config(tmp_path / "config.json") == nested


def test_the_command_prints_a_recipe_and_says_the_notes_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BLOG))
    command = ["migrate", str(tmp_path / "config.json"), "--reward", "my_rewards:brightness"]
    assert main(command) == 0
    printed, said = capsys.readouterr()
    recipe = Recipe.parse(tomllib.loads(printed))
    assert build_components(recipe).rewards["function"] == FunctionReward(path="my_rewards:brightness")
    assert [line.removeprefix("# ") for line in printed.splitlines() if line.startswith("#")] == said.splitlines()
    assert main([*command, "--output", str(tmp_path / "mine.toml")]) == 0
    assert (tmp_path / "mine.toml").read_text() == printed
    assert main([*command, "--output", str(tmp_path / "mine.toml")]) == 2  # nobody's recipe is written over


@pytest.mark.rotated(every=2, group="longest")
def test_a_migrated_config_trains_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = {"num_epochs": 1, "mixed_precision": "no", "sample_num_steps": 5, "train_timestep_fraction": 0.5}
    config |= {"sample_batch_size": 2, "train_batch_size": 2, "log_with": "tensorboard"}
    Path("config.json").write_text(json.dumps(config))
    embedded = ["--model", "tiny_animals", "--reward", "jpeg_compressibility", "--output", "tiny.toml"]
    assert main(["migrate", "config.json", *embedded]) == 0
    assert main(["train", "tiny.toml", "--serial"]) == 0
    metrics = json.loads(Path("runs/ddpo/metrics.jsonl").read_text())
    assert (metrics["images"], metrics["ratio/max_abs_log"]) == (4, 0)
    assert list(Path("runs/ddpo/tensorboard").iterdir())


def test_the_page_has_every_field_and_its_key() -> None:
    page = (ROOT / "docs" / "coming_from_trl.md").read_text()
    of_ddpo = page.partition("AlignPropConfig")[0]
    rows = [line for line in of_ddpo.splitlines() if line.startswith("| `")]
    for field, counterpart in COUNTERPARTS.items():
        (row,) = [row for row in rows if f"`{field}`" in row.split("|")[1]]
        assert f"`{counterpart.key}`" in row.split("|")[2] or (counterpart.key, row.split("|")[2].strip()) == (
            "",
            "none",
        )
