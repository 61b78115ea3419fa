"""The reward over HTTP, on real sockets: the same scores, patience, and nothing scored by accident."""

import json
import socket
import threading
import time
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from ray_ddpo.actors.reward_worker import RewardWorker
from ray_ddpo.actors.rewards.animal_classifier import AnimalClassifier
from ray_ddpo.actors.rewards.function import FunctionReward
from ray_ddpo.actors.rewards.http import Http, RewardServiceFailed
from ray_ddpo.actors.rewards.jpeg import JpegCompressibility
from ray_ddpo.actors.rewards.reward import RewardMistake
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.recipe.tables import RewardPoolTable, RuntimeTable
from ray_ddpo.common.trajectory import ImageBatch
from tests.reward_services import Answer, Scripted, scripted, serving

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3), np.uint8)
PROMPTS = ["cat", "dog", "horse"]
METADATA: list[dict[str, Any]] = [{"bonus": 1}, {"bonus": 2}, {"bonus": 3}]
GOOD: Answer = (200, b'{"scores": [1.5, -2, 0.25]}', {})


def ask(url: str, **fields: Any) -> np.ndarray:
    return Http(url=url, **{"timeout_seconds": 5.0, **fields}).load("cpu")(IMAGES, PROMPTS, METADATA)


def test_a_service_gives_the_bits_that_the_reward_gives_by_itself() -> None:
    for reward in (JpegCompressibility(), AnimalClassifier()):
        with serving(reward) as url:
            through_service = ask(url)
        assert through_service.dtype == np.float32
        assert through_service.tolist() == reward.load("cpu")(IMAGES, PROMPTS, METADATA).tolist()


def test_prompts_and_metadata_arrive_with_their_images() -> None:
    with serving(FunctionReward(path="tests.user_functions:prompts_and_metadata")) as url:
        assert ask(url).tolist() == [len("cat") + 1, len("dog") + 2, len("horse") + 3]


@pytest.mark.parametrize(
    "prompt", ["c" * 10_000, "eine Katze – 猫 🐈 \u0000 \"'", "line\nbreak\ttab \\ </script>", "\ud800 alone"]
)
def test_a_prompt_arrives_to_the_letter(prompt: str) -> None:
    seen: list[list[str]] = []

    def remember(handler: Scripted) -> None:
        seen.append(json.loads(handler.script.asked[-1].body)["prompts"])
        handler.wfile.write(b'HTTP/1.0 200 OK\r\n\r\n{"scores": [1]}')

    with scripted(remember) as (url, _):
        Http(url=url).load("cpu")(IMAGES[:1], [prompt], [{}])
    assert seen == [[prompt]]


def test_a_long_prompt_and_a_foreign_one_pass_the_shipped_service() -> None:
    with serving(FunctionReward(path="tests.user_functions:prompts_and_metadata")) as url:
        reward = Http(url=url).load("cpu")
        assert reward(IMAGES[:2], ["c" * 10_000, "猫🐈"], METADATA[:2]).tolist() == [10_001, 4]


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize("size", [(1, 1), (1, 700), (4096, 4096)])
def test_the_smallest_and_the_largest_image_pass(size: tuple[int, int]) -> None:
    image = np.full((1, *size, 3), 7, np.uint8)
    with serving(FunctionReward(path="tests.user_functions:brightness")) as url:
        assert Http(url=url).load("cpu")(image, ["cat"], [{}]).tolist() == [7]


def test_a_scoring_batch_goes_in_one_request_or_in_as_many_as_are_asked_for() -> None:
    with scripted(GOOD) as (url, script):
        ask(url)
    assert [len(json.loads(each.body)["images"]) for each in script.asked] == [3]
    answers: list[Answer] = [(200, b'{"scores": [1, 2]}', {}), (200, b'{"scores": [3]}', {})]
    with scripted(*answers) as (url, script):
        assert ask(url, images_per_request=2).tolist() == [1, 2, 3]
    assert [json.loads(each.body)["prompts"] for each in script.asked] == [["cat", "dog"], ["horse"]]
    assert {each.path for each in script.asked} == {"/v1/score"}


def test_a_image_without_a_score_is_dropped_by_the_worker_and_never_scored() -> None:
    with scripted((200, b'{"scores": [1, null, 1e300]}', {})) as (url, _):
        scores = RewardWorker({"http": Http(url=url)}, RewardPoolTable(batch_size=8), RuntimeTable(device="cpu")).score(
            ImageBatch(IMAGES, tuple(Prompt(text) for text in PROMPTS))
        )
    assert sorted(scores.dropped) == [1, 2] and scores.rewards["http"][0] == 1
    assert "'dog'" in scores.dropped[1]


@pytest.mark.rotated(every=3)
@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_passing_fault_is_asked_again(status: int) -> None:
    with scripted((status, b"busy", {}), GOOD) as (url, script):
        assert ask(url).tolist() == [1.5, -2, 0.25]
    assert len(script.asked) == 2


@pytest.mark.thorough
def test_a_service_that_says_when_to_come_back_is_not_asked_before() -> None:
    for value, least in (("1", 1.0), ("Wed, 25 Nov 2020 00:00:00 GMT", 0.4), ("in a while", 0.4)):
        with scripted((429, b"", {"Retry-After": value}), GOOD) as (url, _):
            start = time.monotonic()
            ask(url)
            assert least <= time.monotonic() - start < least + 2, value
    with scripted((503, b"", {"Retry-After": "86400"}), GOOD) as (url, _):
        start = time.monotonic()
        ask(url, timeout_seconds=0.7)
        assert time.monotonic() - start < 3, "no longer than the time limit of a request"


@pytest.mark.parametrize("status", [301, 400, 401, 404, 413, 422])
def test_a_refusal_is_final_and_reported_with_its_status_and_the_start_of_its_body(status: int) -> None:
    answer: Answer = (status, b"<b>because</b>" + b"x" * 500, {"Location": "http://127.0.0.1:1/"})
    with scripted(answer) as (url, script), pytest.raises(RewardServiceFailed) as error:
        ask(url)
    assert len(script.asked) == 1
    quoted = "<b>because</b>" + "x" * (200 - len("<b>because</b>"))
    assert str(error.value) == f"{url} answered {status}: '{quoted}'"


def test_attempts_end() -> None:
    with scripted((500, b"broken", {})) as (url, script), pytest.raises(ValueError, match="answered 500: 'broken'"):
        ask(url, attempts=2)
    assert len(script.asked) == 2


def hang(handler: Scripted) -> None:
    time.sleep(1.0)


def drip(handler: Scripted) -> None:
    """Send a byte now and then, so that no single read takes long."""
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
    for _ in range(20):
        time.sleep(0.1)
        handler.wfile.write(b" ")


def flood(handler: Scripted) -> None:
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
    for _ in range(40):
        handler.wfile.write(b" " * 1_000_000)


def hang_up(handler: Scripted) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.rotated(every=2)
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (hang, "does not answer: ReadTimeout"),
        (drip, "no complete reply within 0.3 s"),
        (hang_up, "does not answer: RemoteProtocolError"),
    ],
)
def test_a_service_that_hangs_is_given_up_in_time(answer: Answer, words: str) -> None:
    start = time.monotonic()
    with scripted(answer) as (url, script):
        with pytest.raises(RewardServiceFailed, match=words):
            ask(url, timeout_seconds=0.3, attempts=2)
        assert time.monotonic() - start < 3 and len(script.asked) == 2


def test_an_endless_reply_is_refused() -> None:
    with scripted(flood) as (url, _), pytest.raises(RewardServiceFailed, match="its reply is over 16000000 bytes"):
        ask(url, attempts=1)


def test_one_hang_is_asked_again() -> None:
    with scripted(hang, GOOD) as (url, _):
        assert ask(url, timeout_seconds=0.3).tolist() == [1.5, -2, 0.25]


def free_port() -> int:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        return reserved.getsockname()[1]


def test_a_service_that_is_down_is_named_and_one_that_comes_up_meanwhile_answers() -> None:
    port = free_port()
    with pytest.raises(RewardServiceFailed, match=f"http://127.0.0.1:{port} does not answer: ConnectError"):
        ask(f"http://127.0.0.1:{port}", attempts=1)
    with ExitStack() as stack:
        timer = threading.Timer(0.7, lambda: stack.enter_context(serving(JpegCompressibility(), port=port)))
        timer.start()
        scores = ask(f"http://127.0.0.1:{port}", attempts=6)
        timer.join()
    assert scores.tolist() == JpegCompressibility().load("cpu")(IMAGES, PROMPTS, METADATA).tolist()


def test_a_service_that_goes_down_and_comes_back_between_batches_is_found_again() -> None:
    with serving(JpegCompressibility()) as url:
        reward = Http(url=url).load("cpu")
        first = reward(IMAGES, PROMPTS, METADATA)
    with serving(JpegCompressibility(), port=int(url.rpartition(":")[2])):
        assert reward(IMAGES, PROMPTS, METADATA).tolist() == first.tolist()


@pytest.mark.rotated(every=4)
@pytest.mark.parametrize(
    "reply",
    [
        b"<html><body>502 Bad Gateway</body></html>",
        b'{"scores": [1.0, 2.0',
        b"",
        b"[1, 2, 3]",
        b"null",
        b'{"score": [1, 2, 3]}',
        b'{"scores": [1, NaN, 3]}',
        b'{"scores": [1, Infinity, 3]}',
        b'{"scores": [1, 1e999, 3]}',
        b'{"scores": ["1", "2", "3"]}',
        b'{"scores": [[1], [2], [3]]}',
        b'{"scores": [true, false, true]}',
        b'{"scores": {"0": 1}}',
        b'{"scores": 1}',
        b"\xff\xfe\x00garbage",
        b"[" * 100_000,
        b"\x80\x04K\x01.",  # a pickle of 1
    ],
)
def test_garbage_is_no_score_and_no_mistake_for_ever_but_an_error_that_shows_it(reply: bytes) -> None:
    with scripted((200, reply, {})) as (url, script), pytest.raises(RewardServiceFailed) as error:
        ask(url)
    shown = repr(reply.decode("utf-8", "replace")[:200])
    assert str(error.value).startswith(f'{url} answered {shown}: it must be a JSON object with "scores"')
    assert not isinstance(error.value, RewardMistake) and len(script.asked) == 1


@pytest.mark.parametrize("scores", ["[]", "[1, 2]", "[1, 2, 3, 4]"])
def test_another_number_of_scores_is_a_mistake_that_ends_the_run(scores: str) -> None:
    with scripted((200, f'{{"scores": {scores}}}'.encode(), {})) as (url, _):
        count = len(json.loads(scores))
        with pytest.raises(RewardMistake, match=f"gave {count} scores for 3 images"):
            ask(url)


def test_metadata_that_is_no_json_is_a_mistake_that_ends_the_run() -> None:
    reward = Http(url="http://127.0.0.1:1").load("cpu")
    for value in ({1, 2}, float("nan")):
        with pytest.raises(RewardMistake, match="metadata cannot be sent as JSON"):
            reward(IMAGES[:1], ["cat"], [{"key": value}])
