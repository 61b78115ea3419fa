"""`from ray_ddpo import …`: train from Python with functions, objects and pipelines, and look at the run."""

import os
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

import ray_ddpo
from ray_ddpo import Recipe, Run, train
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.common.user_code.by_value import reference, source_of
from ray_ddpo.learner.checkpoints.checkpoint import load_checkpoint, newest_checkpoint
from tests import whole_components
from tests.whole_components import RLOO, Cats, Family, Redness, Rounds, redness

GROUPS = {"images_per_prompt": 2}
FULL: dict[str, Any] = {"keep": True, "images_every": 1}


def fingerprint(run: Run) -> str:
    newest = newest_checkpoint(RunFolder(run.folder).checkpoints)
    assert newest is not None
    return load_checkpoint(newest).learner.trained.fingerprint


def one_round(tables: dict, **changes: Any) -> Recipe:
    return Recipe.parse(tables | {"rounds": 1, "rollouts": FULL, "prompts": {"name": "animals", **GROUPS}} | changes)


@pytest.mark.rotated(every=2, group="longest")
def test_the_public_names_are_imported_lazily_and_train_stays_the_function() -> None:
    code = """
    import sys, ray_ddpo
    assert not {"torch", "ray", "pydantic"} & set(sys.modules)
    assert set(ray_ddpo.__all__) <= set(dir(ray_ddpo))
    import ray_ddpo.train
    from ray_ddpo import train
    assert callable(train) and ray_ddpo.train is train and not hasattr(ray_ddpo, "nothing")
    for name in ray_ddpo.__all__:
        getattr(ray_ddpo, name)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=Path(__file__).parents[1])


def test_the_docstring_of_the_package_names_everything_public() -> None:
    assert all(f"`{name}`" in (ray_ddpo.__doc__ or "") for name in ray_ddpo.__all__)


def test_a_lambda_trains_in_one_process_and_its_run_can_be_looked_at(
    tables: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    factor, seen = 3.0, []
    evaluation = {"images": 2, "batch_size": 2}
    recipe = Recipe.parse(tables | {"rollouts": FULL, "evaluation": evaluation})
    score: Any = lambda images, prompts, metadata: factor * images[..., 0].mean(axis=(1, 2))  # noqa: E731
    run = train(recipe, reward=score, prompts=["a cat", "a dog"], on_round=seen.append, serial=True)

    assert [metrics["round"] for metrics in run.metrics] == [0, 1] and seen == run.metrics
    assert all(isinstance(image, Image.Image) for image in run.images(1)) and len(run.images(1)) == 8
    rewards = np.array([factor * np.asarray(image)[..., 0].mean() for image in run.images(1)])
    assert run.metrics[1]["reward/mean"] == pytest.approx(rewards.mean(), rel=1e-5)
    assert (Path(run.lora) / "pytorch_lora_weights.safetensors").is_file()
    assert "2 held-out images" in run.report() and (Path(run.folder) / "report" / "report.html").is_file()
    assert "2 held-out images" in Run(run.folder).report(reward=score)
    assert "factor * images" in (Path(run.folder) / "code" / "reward.function.path.txt").read_text()

    reward = tomllib.loads((Path(run.folder) / "recipe.toml").read_text())["reward"]
    assert (reward["name"], reward["path"], reward["label"]) == ("function", "<python>:<lambda>", "function")
    with pytest.raises(ValueError, match=r"handed to train\(\) by a Python program.*Run\(folder\).report\(reward=…\)"):
        Run(run.folder).report()
    other: Any = lambda images, prompts, metadata: images.mean(axis=(1, 2, 3))  # noqa: E731
    with pytest.raises(ValueError, match="reward.path of function was"):
        Run(run.folder).report(reward=other)


def test_a_run_resumes_with_the_same_function_and_arrives_at_the_same_weights(tables: dict) -> None:
    whole = train(Recipe.parse(tables), reward=lambda images, prompts, metadata: images.mean((1, 2, 3)), serial=True)
    parts = {**tables, "name": "parts", "checkpoint": {"every": 1}}
    for rounds in (1, 2):
        score: Any = lambda images, prompts, metadata: images.mean((1, 2, 3))  # noqa: E731
        run = train(Recipe.parse(parts | {"rounds": rounds}), reward=score, serial=True, resume=True)
    assert fingerprint(run) == fingerprint(whole)


def test_errors_of_a_python_program_name_arguments_and_not_options(tables: dict) -> None:
    recipe = one_round(tables)
    run = train(recipe, serial=True)
    with pytest.raises(ValueError) as error:
        train(recipe, serial=True)
    said = f'resume it with resume=True, or give another name or output_dir; start_from={{"run": "{run.folder}"}}'
    assert said in str(error.value) and "--" not in str(error.value)
    for arguments, message in (
        ({"prompts": "a cat"}, "prompts= is the text 'a cat': give a list of texts"),
        ({"prompts": []}, r"prompts= is \[\]: it must have at least one text"),
        ({"prompts": lambda: "a cat"}, r"prompts= is a function that takes \(\): it is called with a numpy Generator"),
        ({"reward": lambda images: 0}, r"reward=<lambda> has the signature \(images\)"),
        ({"reward": Redness}, "reward=Redness is the class Redness"),
        ({"algorithm": RLOO}, "algorithm= must be an object .* derived from Algorithm, and is the class RLOO itself"),
        ({"trackers": [3]}, "trackers= must be an object .* derived from Tracker, and is a int"),
        ({"on_round": 3}, "on_round= is 3: it must be a function"),
        ({"pipeline": 3.0}, "pipeline= is a float, and the recipe's policy.name 'stable_diffusion' takes a StableDiff"),
        ({"policy": Family(model="x"), "pipeline": "x"}, "policy= and pipeline= are both given"),
    ):
        with pytest.raises(ValueError, match=message):
            train(Recipe.parse({**tables, "name": "other"}), serial=True, **arguments)
    with pytest.raises(ValueError, match="round 7"):
        run.images(7)
    with pytest.raises(ValueError, match="it has no recipe.toml|there is no such folder"):
        Run(Path(run.folder) / "nothing")


@pytest.mark.rotated(every=2, group="longest")
def test_every_kind_of_component_can_be_named_or_handed_over(tables: dict, tiny_model: Path) -> None:
    model, own = str(tiny_model), "tests.whole_components"
    named = one_round(
        tables,
        name="named",
        policy={"name": f"{own}:Family", "model": model},
        prompts={"name": f"{own}:Cats", "count": 4, **GROUPS},
        reward={"name": f"{own}:Redness", "strength": 2.0},
        algorithm={"name": f"{own}:RLOO", "scale": 3.0, "clip_range": 1e-3},
        trackers=[{"name": f"{own}:Rounds", "file": "mine.txt"}],
    )
    objects: dict[str, Any] = {
        "policy": Family(model=model),
        "prompts": Cats(count=4),
        "reward": Redness(strength=2.0),
        "algorithm": RLOO(scale=3.0, clip_range=1e-3),
        "trackers": [Rounds(file="mine.txt")],
    }
    first, second = train(named, serial=True), train(one_round(tables, name="handed"), serial=True, **objects)
    assert fingerprint(first) == fingerprint(second)
    assert (Path(second.folder) / "mine.txt").read_text() == "0\n"
    kept = [tomllib.loads((Path(run.folder) / "recipe.toml").read_text()) for run in (first, second)]
    assert [table.pop("name") for table in kept] == ["named", "handed"]
    assert kept[1]["reward"].pop("label") == "Redness" and kept[0] == kept[1]
    assert "reward/Redness" in "".join(first.metrics[0])


def test_a_function_that_can_be_imported_is_kept_by_its_name(tables: dict) -> None:
    run = train(one_round(tables), reward={"red": redness, "own": Redness()}, serial=True)
    rewards = tomllib.loads((Path(run.folder) / "recipe.toml").read_text())["rewards"]
    assert [(each["label"], each["name"]) for each in rewards] == [
        ("red", "function"),
        ("own", "tests.whole_components:Redness"),
    ]
    assert rewards[0]["path"] == "tests.whole_components:redness"
    copy = Path(run.folder) / "code" / "tests" / "whole_components.py"
    assert copy.read_text() == Path(whole_components.__file__).read_text()


@pytest.mark.rotated(every=2, group="longest")
def test_a_live_pipeline_is_saved_with_the_run_which_another_one_cannot_resume(tables: dict, tiny_model: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    tables["policy"] = {"name": "stable_diffusion", "model": "nowhere/at-all"}
    run = train(one_round(tables), pipeline=pipeline, serial=True)
    saved = tomllib.loads((Path(run.folder) / "recipe.toml").read_text())["policy"]["model"]
    assert saved == f"{run.folder}/model" and (Path(saved) / "model_index.json").is_file()
    of_folder = train(one_round(tables, name="folder"), pipeline=tiny_model, serial=True)
    assert fingerprint(of_folder) == fingerprint(run)
    train(one_round(tables), pipeline=pipeline, serial=True, resume=True)
    next(pipeline.unet.parameters()).data += 1
    with pytest.raises(ValueError, match="pipeline= has other weights than the run in .* began with .unet/diffusion"):
        train(one_round(tables), pipeline=pipeline, serial=True, resume=True)
    tables["policy"]["name"] = "sdxl"
    with pytest.raises(
        ValueError, match="pipeline= is a StableDiffusionPipeline, and .* 'sdxl' takes a StableDiffusionXL"
    ):
        train(one_round(tables, name="sdxl"), pipeline=pipeline, serial=True)


def test_a_reward_that_cannot_travel_is_refused_before_ray_starts(tables: dict, tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        log: Any = lambda images, prompts, metadata: file.write("x") + images.mean((1, 2, 3))  # noqa: E731
        with pytest.raises(
            ValueError, match=r"the reward 'function' cannot be sent .*pickl.*: train .* with serial=True"
        ):
            train(one_round(tables), reward=log)


def test_recipes_are_found_by_name_and_take_keys_from_python() -> None:
    recipe = Recipe.load("demo", rounds=3, learner={"learning_rate": 0.5}, prompts={"name": "texts", "texts": ["cat"]})
    assert (recipe.name, recipe.rounds, recipe.learner.learning_rate) == ("demo", 3, 0.5)
    assert recipe.learner.batch_size == 16 and recipe.prompts.table() == {"name": "texts", "texts": ["cat"]}
    assert Recipe.load("tiny/grpo") == Recipe.load("deploy/recipes/tiny/grpo.toml")
    with pytest.raises(ValueError, match="no recipe at sd15_asthetic: .*did you mean sd15_aesthetic?"):
        Recipe.load("sd15_asthetic")
    with pytest.raises(ValueError, match="rouds is not a key that is known.*did you mean rounds?"):
        Recipe.load("demo", rouds=3)


def test_commands_find_a_runs_own_code_from_another_folder(
    tables: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "beside_scores.py").write_text("SCALE = 2.0\n")
    code = """
    import beside_scores

    def score(images, prompts, metadata):
        return beside_scores.SCALE * images.mean(axis=(1, 2, 3))
    """
    (tmp_path / "own_scores.py").write_text(textwrap.dedent(code))
    evaluation = {"images": 2, "batch_size": 2}
    with monkeypatch.context() as here:
        here.syspath_prepend(tmp_path)
        reward = {"name": "function", "path": "own_scores:score"}
        run = train(one_round(tables, reward=reward, evaluation=evaluation), serial=True)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path)])
    for name in ("own_scores", "beside_scores"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert "2 held-out images" in Run(run.folder).report()
    copies = Path(run.folder) / "code"
    assert (
        f"beside_scores, own_scores cannot be imported here: the run's own copy is used, {copies}"
        in capsys.readouterr().err
    )
    assert os.fspath(copies) == sys.path[-1]
    (copies / "beside_scores.py").write_text("SCALE = 3.0\n")
    monkeypatch.delitem(sys.modules, "beside_scores")
    monkeypatch.delitem(sys.modules, "own_scores")
    with pytest.raises(ValueError, match="reward.path of function/beside_scores was"):
        Run(run.folder).report()


def test_what_travels_by_value_is_known_by_its_own_text() -> None:
    def inner() -> int:
        return 1

    first, second = (lambda x: x + 1), (lambda x: x + 2)  # two in a line
    assert [reference(each) for each in (redness, inner, first)] == [
        "tests.whole_components:redness",
        "<python>:inner",
        "<python>:<lambda>",
    ]
    assert source_of(first) == "lambda x: x + 1" and source_of(second) == "lambda x: x + 2"
    assert source_of(inner).strip() == "def inner() -> int:\n            return 1".replace("            ", "        ")
    made: dict[str, Any] = {}
    exec("one = lambda x: x in {'a', 'b'}\ntwo = lambda x: x in {'a', 'c'}", made)
    assert source_of(made["one"]) != source_of(made["two"])
    assert "class Redness(Reward)" in source_of(Redness)
