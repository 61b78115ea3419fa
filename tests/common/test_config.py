"""Reading a recipe: what is accepted, what is refused, the messages, and overrides from the command line."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from ray_ddpo.common.recipe.overrides import with_overrides
from ray_ddpo.common.recipe.recipe import Recipe

TOML = """
name = "demo"
rounds = 3
[policy]
name = "stable_diffusion"
model = "tiny_animals"
[policy.lora]
rank = 4
[prompts]
name = "animals"
[sampling]
num_steps = 10
batch_size = 4
batches_per_round = 2
[reward]
name = "aesthetic"
dtype = "float32"
[algorithm]
name = "ddpo_is"
[learner]
batch_size = 4
micro_batch_size = 8
[[trackers]]
name = "jsonl"
[[trackers]]
name = "wandb"
project = "cats"
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "demo.toml"
    path.write_text(TOML)
    return path


def changed(tables: dict, place: str, value: object) -> dict:
    return with_overrides(
        tables, [f"--{place}", repr(value) if not isinstance(value, (str, bool)) else str(value).lower()]
    )


def test_a_recipe_file_gets_defaults_for_missing_keys(path: Path) -> None:
    recipe = Recipe.load(path)
    assert (recipe.name, recipe.rounds, recipe.sampling.num_steps) == ("demo", 3, 10)
    assert (recipe.seed, recipe.max_policy_lag, recipe.output_dir, recipe.sampling.eta) == (0, 0, "runs", 1.0)
    assert recipe.images_per_round == 8 and recipe.learner.images_per_step == 4


def test_a_components_table_keeps_the_keys_of_its_class(path: Path) -> None:
    recipe = Recipe.load(path)
    assert recipe.policy.table() == {"name": "stable_diffusion", "model": "tiny_animals", "lora": {"rank": 4}}
    assert recipe.trackers[1].table() == {"name": "wandb", "project": "cats"}


def test_the_weight_of_a_reward_is_a_key_of_the_table_not_of_the_component(path: Path) -> None:
    recipe = Recipe.load(path, ["--reward.weight", "0.5"])
    assert recipe.reward.weight == 0.5
    assert recipe.reward.table() == {"name": "aesthetic", "dtype": "float32"}


def test_a_resolved_recipe_is_itself_a_recipe(path: Path) -> None:
    recipe = Recipe.load(path)
    assert Recipe.parse(recipe.model_dump()) == recipe


def test_a_recipe_cannot_be_changed(recipe: Recipe) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        recipe.rounds = 9


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("name", "two words", "name is 'two words': string should match pattern"),
        ("name", "../up", "name is '../up': string should match pattern"),
        ("rounds", 0, "rounds is 0: input should be greater than or equal to 1"),
        ("seed", -1, "seed is -1: input should be greater than or equal to 0"),
        ("seed", 2**63, "seed is 9223372036854775808: input should be less than 9223372036854775808"),
        ("max_policy_lag", -1, "max_policy_lag is -1: input should be greater than or equal to 0"),
        ("sampling.num_steps", 1, "sampling.num_steps is 1: input should be greater than or equal to 2"),
        ("sampling.num_steps", 1001, "sampling.num_steps is 1001: input should be less than or equal to 1000"),
        ("sampling.num_steps", 2.5, "sampling.num_steps is 2.5: input should be a valid integer"),
        ("sampling.eta", 0, "sampling.eta is 0: input should be greater than 0"),
        ("sampling.eta", 2.1, "sampling.eta is 2.1: input should be less than or equal to 2"),
        ("sampling.guidance_scale", -1, "sampling.guidance_scale is -1: input should be greater than or equal to 0"),
        ("sampling.latents_dtype", "int8", "sampling.latents_dtype is 'int8': input should be 'float32', 'float16' or"),
        ("prompts.images_per_prompt", 0, "prompts.images_per_prompt is 0: input should be greater than or equal to 1"),
        ("learner.learning_rate", 0, "learner.learning_rate is 0: input should be greater than 0"),
        ("learner.learning_rate", "inf", "learner.learning_rate is inf: input should be a finite number"),
        ("learner.learning_rate", "nan", "learner.learning_rate is nan: input should be a finite number"),
        ("learner.learning_rate", "fast", "learner.learning_rate is 'fast': input should be a valid number"),
        ("learner.adam_beta1", 1, "learner.adam_beta1 is 1: input should be less than 1"),
        ("learner.world_size", 0, "learner.world_size is 0: input should be greater than or equal to 1"),
        ("samplers.count", 0, "samplers.count is 0: input should be greater than or equal to 1"),
        ("runtime.device", "tpu", "runtime.device is 'tpu': input should be 'auto', 'cpu' or 'cuda'"),
        ("checkpoint.keep", 0, "checkpoint.keep is 0: input should be greater than or equal to 1"),
        ("evaluation.images", 1, "evaluation.images is 1: input should be greater than or equal to 2"),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_value_and_the_bounds(
    tables: dict, place: str, value: object, message: str
) -> None:
    with pytest.raises(ValueError) as error:
        Recipe.parse(changed(tables, place, value))
    assert str(error.value).startswith(f"the recipe cannot be used: {message}")


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("round", "round is not a key that is known: the keys here are ['aggregation', 'algorithm', "),
        ("checkpoint.evry", "checkpoint.evry is not a key that is known: the keys here are ['every', 'keep']"),
        ("samplers.gpus", "samplers.gpus is not a key that is known: the keys here are ['accelerator_type', 'count', "),
    ],
)
def test_an_unknown_key_is_refused_with_the_known_keys(tables: dict, place: str, expected: str) -> None:
    with pytest.raises(ValueError) as error:
        Recipe.parse(changed(tables, place, 1))
    assert str(error.value).startswith(f"the recipe cannot be used: {expected}")


@pytest.mark.parametrize("key", ["name", "rounds", "policy", "prompts", "sampling", "algorithm", "learner"])
def test_a_missing_required_key_is_named(tables: dict, key: str) -> None:
    del tables[key]
    with pytest.raises(ValueError, match=f"^the recipe cannot be used: {key} is missing$"):
        Recipe.parse(tables)


def test_a_components_table_must_have_a_name(tables: dict) -> None:
    tables["policy"].pop("name")
    with pytest.raises(ValueError, match="policy.name is missing"):
        Recipe.parse(tables)


def test_a_recipe_has_either_one_reward_or_several(tables: dict) -> None:
    both = {**tables, "rewards": [{"name": "aesthetic"}]}
    none = {key: value for key, value in tables.items() if key != "reward"}
    empty = {**tables, "reward": []}
    for wrong, said in (
        (both, "has both [reward] and [[rewards]]: it must have one of them"),
        (none, "has no reward: it needs a table [reward], or several [[rewards]]"),
        (empty, "reward is []: it must be a table, [reward] and its keys below"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            Recipe.parse(wrong)
    several = Recipe.parse(
        {**none, "rewards": [{"name": "aesthetic"}, {"name": "jpeg_compressibility", "weight": 0.1}]}
    )
    assert [(reward.name, reward.weight) for reward in several.all_rewards] == [
        ("aesthetic", 1.0),
        ("jpeg_compressibility", 0.1),
    ]
    assert [reward.name for reward in Recipe.parse(tables).all_rewards] == ["jpeg_compressibility"]


def test_rewards_and_scorers_of_one_name_need_labels(tables: dict) -> None:
    del tables["reward"]
    first, second = {"name": "aesthetic", "label": "taste"}, {"name": "aesthetic", "clip": "owner/other"}
    recipe = Recipe.parse({**tables, "rewards": [first, second]})
    assert [reward.called for reward in recipe.all_rewards] == ["taste", "aesthetic"]
    alike = ([second, second], []), ([first, second], [second]), ([first, {**second, "label": "taste"}], [])
    for rewards, scorers in alike:
        with pytest.raises(ValueError, match="rewards and evaluation.scorers are called .*: give a label"):
            Recipe.parse({**tables, "rewards": rewards, "evaluation": {"scorers": scorers}})
    with pytest.raises(ValueError, match="rewards.0.label is 'a.b'"):
        Recipe.parse({**tables, "rewards": [{**first, "label": "a.b"}]})


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (
            "prompts.images_per_prompt",
            3,
            "a round has sampling.batch_size × batches_per_round = 8 images, "
            "which prompts.images_per_prompt = 3 does not divide",
        ),
        (
            "learner.batch_size",
            3,
            "a round has sampling.batch_size × batches_per_round = 8 images, which an optimizer step's "
            "learner.batch_size × gradient_accumulation_steps = 3 does not divide",
        ),
        (
            "learner.gradient_accumulation_steps",
            3,
            "a round has sampling.batch_size × batches_per_round = 8 images, which an optimizer step's "
            "learner.batch_size × gradient_accumulation_steps = 12 does not divide",
        ),
    ],
)
def test_batch_sizes_that_do_not_divide_are_refused_with_both_numbers(
    tables: dict, place: str, value: int, message: str
) -> None:
    with pytest.raises(ValueError) as error:
        Recipe.parse(changed(tables, place, value))
    assert str(error.value) == f"the recipe cannot be used: {message}"


def test_a_missing_file_is_refused_with_the_near_shipped_recipes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no recipe at .*demo.toml: .*shipped recipe .*; did you mean demo"):
        Recipe.load(tmp_path / "demo.toml")


def test_a_file_that_is_not_toml_is_named_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "demo.toml").write_text('name = "demo"\nrounds: 3\n')
    with pytest.raises(ValueError, match=r"demo.toml is not TOML: .*line 2.*: 'rounds: 3'"):
        Recipe.load(tmp_path / "demo.toml")
    (tmp_path / "demo.toml").write_text('name = "demo"\nrounds = 3\nrounds = 4\n')
    with pytest.raises(ValueError, match=r"demo.toml is not TOML: .*line 3.*: 'rounds = 4'"):
        Recipe.load(tmp_path / "demo.toml")


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(path: Path) -> None:
    plain = Recipe.load(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert Recipe.load(path) == plain


def test_overrides_win_over_the_file_and_reach_every_table(path: Path) -> None:
    options = ["--rounds", "6", "--learner.learning_rate", "1e-3", "--runtime.deterministic", "false"]
    options += ["--policy.lora.rank", "8", "--output_dir", "/shared/runs", "--checkpoint.every", "2"]
    recipe = Recipe.load(path, options)
    assert (recipe.rounds, recipe.learner.learning_rate, recipe.runtime.deterministic) == (6, 1e-3, False)
    assert recipe.policy.table()["lora"] == {"rank": 8}
    assert (recipe.output_dir, recipe.checkpoint.every) == ("/shared/runs", 2)


def test_the_last_of_two_overrides_wins(path: Path) -> None:
    assert Recipe.load(path, ["--rounds", "6", "--rounds", "7"]).rounds == 7


def test_an_override_reaches_into_a_list_by_position_and_leaves_the_others(path: Path) -> None:
    trackers = Recipe.load(path, ["--trackers.1.project", "dogs"]).trackers
    assert [tracker.table() for tracker in trackers] == [{"name": "jsonl"}, {"name": "wandb", "project": "dogs"}]


def test_an_override_may_give_a_whole_list_of_tables(path: Path) -> None:
    recipe = Recipe.load(path, ["--trackers", '[{name = "terminal"}]'])
    assert [tracker.name for tracker in recipe.trackers] == ["terminal"]


def test_a_runs_folder_is_its_name_in_the_output_folder(recipe: Recipe) -> None:
    assert recipe.run_path() == f"{recipe.output_dir}/tiny"


def test_a_relative_output_dir_in_a_submitted_job_is_refused(tables: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(ValueError, match="output_dir is 'runs', .*throw-away copy.*give --output_dir an absolute path"):
        Recipe.parse({**tables, "output_dir": "runs"}).run_path()
    assert Recipe.parse({**tables, "output_dir": "/shared/runs"}).run_path() == "/shared/runs/tiny"


def test_images_per_optimizer_step_must_divide_among_the_ranks(path: Path) -> None:
    recipe = Recipe.load(path, ["--learner.world_size", "2"])
    assert (recipe.learner.images_per_step, recipe.learner.images_per_rank) == (4, 2)
    with pytest.raises(ValueError, match="accumulation_steps = 4 images, which learner.world_size = 3 does not divide"):
        Recipe.load(path, ["--learner.world_size", "3"])


def test_micro_batch_size_is_auto_by_default(tables: dict) -> None:
    learner = {key: value for key, value in tables["learner"].items() if key != "micro_batch_size"}
    assert Recipe.parse({**tables, "learner": learner}).learner.micro_batch_size == "auto"
