"""`[evaluation] suite`: a run's evaluations have a suite's prompts, seeds, scorers and means, as `--suite` has."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ray_ddpo import cli
from ray_ddpo.actors.evaluation.eval_set import EvalSet, build_eval_set
from ray_ddpo.common.policy_weights import PolicyWeights
from ray_ddpo.common.prompt_set import PromptSet, shipped_prompts
from ray_ddpo.common.prompts import Prompt, Texts
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.recipe.reward_pools import all_pools
from ray_ddpo.common.recipe.tables import EvaluationTable
from ray_ddpo.common.run_storage.storage import Storage
from ray_ddpo.common.suites import SUITES, Suite
from ray_ddpo.deploy.commands.plan.evaluation import num_evaluations
from ray_ddpo.deploy.commands.plan.plan import plan
from ray_ddpo.deploy.driver.components import build_components, components_of
from ray_ddpo.deploy.driver.suite_checks import suite_notes
from ray_ddpo.deploy.evaluation.categories import change_of_means, mean_score
from ray_ddpo.deploy.evaluation.eval_log import EvalLog
from ray_ddpo.deploy.evaluation.eval_result import EvalResult, judge, judged_from_log
from ray_ddpo.deploy.evaluation.guard import best_version
from ray_ddpo.learner.checkpoints.learner_state import EvalVersion
from ray_ddpo.train import run_training

SHAPES = SUITES["shapes"]


def eval_set(**keys: object) -> EvalSet:
    return build_eval_set(EvaluationTable.model_validate(keys), Texts(texts=("a cat",)))


def following(tables: dict, suite: str = "shapes", **evaluation: object) -> Recipe:
    return Recipe.parse({**tables, "evaluation": {"suite": suite, **evaluation}})


def test_all_images_of_the_suite_are_sampled_by_default() -> None:
    chosen, prompts = eval_set(suite="shapes"), shipped_prompts("shapes", "test")
    assert list(chosen.prompts) == prompts * 4 and chosen.suite is SHAPES
    assert chosen.seeds == eval_set(images=192).seeds  # those of any evaluation of so many images
    assert chosen.in_words == "all 192 images of the suite shapes"


@pytest.mark.parametrize("images", [2, 31, 48, 100])
def test_fewer_images_are_some_of_the_suites(images: int) -> None:
    complete, some = eval_set(suite="shapes"), eval_set(suite="shapes", images=images)
    pairs = [list(zip(each.seeds, (prompt.text for prompt in each.prompts), strict=True)) for each in (complete, some)]
    assert len(set(pairs[1])) == images and set(pairs[1]) <= set(pairs[0])
    assert some.in_words == f"{images} of the 192 images of the suite shapes"
    tags = {prompt.metadata["tag"] for prompt in some.prompts}
    assert images < 31 or len(tags) == 6


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"suite": "shapes", "images": 193},
            "evaluation.images is 193, and the suite 'shapes' has 192 images, 4 of each",
        ),
        (
            {"suite": "geneval", "prompts_from": "nowhere"},
            "geneval needs nowhere/geneval_test.jsonl, which is not there: fetch it with ddpo prompts geneval --output "
            "nowhere, or say with evaluation.prompts_from where it is",
        ),
    ],
)
def test_a_suite_that_cannot_be_followed_is_refused(keys: dict, said: str, tables: dict) -> None:
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        eval_set(**keys)
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):  # before a run starts
        build_components(Recipe.parse({**tables, "evaluation": keys}))


@pytest.mark.parametrize(
    ("evaluation", "said"),
    [
        ({"prompts": ["a"]}, "suite is 'shapes' and prompts has 1: a suite has its own prompts"),
        ({"suite": "shape"}, "evaluation.suite"),
        ({"scorers": [{"name": "geneval"}, {"name": "geneval"}]}, "give a label to those of one name"),
    ],
)
def test_keys_that_contradict_a_suite_are_refused(evaluation: dict, said: str, tables: dict) -> None:
    with pytest.raises(ValueError, match=said):
        Recipe.parse({**tables, "evaluation": {"suite": "shapes", **evaluation}})


def test_scorers_are_the_suites_and_those_of_the_recipe(tables: dict) -> None:
    recipe = following(tables, every=1, scorers=[{"name": "brightness"}])
    assert [table.called for table in recipe.scorers] == ["geneval", "geneval_soft", "brightness"]
    assert all_pools(recipe)[-1].rewards == ("geneval", "geneval_soft", "brightness")
    own = {"name": "geneval", "detector": "shapes", "measure": "strict"}
    replaced = components_of(following(tables, scorers=[own]))
    assert list(replaced.scorers) == ["geneval", "geneval_soft"]
    assert replaced.scorers["geneval"].model_dump()["measure"] == "strict"
    assert Recipe.parse({**tables, "evaluation": {"suite": "shapes"}, "guard": {"best_by": "geneval"}})


def test_a_reward_stands_for_the_suites_scorer_of_its_name(tables: dict) -> None:
    same = {"name": "geneval", "detector": "shapes", "measure": "correct", "weight": 2.0}
    components = components_of(following({**tables, "reward": same}))
    assert list(components.scorers) == ["geneval_soft"] and list(components.rewards) == ["geneval"]
    # A run's stored recipe has the defaults of a reward filled in.
    assert list(components_of(following({**tables, "reward": components.resolved()["reward"]})).scorers) == [
        "geneval_soft"
    ]
    with pytest.raises(ValueError, match="other settings .measure 'soft' and not 'correct'.: give the reward a label"):
        components_of(following({**tables, "reward": {"name": "geneval", "detector": "shapes"}}))
    labelled = {"name": "geneval", "detector": "shapes", "label": "trained_geneval"}
    assert len(components_of(following({**tables, "reward": labelled})).scorers) == 2


def test_a_family_that_edits_images_is_refused(tables: dict) -> None:
    policy = {"name": "sd_inpainting", "model": "nowhere"}
    with pytest.raises(ValueError, match="evaluation.suite is 'shapes', whose prompts have no input image"):
        components_of(following({**tables, "policy": policy}))


def tagged(text: str, tag: str) -> Prompt:
    return Prompt(text, {"tag": tag})


PROMPTS = (*[tagged(text, "one") for text in "aabbcc"], *[tagged(text, "two") for text in "ddee"])


def test_means_and_changes_have_the_rule_of_the_suite() -> None:
    before, after = np.array([1.0, 0, 1, 1, 0, 0, 0, 0, 0, 1]), np.array([1.0, 1, 1, 1, 0, 1, 0, np.nan, 0, 1])
    assert mean_score(SHAPES, PROMPTS, before) == pytest.approx(((0.5 + 1 + 0) / 3 + (0 + 0.5) / 2) / 2)
    of_prompts = replace(SHAPES, mean_of_categories=False)
    assert mean_score(of_prompts, PROMPTS, after) == pytest.approx((1 + 1 + 0.5 + 0 + 0.5) / 5)
    assert mean_score(None, PROMPTS, after) == pytest.approx(6 / 9)
    found = change_of_means(SHAPES, PROMPTS, before, after)
    assert found is not None and found.images == 9
    # Differences of the prompts' means: ½, 0, ½ in one category; 0, 0 in the other.
    assert found.change == pytest.approx((1 / 3 + 0) / 2)
    assert found.error == pytest.approx(np.sqrt((np.std([0.5, 0, 0.5], ddof=1) / np.sqrt(3)) ** 2) / 2)
    alone = change_of_means(SHAPES, PROMPTS[:7], before[:7], after[:7])  # one image of the second category
    assert alone is not None and np.isnan(alone.error) and alone.errors is None


def judged_scores(recipe: Recipe, versions: Sequence[Sequence[float]]) -> list[dict]:
    """Judge versions with these scores of PROMPTS, and return the log's entries with the judged versions."""
    base, found = None, []
    statistics = dict.fromkeys(("dark_share", "edge_density", "sharpness", "entropy", "diversity"), 0.5)
    for version, values in enumerate(versions):
        scores = {name: np.array(values) for name in ("jpeg_compressibility", "geneval", "geneval_soft", "reward")}
        result = EvalResult(PROMPTS, tuple(range(10)), scores, np.zeros((10, 8, 8, 3), np.uint8))
        weights = EvalVersion(PolicyWeights(version, np.zeros(0, np.float32), (), "x"))
        judged, entry = judge(recipe, weights, {"current": result}, statistics, base)
        base = base or judged
        found.append({"judged": judged, "entry": entry, "scores": scores})
    return found


def test_the_best_version_is_that_of_the_suites_mean(tables: dict) -> None:
    """More images are right in version 1, and the mean of the categories is higher in version 0."""
    versions = ([0.0] * 6 + [1.0] * 4, [1.0] * 6 + [0.0] * 4)
    for suite, best in (("shapes", 0), ("none", 1)):
        own = [] if suite == "shapes" else [{"name": "geneval", "detector": "shapes"}]
        evaluation = {"suite": suite, "scorers": own}
        recipe = Recipe.parse({**tables, "evaluation": evaluation, "guard": {"max_scorer_drop": 9}})
        found = judged_scores(recipe, versions)
        assert best_version([each["judged"] for each in found], "geneval") == best
        restored = [judged_from_log(json.loads(json.dumps(each["entry"])), each["scores"]) for each in found]
        assert best_version(restored, "geneval") == best
    entry = judged_scores(following(tables), versions)[1]["entry"]["scores"]["geneval"]
    assert entry["mean"] == 0.5 and entry["category/one"] == 1 and entry["category/two"] == 0
    assert entry["mean_error"] == 0 and entry["change"] == 0


def test_training_prompts_of_the_suite_are_named(tables: dict) -> None:
    text = shipped_prompts("shapes", "test")[3].text
    both, held_out = Texts(texts=("a cat", text)), PromptSet(set="words")
    (note,) = suite_notes(following(tables), both)
    assert note.startswith(f"1 of the 48 prompts of the suite shapes are trained on too, such as {text!r}")
    assert suite_notes(following(tables), PromptSet(set="shapes")) == []
    assert "the prompts that [prompts] holds out are not sampled" in suite_notes(following(tables), held_out)[0]
    assert suite_notes(Recipe.parse(tables), both) == []


def test_the_plan_counts_the_suites_images(tables: dict) -> None:
    recipe = following({**tables, "rounds": 5}, every=2, ema_decay=0.5)
    assert num_evaluations(recipe) == 1 + 2 * 3  # version 0; versions 2, 4 and 5, twice each
    assert "1344 = 7 × all 192 images of the suite shapes; 3360% of the images in total come on top" in plan(recipe)
    assert "all 192 images of the suite shapes, in the report only" in plan(following(tables))


def run_of(tables: dict, name: str, serial: bool = True, **changes: object) -> Path:
    recipe = Recipe.parse({**tables, "name": name, **changes})
    run_training(recipe, serial=serial, resume=changes.get("rounds") == 2)
    return Path(recipe.run_path())


@pytest.fixture
def brief(tables: dict, small_suite: Suite, tmp_path: Path) -> dict:
    """Return a recipe of two short rounds that follows the small suite, with another scorer beside it."""
    evaluation = {
        "suite": "geneval",
        "prompts_from": str(tmp_path / "prompts"),
        "every": 1,
        "batch_size": 4,
        "scorers": [{"name": "entropy"}],
    }
    sampling, learner = {**tables["sampling"], "batches_per_round": 1}, {**tables["learner"], "learning_rate": 0.1}
    return {**tables, "sampling": sampling, "learner": learner, "evaluation": evaluation, "checkpoint": {"every": 1}}


def test_training_and_the_command_have_the_same_numbers(
    brief: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Means, categories and changes are equal to the last bit; also in `ddpo evaluate` and the report of the run."""
    run = run_of(brief, "calm")
    assert "evaluation: all 12 images of the suite geneval" in capsys.readouterr().err
    first, _, last = entries = EvalLog(Storage(run)).entries()
    output = tmp_path / "found"
    words = ["--prompts-from", str(tmp_path / "prompts"), "--evaluation.batch_size", "4", "--output", str(output)]
    assert cli.main(["evaluate", str(run), "--suite", "geneval", *words]) == 0
    told = json.loads((output / "suite.json").read_text())["scores"]
    for name in ("geneval", "brightness"):
        means = told[name]["weights"]
        for entry, weights in ((first, "pretrained"), (last, str(run))):
            assert entry["scores"][name]["mean"] == means[weights]["suite"]["mean"]
            assert entry["scores"][name]["category/counting"] == means[weights]["counting"]["mean"]
        assert last["scores"][name]["mean_error"] == means[str(run)]["suite"]["standard_error"]
    change = told["brightness"]["change"][str(run)]["suite"]
    assert last["scores"]["brightness"]["change"] == pytest.approx(change["mean"], rel=1e-6) and change["mean"] != 0
    assert last["scores"]["brightness"]["standard_error"] == pytest.approx(change["standard_error"])
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]
    assert logged["evaluation/brightness/mean"] == last["scores"]["brightness"]["mean"]
    assert logged["evaluation/brightness/category/colors"] == last["scores"]["brightness"]["category/colors"]
    check_report(run, told)
    resumed = run_of(brief, "parts", rounds=1), run_of(brief, "parts", rounds=2)
    assert EvalLog(Storage(resumed[1])).entries() == entries


def check_report(run: Path, told: dict) -> None:
    """Check that the report and `ddpo evaluate` without a suite have the suite's numbers."""
    assert cli.main(["report", str(run)]) == 0
    found = json.loads((run / "report" / "summary.json").read_text())
    assert found["suite"]["images"] == "all 12 images of the suite geneval"
    means = told["brightness"]["weights"]
    both = found["suite"]["scores"]["brightness"]
    assert both["before"] == means["pretrained"] and both["after"] == means[str(run)]
    assert found["scorers"]["brightness"]["after"] == means[str(run)]["suite"]["mean"]
    assert {"entropy", "geneval"} < found["scorers"].keys()
    assert cli.main(["evaluate", str(run)]) == 0
    found = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert found["weights"][str(run)]["brightness"]["after"] == means[str(run)]["suite"]["mean"]
    assert found["suite"]["scores"]["brightness"]["pretrained"] == means["pretrained"]


@pytest.mark.system
def test_on_ray_the_suites_numbers_are_those_of_the_serial_run(brief: dict, cluster: None) -> None:
    ours, theirs = (EvalLog(Storage(run_of(brief, name, name == "serial"))).entries() for name in ("serial", "ray"))
    assert ours == theirs and len(ours) == 3
