"""The judge over real sockets: scores, faults of the service, answers that cannot be read, costs and the cache."""

import json
import math
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_ddpo.actors.reward_worker import RewardWorker
from ray_ddpo.actors.rewards.judging.judge import Judge
from ray_ddpo.actors.rewards.reward import RewardMistake
from ray_ddpo.actors.rewards.service_client import RewardServiceFailed
from ray_ddpo.actors.rewards.vlm_judge import JudgeQuestion, VlmJudge
from ray_ddpo.common.prompts import File, Prompt
from ray_ddpo.common.recipe.registry import build
from ray_ddpo.common.recipe.tables import RewardPoolTable, RuntimeTable
from ray_ddpo.common.reward_protocol import from_png
from ray_ddpo.common.trajectory import ImageBatch
from tests.actors.rewards.test_http import drip, hang_up
from tests.chat_services import MODEL, chat_service, says
from tests.input_files import input_pixels, save_inputs
from tests.reward_services import Answer, Script, Scripted, scripted

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
PROMPTS = ["cat", "dog", "horse"]
NUMBER = JudgeQuestion(text="How good is {prompt}?", answer="number")


def judge(url: str, *questions: JudgeQuestion, **keys: Any) -> Judge:
    table = {"url": url, "model": MODEL, "requests_at_once": 1, "questions": questions or (NUMBER,), **keys}
    loaded = VlmJudge(**table).load("cpu")
    assert isinstance(loaded, Judge)
    return loaded


def score(loaded: Judge, count: int = 1) -> list[float]:
    return loaded(IMAGES[:count], PROMPTS[:count], [{} for _ in range(count)]).tolist()


def bodies(script: Script) -> list[dict[str, Any]]:
    return [json.loads(each.body) for each in script.asked]


def test_a_request_holds_the_image_and_the_question_as_the_protocol_wants_them() -> None:
    question = JudgeQuestion(text='Is the {colour} "{prompt}" good? Answer {"score": 0…10}', answer="json")
    with scripted(says('{"score": 5}')) as (url, script):
        loaded = judge(f"{url}/v1", question, system="Be strict.", extra_body={"seed": 1, "temperature": 0.5})
        assert loaded(IMAGES[:1], ["{colour} cat"], [{"colour": "red"}]).tolist() == [0.5]
    (body,) = bodies(script)
    assert script.asked[0].path == "/v1/chat/completions"
    system, message = body.pop("messages")
    assert body == {"model": MODEL, "temperature": 0.5, "max_tokens": 256, "seed": 1}
    assert system == {"role": "system", "content": "Be strict."}
    shown, asked = message["content"]
    image = from_png(shown["image_url"]["url"].removeprefix("data:image/png;base64,"), 64)
    assert np.array_equal(image, IMAGES[0])
    assert asked["text"] == 'Is the red "{colour} cat" good? Answer {"score": 0…10}'


def test_questions_are_averaged_by_their_weights() -> None:
    questions = (
        JudgeQuestion(text="a", answer="number", lowest=1, highest=5, weight=3),
        JudgeQuestion(text="b"),
        JudgeQuestion(text="c", log_probs=False),
    )
    with scripted(says("4"), says("", Yes=math.log(0.6), No=math.log(0.2)), says("No.")) as (url, script):
        assert score(judge(url, *questions)) == [pytest.approx((3 * 0.75 + 0.75 + 0) / 5)]
    assert [("logprobs" in body, body["max_tokens"]) for body in bodies(script)] == [
        (False, 256),
        (True, 1),
        (False, 256),
    ]


def test_without_questions_the_judge_is_asked_whether_the_image_shows_the_prompt() -> None:
    with scripted(says("", yes=math.log(0.9), no=math.log(0.1))) as (url, script):
        assert score(VlmJudge(url=url, model=MODEL).load("cpu")) == [pytest.approx(0.9)]  # type: ignore[arg-type]
    (body,) = bodies(script)
    assert body["messages"][0]["content"][1]["text"] == 'Does this image show "cat"? Answer yes or no.'


def test_each_image_is_scored_with_its_own_prompt() -> None:
    with scripted(says("1"), says("2"), says("3")) as (url, script):
        assert score(judge(url), 3) == pytest.approx([0.1, 0.2, 0.3])
    assert [body["messages"][0]["content"][1]["text"] for body in bodies(script)] == [
        f"How good is {prompt}?" for prompt in PROMPTS
    ]


def test_a_field_that_the_metadata_lacks_ends_the_run() -> None:
    with scripted(says("1")) as (url, script), pytest.raises(RewardMistake, match=r"has \{colour\}.*it has \['size'\]"):
        judge(url, JudgeQuestion(text="{colour}?"))(IMAGES[:1], ["cat"], [{"size": 1}])
    assert script.asked == []


def test_fields_of_questions_are_checked_before_anything_is_sampled() -> None:
    reward = VlmJudge(url="http://no-one:1/v1", model=MODEL, questions=(JudgeQuestion(text="Is the {thing} red?"),))
    reward.check_prompts([Prompt("a car", {"thing": "car"})])
    with pytest.raises(
        ValueError, match=r"a question has \{thing\}, which the metadata of prompt 'a cat' does not have"
    ):
        reward.check_prompts([Prompt("a car", {"thing": "car"}), Prompt("a cat")])


@pytest.mark.parametrize("text", ["I would rather not say", "", None, "11", "There are 2 dogs"])
def test_an_answer_that_cannot_be_read_is_asked_for_again(text: str | None) -> None:
    with scripted(says(text), says("8")) as (url, script):
        assert score(judge(url)) == [pytest.approx(0.8)]
    assert len(script.asked) == 2


def test_an_answer_that_is_cut_off_is_no_score() -> None:
    with scripted(says("1", finish="length"), says("10")) as (url, script):
        assert score(judge(url)) == [1.0]
    assert len(script.asked) == 2


def test_an_answer_that_stays_unreadable_is_an_error_with_the_answer_and_is_paid_for_once() -> None:
    with scripted(says("A fine image!", tokens=(100, 7))) as (url, script):
        loaded = judge(url, attempts=3)
        for _ in range(2):
            with pytest.raises(RewardServiceFailed, match="answered 'A fine image!' to 'How good is cat.': it must be"):
                score(loaded)
        assert len(script.asked) == 3
        assert loaded.take_usage() == {
            "requests": 3,
            "cached_answers": 0,
            "input_tokens": 300,
            "output_tokens": 21,
        }


def test_log_probs_that_the_service_does_not_give_are_an_error_that_says_what_to_do() -> None:
    with scripted(says("yes")) as (url, _), pytest.raises(RewardServiceFailed, match="set log_probs = false"):
        score(judge(url, JudgeQuestion(), attempts=1))


@pytest.mark.parametrize(
    "reply", [b"<html>502</html>", b"", b"null", b'{"choices": [{}]}', b'{"object": "error"}', b'{"choices": "no"}']
)
def test_a_reply_that_is_not_of_the_protocol_is_an_error_that_shows_it(reply: bytes) -> None:
    with scripted((200, reply, {})) as (url, _), pytest.raises(RewardServiceFailed) as error:
        score(judge(url, attempts=1))
    assert repr(reply.decode())[:100] in str(error.value)


@pytest.mark.rotated(every=3)
@pytest.mark.parametrize("fault", [(500, b"broken", {}), (503, b"", {}), hang_up, drip])
def test_a_passing_fault_is_retried(fault: Answer) -> None:
    with scripted(fault, says("6")) as (url, script):
        loaded = judge(url, timeout_seconds=0.5)
        assert score(loaded) == [pytest.approx(0.6)]
        assert loaded.take_usage()["requests"] == 2, "a request that failed is one too"
    assert len(script.asked) == 2


def test_no_choice_is_an_empty_answer_and_asked_for_again() -> None:
    with scripted((200, b'{"choices": []}', {}), says("6")) as (url, _):
        assert score(judge(url)) == [pytest.approx(0.6)]


def test_one_refusal_by_429_stops_all_requests_for_as_long_as_the_service_asks() -> None:
    times: list[float] = []

    def first_refuses(handler: Scripted) -> None:
        with lock:
            times.append(time.monotonic())
            refused = len(times) == 1
        if not refused and times[-1] - times[0] < 0.3:
            time.sleep(0.3)  # two of the first three requests are on their way when the first one is refused
        status, body, headers = (429, b"slow down", {"Retry-After": "1"}) if refused else says("5")  # type: ignore[misc]
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    lock = threading.Lock()
    with scripted(first_refuses) as (url, _):
        loaded = judge(url, *(JudgeQuestion(text=text, answer="number") for text in "ab"), requests_at_once=3)
        assert score(loaded, 3) == [0.5, 0.5, 0.5]
    later = [each - times[0] for each in times[3:]]
    assert len(times) == 7 and min(later) >= 1.0, "three at once, then none for a second"


def test_no_more_requests_than_allowed_are_in_flight() -> None:
    inside, most, lock = [0], [0], threading.Lock()

    def slow(handler: Scripted) -> None:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        time.sleep(0.1)
        with lock:
            inside[0] -= 1
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(says("5")[1])  # type: ignore[index]

    with scripted(slow) as (url, _):
        score(judge(url, requests_at_once=2), 3)
    assert most[0] == 2


def test_costs_are_counted_and_reported_once() -> None:
    prices = {"dollars_per_million_input": 2.0, "dollars_per_million_output": 10.0}
    with scripted(says("5", tokens=(1000, 20))) as (url, _):
        reward = VlmJudge(url=url, model=MODEL, questions=(NUMBER,), **prices)
        worker = RewardWorker({"judge": reward}, RewardPoolTable(batch_size=2), RuntimeTable(device="cpu"))
        images = ImageBatch(IMAGES, tuple(Prompt(text) for text in PROMPTS))
        first, second = worker.score(images), worker.score(images)
    expected = {"requests": 3, "cached_answers": 0, "input_tokens": 3000, "output_tokens": 60}
    expected["dollars"] = (3000 * 2 + 60 * 10) / 1e6  # type: ignore[assignment]
    assert first.usage == {f"judge/{name}": pytest.approx(value) for name, value in expected.items()}
    assert second.usage["judge/cached_answers"] == 3 and second.usage["judge/dollars"] == 0


def test_an_answer_is_remembered_by_image_question_and_model(tmp_path: Path) -> None:
    with scripted(says("3"), says("4"), says("5"), says("6")) as (url, script):
        keys = {"cache_folder": str(tmp_path / "answers")}
        assert score(judge(url, **keys)) == score(judge(url, **keys)) == [pytest.approx(0.3)]
        assert len(script.asked) == 1
        assert score(judge(url, JudgeQuestion(text="Is it?", answer="number"), **keys)) == [pytest.approx(0.4)]
        assert score(judge(url, model="another", **keys)) == [0.5]
        assert judge(url, **keys)(IMAGES[1:2], PROMPTS[:1], [{}]).tolist() == pytest.approx([0.6])
        assert score(judge(url, cache_answers=0, cache_folder=None)) == [pytest.approx(0.6)]
    assert len(script.asked) == 5


def test_the_small_model_answers_yes_or_no_by_its_log_probs(tmp_path: Path) -> None:
    question = JudgeQuestion(text="is this a {prompt} in the image")
    with chat_service(tmp_path / "vlm") as url:
        reward = VlmJudge(url=url, model=MODEL, questions=(question,))
        reward.check()
        scores = reward.load("cpu")(IMAGES, PROMPTS, [{}] * 3)
        again = VlmJudge(url=url, model=MODEL, questions=(question,), requests_at_once=1).load("cpu")
        assert again(IMAGES[::-1], PROMPTS[::-1], [{}] * 3).tolist() == scores[::-1].tolist()
        by_text = VlmJudge(url=url, model=MODEL, questions=(question.model_copy(update={"log_probs": False}),))
        assert by_text.load("cpu")(IMAGES, PROMPTS, [{}] * 3).tolist() == (scores > 0.5).tolist()
        with pytest.raises(ValueError, match=r"model is 'larger': the service at .* has \['tiny-vlm'\]"):
            VlmJudge(url=url, model="larger").check()
    assert len(set(scores.tolist())) == 3 and ((scores > 0) & (scores < 1)).all()


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"url": "http://user:s3cret@host/v1"}, "without a user's name"),
        ({"token_variable": "sk-s3cret"}, "not the name of an environment variable"),
        ({"extra_body": {"model": "x"}}, r"extra_body has \['model'\]"),
        ({"cache_folder": "answers"}, "must be absolute"),
        ({"dollars_per_million_input": 1.0}, "must be given together"),
        ({"questions": "Is it good?"}, r"reward\.questions"),
        ({"questions": [{"answer": "number", "lowest": 5, "highest": 5}]}, "lowest is 5: it must be below highest"),
        ({"questions": [{"answer": "number", "pattern": "("}]}, "no regular expression"),
        ({"questions": [{"answer": "number", "pattern": "[0-9]"}]}, "must have one group, and has 0"),
        ({"questions": [{"texts": "?"}]}, r"reward\.questions\.0\.texts is not a key that is known"),
    ],
)
def test_a_table_that_cannot_work_is_refused_early(table: dict[str, Any], words: str) -> None:
    whole = {"name": "vlm_judge", "url": "http://host/v1", "model": "m", **table}
    with pytest.raises(ValueError, match=words) as error:
        build({"vlm_judge": "ray_ddpo.actors.rewards.vlm_judge:VlmJudge"}, whole, "reward")
    assert "s3cret" not in str(error.value)


def test_an_edit_is_judged_beside_its_input_image(tmp_path: Path) -> None:
    prompts = File(path=str(save_inputs(tmp_path, ("make it red",), (8, 8))), image_column="image").sampled()
    loaded = VlmJudge(url="http://unused", model=MODEL, show_input=True)
    loaded.check_prompts(prompts)
    with pytest.raises(ValueError, match="the reward's show_input reads each prompt's input image, and 'cat' has none"):
        loaded.check_prompts([Prompt("cat")])
    with scripted(says("", yes=math.log(0.9), no=math.log(0.1))) as (url, script):
        asked = VlmJudge(url=url, model=MODEL, show_input=True).load("cpu")
        about: list[dict[str, Any]] = [dict(prompts[0].metadata)]
        assert asked(IMAGES[:1], ["make it red"], about).tolist() == [pytest.approx(0.9)]
        assert asked(IMAGES[:1], ["make it red"], about).tolist() == [pytest.approx(0.9)]  # remembered
        asked(IMAGES[1:2], ["make it red"], about)
    first, second = bodies(script)
    *shown, question = first["messages"][0]["content"]
    read = [from_png(each["image_url"]["url"].removeprefix("data:image/png;base64,"), 64) for each in shown]
    assert np.array_equal(read[0], input_pixels(0, (8, 8))) and np.array_equal(read[1], IMAGES[0])
    assert 'by the instruction "make it red"' in question["text"] and len(second["messages"][0]["content"]) == 3
