"""A complete run whose reward is a served vision-language model: costs are metrics, and unreadable answers drop images."""

import json
from pathlib import Path

import pytest

from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.deploy.evaluation.eval_log import EvalLog
from ray_ddpo.train import run_training
from tests.chat_services import MODEL, chat_service, says
from tests.reward_services import Scripted, scripted

pytestmark = pytest.mark.thorough


def judged(tmp_path: Path, url: str, **keys: object) -> Recipe:
    reward = {"name": "vlm_judge", "url": url, "model": MODEL, **keys}
    return Recipe(
        name="judged",
        rounds=2,
        output_dir=str(tmp_path),
        policy={"name": "stable_diffusion", "model": "tiny_animals"},
        prompts={"name": "animals", "images_per_prompt": 2},
        sampling={"num_steps": 2, "batch_size": 4, "batches_per_round": 2},
        reward=reward,
        algorithm={"name": "grpo"},
        learner={"batch_size": 4, "micro_batch_size": 4},
        evaluation={"every": 1, "images": 4, "batch_size": 4},
    )  # type: ignore[arg-type]


def rounds(recipe: Recipe) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(recipe.run_path()) / "metrics.jsonl").read_text().splitlines()]


def test_a_run_logs_scores_costs_and_the_saturation_of_its_judge(tmp_path: Path) -> None:
    prices = {"dollars_per_million_input": 1.0, "dollars_per_million_output": 2.0}
    question = {"text": "is this a {prompt} in the image"}
    with chat_service(tmp_path / "vlm") as url:
        recipe = judged(tmp_path, url, questions=[question], cache_folder=str(tmp_path / "answers"), **prices)
        run_training(recipe, serial=True)
    logged = rounds(recipe)
    for metrics in logged:
        assert metrics["reward/vlm_judge/requests"] + metrics["reward/vlm_judge/cached_answers"] == 8
        tokens = metrics["reward/vlm_judge/input_tokens"], metrics["reward/vlm_judge/output_tokens"]
        assert tokens[0] > 8 * 5 and tokens[1] == metrics["reward/vlm_judge/requests"]
        assert metrics["reward/vlm_judge/dollars"] == pytest.approx((tokens[0] + 2 * tokens[1]) / 1e6)
        assert 0 <= metrics["reward/saturation"] <= 1 and metrics["reward/group_std"] > 0
        assert "evaluation/saturation" in metrics and metrics["evaluation/vlm_judge/requests"] >= 0
    entries = EvalLog(RunFolder(recipe.run_path()).storage).entries()
    assert [set(each["image_statistics"]) for each in entries] == [
        {"dark_share", "edge_density", "sharpness", "entropy", "diversity"}
    ] * 3


def test_the_image_of_an_answer_that_stays_unreadable_is_dropped_with_its_group(tmp_path: Path) -> None:
    refused: list[str] = []

    def answer(handler: Scripted) -> None:
        image = json.loads(handler.script.asked[-1].body)["messages"][0]["content"][0]["image_url"]["url"]
        refused[:] = refused or [image]
        text = "I cannot rate this." if image == refused[0] else f"{len(image) % 10}"
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(says(text)[1])  # type: ignore[index]

    question = {"text": "How good is {prompt}?", "answer": "number"}
    with scripted(answer) as (url, script):
        recipe = judged(tmp_path, url, questions=[question], requests_at_once=1, attempts=2)
        run_training(recipe, serial=True)
    assert [metrics["images_dropped"] for metrics in rounds(recipe)] == [2.0, 0.0]
    asked = [json.loads(each.body)["messages"][0]["content"][0]["image_url"]["url"] for each in script.asked]
    assert asked.count(refused[0]) == 2, "halving the batch does not ask again"
