"""The reward service: refused requests with their replies, and service afterwards."""

import base64
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import numpy as np
import pytest

from ray_ddpo.actors.rewards.function import FunctionReward
from ray_ddpo.actors.rewards.http import Http, RewardServiceFailed
from ray_ddpo.actors.rewards.jpeg import JpegCompressibility
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.common.reward_protocol import to_png
from ray_ddpo.deploy import reward_service
from tests.common.test_reward_protocol import png_that_says
from tests.reward_services import running, serving

IMAGE = np.full((8, 8, 3), 100, np.uint8)
REQUEST: dict[str, Any] = {"images": [to_png(IMAGE)], "prompts": ["cat"], "metadata": [{}]}
HEADERS = "POST /v1/score HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(FunctionReward(path="tests.user_functions:brightness"), max_bytes=20_000, name="brightness") as url:
        yield url
        # Whatever was refused before, it still answers.
        assert httpx2.post(f"{url}/v1/score", json=REQUEST).json() == {"scores": [100.0]}


def refused(response: httpx2.Response, status: int) -> str:
    assert (response.status_code, response.headers["Content-Type"]) == (status, "application/json")
    (error,) = response.json().values()
    return error


def test_it_says_what_it_is_and_scores(url: str) -> None:
    assert httpx2.get(f"{url}/v1/health").json() == {"reward": "brightness"}
    response = httpx2.post(f"{url}/v1/score", json=REQUEST)
    assert (response.status_code, response.json()) == (200, {"scores": [100.0]})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": "abc"}, "images: "),
        ({"images": [5]}, "images.0: "),
        ({"images": ["abc"]}, "image 0: "),
        ({"images": [], "prompts": [], "metadata": []}, "images: "),
        ({"prompts": []}, "1 images, 0 prompts and 1 metadata"),
        ({"prompts": [None]}, "prompts.0: "),
        ({"metadata": ["text"]}, "metadata.0: "),
        ({"images": [base64.b64encode(png_that_says(4097, 4096)).decode()]}, "image 0: it has 4097 × 4096 pixels"),
        (
            {"images": [to_png(IMAGE), to_png(IMAGE[:4])], "prompts": ["a", "b"], "metadata": [{}, {}]},
            "image 1 has another size than image 0",
        ),
    ],
)
def test_what_is_no_request_is_refused_with_what_is_wrong_with_it(url: str, change: dict[str, Any], words: str) -> None:
    assert words in refused(httpx2.post(f"{url}/v1/score", json={**REQUEST, **change}), 422)


@pytest.mark.parametrize("body", [b"", b"{", b"null", b"[" * 10_000, b"\xff\xfe", b"\x80\x04K\x01."])
def test_a_body_that_is_no_json_object_is_refused(url: str, body: bytes) -> None:
    refused(httpx2.post(f"{url}/v1/score", content=body), 422)


def test_many_images_that_are_small_as_files_may_not_be_large_together(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reward_service, "MAX_REQUEST_PIXELS", 2 * 64 - 1)
    twice = {name: values * 2 for name, values in REQUEST.items()}
    words = refused(httpx2.post(f"{url}/v1/score", json=twice), 422)
    assert words == "image 1: it has 8 × 8 pixels, and there may be 63"


def test_other_paths_and_methods_are_refused(url: str) -> None:
    refused(httpx2.get(f"{url}/"), 404)
    refused(httpx2.get(f"{url}/v1/score"), 404)
    refused(httpx2.post(f"{url}/v1/health", json=REQUEST), 404)
    refused(httpx2.put(f"{url}/v1/score", json=REQUEST), 501)


def test_an_oversized_request_is_refused_before_it_is_read_and_the_asker_learns_why(url: str) -> None:
    said = raw(url, HEADERS + "Content-Length: 999999999999\r\n\r\n")
    assert said.startswith("HTTP/1.1 413 ") and "may have 20000" in said
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
    assert Http(url=url, images_per_request=1).load("cpu")(noise, ["cat"] * 8, [{}] * 8).shape == (8,)


def test_an_asker_that_is_still_sending_when_it_is_refused_learns_why() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (4, 768, 768, 3), np.uint8)  # more than sockets hold back
    with serving(JpegCompressibility(), max_bytes=5_000_000) as url:
        for _ in range(3):
            with pytest.raises(RewardServiceFailed, match="answered 413: .*and may have 5000000"):
                Http(url=url, attempts=1).load("cpu")(noise, ["cat"] * 4, [{}] * 4)


def raw(url: str, text: str) -> str:
    """What is answered to bytes that no client would send, until the connection is closed."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(text.encode())
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b"")).decode()


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("no request at all\r\n\r\n", 400),
        ("GET / HTTP/9.9\r\n\r\n", 505),
        (HEADERS + "Content-Length: -1\r\n\r\n", 400),
        (HEADERS + "Content-Length: 1e3\r\n\r\n", 400),
        (HEADERS + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        (HEADERS + 'Content-Length: 100\r\n\r\n{"images"', 408),
        (HEADERS + "X: " + "x" * 70_000 + "\r\n\r\n", 431),
    ],
)
def test_what_is_no_http_is_answered_in_json_and_closed(url: str, text: str, status: int) -> None:
    said = raw(url, text)
    assert said.startswith(f"HTTP/1.1 {status} ") and "Connection: close" in said
    assert json.loads(said[said.index("{") :]).keys() == {"error"}


def test_a_connection_that_says_nothing_is_closed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_service._Handler, "timeout", 0.1)
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall((HEADERS + "Content-Length: 100\r\n\r\n{").encode())
        assert connection.recv(1) == b""


def test_without_the_token_every_request_is_refused() -> None:
    token = "s3cret-token"
    with serving(JpegCompressibility(), token=token) as url:
        for given in ({}, {"Authorization": "Bearer"}, {"Authorization": token}, {"Authorization": "Bearer s3cret"}):
            for response in (
                httpx2.get(f"{url}/v1/health", headers=given),
                httpx2.post(f"{url}/v1/score", json=REQUEST, headers=given),
                httpx2.post(f"{url}/elsewhere", content=b"x" * 1_000_000, headers=given),
            ):
                assert token not in refused(response, 401) and response.headers["WWW-Authenticate"] == "Bearer"
        right = {"Authorization": f"Bearer {token}"}
        assert httpx2.get(f"{url}/v1/health", headers=right).status_code == 200
        assert httpx2.post(f"{url}/v1/score", json=REQUEST, headers=right).status_code == 200


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("tests.faulty_rewards:raises_for_bad", "the reward 'served' raised KeyError: 'bad'"),
        ("tests.user_functions:one_number_for_all", "one_number_for_all' returned float64 of shape ()"),
    ],
)
def test_a_reward_that_fails_is_reported_as_the_services_fault(function: str, words: str) -> None:
    with serving(FunctionReward(path=function)) as url:
        assert words in refused(httpx2.post(f"{url}/v1/score", json={**REQUEST, "prompts": ["bad"]}), 500)


def test_an_image_without_a_finite_score_is_null() -> None:
    with serving(FunctionReward(path="tests.faulty_rewards:not_finite_for_bad")) as url:
        twice = {name: values * 2 for name, values in REQUEST.items()} | {"prompts": ["bad", "good"]}
        assert httpx2.post(f"{url}/v1/score", json=twice).json() == {"scores": [None, 1.0]}


def test_askers_side_by_side_each_get_their_own_scores(url: str) -> None:
    def ask(level: int) -> list[float]:
        image = np.full((2, 8, 8, 3), level, np.uint8)
        return Http(url=url).load("cpu")(image, ["a", "b"], [{}, {}]).tolist()

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(64))) == [[level, level] for level in range(64)]


def test_a_service_that_others_can_reach_needs_a_token(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("0.0.0.0", "192.168.0.1", "some-host"):
        with pytest.raises(ValueError, match=f"--host {host} can be reached from elsewhere: give --token-variable"):
            reward_service.reward_server(recipe, None, host, 0, None)
    monkeypatch.setenv("REWARD_TOKEN", "abc")
    server = reward_service.reward_server(recipe, None, "0.0.0.0", 0, "REWARD_TOKEN")
    with running(server) as url:
        assert httpx2.get(f"{url}/v1/health").status_code == 401


def test_which_reward_is_served_must_be_clear(tables: dict) -> None:
    both = [{"name": "jpeg_compressibility"}, {"name": "animal_classifier"}]
    recipe = Recipe.parse({**{key: value for key, value in tables.items() if key != "reward"}, "rewards": both})
    for name in (None, "aesthetic"):
        with pytest.raises(ValueError, match=f"--reward is {name!r}: the recipe has .'animal_classifier', 'jpeg_com"):
            reward_service.reward_server(recipe, name, "127.0.0.1", 0, None)
    server = reward_service.reward_server(recipe, "jpeg_compressibility", "127.0.0.1", 0, None)
    assert server.reward == "jpeg_compressibility"
    server.server_close()


def test_a_service_is_not_served_by_another_and_a_taken_port_is_reported(recipe: Recipe, tables: dict) -> None:
    through = Recipe.parse({**tables, "reward": {"name": "http", "url": "http://127.0.0.1:8000"}})
    with pytest.raises(ValueError, match="itself asked for over HTTP"):
        reward_service.reward_server(through, None, "127.0.0.1", 0, None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen at 127.0.0.1:{port}: "):
            reward_service.reward_server(recipe, None, "127.0.0.1", port, None)
