"""`ddpo config`, the page docs/configuration.md, the JSON schema, and the completion of recipes' and sections' names."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from jsonschema import Draft7Validator
from pydantic import BaseModel

from ray_ddpo import cli
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.registry import component_class, models_in
from ray_ddpo.common.recipe.shipped import RECIPES, shipped_recipes
from ray_ddpo.deploy.commands.command_line import SECTIONS, read
from ray_ddpo.deploy.commands.config import COMPONENTS, config, keys_of, page, registry_of, schema, sections

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "deploy" / "recipes" / "recipe.schema.json"


def component_classes() -> dict[str, type[BaseModel]]:
    return {
        f"{section}.{name}": component_class(registry_of(section) or {}, name, section)
        for section in COMPONENTS
        for name in registry_of(section) or {}
    }


def all_models() -> list[type[BaseModel]]:
    """Return the recipe, its tables, all components, and the tables inside them."""
    found: list[type[BaseModel]] = [Recipe, *component_classes().values()]
    for model in found:
        inner = [nested for field in model.model_fields.values() for nested in models_in(field.annotation)]
        found += [nested for nested in inner if nested not in found]
    return found


def test_every_key_of_every_table_and_component_has_a_description() -> None:
    models = all_models()
    assert len(models) > 40
    lacking = [
        f"{model.__name__}.{key}"
        for model in models
        for key, field in model.model_fields.items()
        if not field.description
    ]
    assert lacking == []


def test_page_and_schema_are_those_of_the_code() -> None:
    """If this fails, run `make configuration`."""
    text = (ROOT / "docs" / "configuration.md").read_text()
    assert text == page()
    assert json.loads(SCHEMA.read_text()) == schema()
    for model in (Recipe, *sections().values(), *component_classes().values()):
        for key in keys_of(model):
            assert f"| `{key.name}` |" in text and key.meaning in text


def test_schema_has_the_keys_of_a_component_and_refuses_others() -> None:
    validator = Draft7Validator(schema())
    tables = tomllib.loads((RECIPES / "tiny" / "grpo.toml").read_text())
    assert validator.is_valid(tables)
    own = {"name": "mine:Mine", "anything": 1}
    assert validator.is_valid({**tables, "algorithm": own})
    for table, wrong in {
        "algorithm": {"clip_rang": 1},
        "sampling": {"step_fraction": 1},
        "learner": {"batch_size": 0},
    }.items():
        assert not validator.is_valid({**tables, table: {**tables[table], **wrong}})


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_names_the_schema_and_fits_it(name: str) -> None:
    path = shipped_recipes()[name]
    first, _, rest = path.read_text().partition("\n")
    assert first.startswith("#:schema ") and (path.parent / first.split()[1]).resolve() == SCHEMA
    assert rest.startswith("# ")
    assert list(Draft7Validator(json.loads(SCHEMA.read_text())).iter_errors(tomllib.loads(rest))) == []


def test_a_section_is_described_with_type_default_bounds_and_meaning() -> None:
    text = config("sampling")
    assert "num_steps  (integer, default 50, ≥ 2, ≤ 1,000)\n    Denoising steps per image." in text
    assert 'sde_window_order  ("random" | "sliding", default "random")' in text
    assert 'micro_batch_size  (integer | "auto", default "auto", ≥ 1)' in config("learner")
    assert "rounds  (integer, required, ≥ 1)" in config(None) and "guard " in config(None)
    assert config("rewards") == config("reward") and "[reward]" in config("evaluation.scorers")


def test_a_component_is_described_with_its_own_defaults() -> None:
    assert 'advantages.kind  ("per_prompt" | "round" | "group", default "group")' in config("algorithm.grpo")
    assert 'advantages.kind  ("per_prompt" | "round" | "group", default "per_prompt")' in config("algorithm.ddpo_is")
    assert "lora.rank  (integer, default 32" in config("policy.sd3")
    assert "It has no keys of its own." in config("reward.jpeg_compressibility")
    assert "prompts.held_out_prompts" not in config("prompts.animals") and "held_out_prompts" in config(
        "prompts.animals"
    )


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ("samplin", "there is no section 'samplin' in a recipe: .*; did you mean sampling?"),
        (
            "algorithm.off_policy",
            "off_policy is a key of components and not a component: `ddpo config algorithm.ddpo_is`",
        ),
        ("policy.lora.rank", "`ddpo config policy.stable_diffusion` prints it, as it does for sd_inpainting, sdxl"),
        ("algorithm.grpp", r"algorithm.name is 'grpp': it must be one of \[.*'ddpo_is'"),
        ("guard.entropy", "section 'guard' names no component: those that do are policy, prompts"),
    ],
)
def test_an_unknown_section_or_component_is_refused_with_the_known_ones(section: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        config(section)


def test_config_is_a_verb_and_train_help_names_sections(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["config", "checkpoint"]) == 0
    assert "Rounds between two checkpoints." in capsys.readouterr().out
    assert cli.main(["config", "nothing"]) == 2
    assert [section for section in SECTIONS if section != "rewards"] == list(sections()) and "rewards" in SECTIONS
    with pytest.raises(SystemExit):
        read(["train", "--help"])
    printed = capsys.readouterr().out
    assert all(section in printed for section in SECTIONS) and "ddpo config SECTION" in " ".join(printed.split())


def completions(line: str, folder: Path) -> list[str]:
    """Return what a shell offers for a command line, by argcomplete's protocol."""
    answer = folder / "answer"
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    asked |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "ray_ddpo"], cwd=folder, env={**os.environ, **asked}, timeout=120, check=True)
    return [word.strip() for word in answer.read_text().split("\n")]


def test_shells_complete_verbs_recipes_and_sections(tmp_path: Path) -> None:
    (tmp_path / "demonstration.toml").touch()
    assert set(completions("ddpo pl", tmp_path)) == {"plan"}
    assert set(completions("ddpo plan demo", tmp_path)) == {"demo", "demo_words", "demonstration.toml"}
    assert {"tiny/grpo", "tiny/guard"} <= set(completions("ddpo train tiny/g", tmp_path))
    assert set(completions("ddpo config sampl", tmp_path)) == {"sampling", "samplers"}
    assert set(completions("ddpo config rewa", tmp_path)) == {"reward", "rewards", "reward_workers"}
    assert set(completions("ddpo config rewards.jpeg_c", tmp_path)) == {"rewards.jpeg_compressibility"}
    assert set(completions("ddpo config algorithm.ddpo", tmp_path)) == {"algorithm.ddpo_is", "algorithm.ddpo_sf"}


def test_the_shipped_recipes_are_listed_with_the_first_sentence_of_their_head() -> None:
    lines = config("recipes").splitlines()
    assert [line.split()[0] for line in lines[:-2]] == list(shipped_recipes())
    assert lines[list(shipped_recipes()).index("tiny/draft")].endswith("  DRaFT-K on the embedded model")
    assert [line for line in lines[:-2] if len(line.split()) < 4] == []
