"""UnifiedReward's answers are read as its authors do, and nothing else is taken for a rating."""

import json

import numpy as np
import pytest

from ray_ddpo.actors.rewards.service_client import RewardServiceFailed
from ray_ddpo.actors.rewards.unified_reward import AXES_PROMPT, AxisWeights, UnifiedReward
from tests.chat_services import says
from tests.reward_services import scripted

IMAGE = np.zeros((1, 8, 8, 3), np.uint8)
# The example output of the authors' script.
EXAMPLE = (
    "Alignment Score (1-5): 2.694700002670288\nCoherence Score (1-5): 2.371500015258789\n"
    "Style Score (1-5): 2.802500009536743\n"
)
FINAL = "cat (animal): 1\ndog (animal): 0\nFinal Score: 3.5"


def test_the_rating_is_the_weighted_mean_of_the_axes() -> None:
    with scripted(says(EXAMPLE)) as (url, script):
        score = UnifiedReward(url=f"{url}/v1").load("cpu")(IMAGE, ["a cat"], [{}])
        aligned = UnifiedReward(url=f"{url}/v1", axes=AxisWeights(coherence=0, style=0)).load("cpu")
        assert aligned(IMAGE, ["a cat"], [{}])[0] == pytest.approx(2.6947, abs=1e-4)
    assert score[0] == pytest.approx((2.6947 + 2.3715 + 2.8025) / 3, abs=1e-4)
    body = json.loads(script.asked[0].body)
    assert body["model"] == "UnifiedReward" and body["max_tokens"] == 4096
    assert body["messages"][0]["content"][1]["text"] == AXES_PROMPT.replace("{prompt}", "a cat")


def test_version_1_5_gives_one_final_score() -> None:
    with scripted(says(FINAL)) as (url, script):
        score = UnifiedReward(url=url, version="1.5").load("cpu")(IMAGE, ["a cat"], [{}])
    assert score.tolist() == [3.5]
    asked = json.loads(script.asked[0].body)["messages"][0]["content"][1]["text"]
    assert asked.endswith("after 'Final Score:'.\nYour task is provided as follows:\nText Caption: [a cat]")


@pytest.mark.parametrize(
    "text",
    [
        "Alignment Score (1-5): 4\nCoherence Score (1-5): 4",
        EXAMPLE.replace("2.8", "7.8"),
        EXAMPLE.replace("Style Score (1-5): 2.8", "Style Score (1-5): Z 2.8"),
        EXAMPLE.replace("2.802500009536743", "3/10"),
        EXAMPLE.replace("2.802500009536743", "3,5"),
        EXAMPLE + EXAMPLE.replace("2.69", "1.69"),
        FINAL,
    ],
)
def test_an_incomplete_or_contradicting_rating_is_no_score(text: str) -> None:
    with scripted(says(text)) as (url, _), pytest.raises(RewardServiceFailed, match="UnifiedReward answered"):
        UnifiedReward(url=url, attempts=1).load("cpu")(IMAGE, ["a cat"], [{}])


def test_weights_that_are_all_0_are_refused() -> None:
    with pytest.raises(ValueError, match="are all 0"):
        AxisWeights(alignment=0, coherence=0, style=0)
