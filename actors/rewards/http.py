"""A reward service over HTTP, with JSON requests and replies. Nothing is unpickled."""

import json
import os
import re
from typing import Any

import numpy as np
from jaxtyping import Float
from pydantic import ConfigDict, Field, model_validator

from ray_ddpo.actors.rewards.http_client import RewardClient
from ray_ddpo.actors.rewards.reward import Images, LoadedReward, Reward, RewardMistake
from ray_ddpo.common.reward_protocol import HEALTH_PATH, SCORE_PATH, Health, ScoreReply, read_token, to_png


class Http(Reward):
    """The scores of a service at `url`. Its token is in the environment variable that `token_variable` names."""

    model_config = ConfigDict(hide_input_in_errors=True)  # a password in a URL would stand there
    url: str
    timeout_seconds: float = Field(default=60.0, gt=0)  # for one request and its reply
    attempts: int = Field(default=3, ge=1)  # where it does not answer, or answers 429 or 5xx
    token_variable: str | None = None
    images_per_request: int | None = Field(default=None, ge=1)  # none: the whole scoring batch
    independent: bool = False  # whether the service scores an image the same in whatever company it comes

    # A validator of the model, because the error of a field's validator would contain the field's value.
    @model_validator(mode="after")
    def _holds_no_secret(self) -> "Http":
        """Refuse a URL with a password, and a token in place of a variable's name, without showing either."""
        if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", self.url):
            shown = re.sub(r"//.*@", "//", self.url).partition("?")[0]
            raise ValueError(
                f"url is {shown!r}: it must be http(s)://host:port or http(s)://host/path, "
                "without a user's name, a password or a query"
            )
        if self.token_variable is not None and not re.fullmatch("[A-Z][A-Z0-9_]*", self.token_variable):
            raise ValueError(
                "token_variable is not the name of an environment variable in capitals, such as REWARD_TOKEN; "
                "the token itself never stands in a recipe"
            )
        return self

    @property
    def independent_of_batch(self) -> bool:
        return self.independent

    def check(self) -> None:
        self._client(attempts=1).ask(HEALTH_PATH, Health)

    def _client(self, attempts: int) -> RewardClient:
        return RewardClient(self.url, read_token(self.token_variable, os.environ), self.timeout_seconds, attempts)

    def load(self, device: str) -> LoadedReward:
        """Make a client, without a request, because a worker may start while the service is down.

        Raises:
            ValueError: the token's environment variable is not set.
        """
        client = self._client(self.attempts)

        def score(images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> Float[np.ndarray, "B"]:
            size = self.images_per_request or len(images)
            scores = []
            for start in range(0, len(images), size):
                part = slice(start, start + size)
                scores += _ask(client, images[part], prompts[part], metadata[part])
            with np.errstate(over="ignore"):  # a number beyond float32 becomes infinite, and the image is dropped
                return np.array([np.nan if score is None else score for score in scores]).astype(np.float32)

        return score


def _ask(
    client: RewardClient, images: Images, prompts: list[str], metadata: list[dict[str, Any]]
) -> list[float | None]:
    """Request the scores of a batch. Raise RewardMistake if their number is wrong or metadata is no JSON."""
    request = {"images": [to_png(image) for image in images], "prompts": prompts, "metadata": metadata}
    try:
        body = json.dumps(request, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise RewardMistake(f"the prompts' metadata cannot be sent as JSON: {error}") from error
    scores = client.ask(SCORE_PATH, ScoreReply, body).scores
    if len(scores) != len(images):
        raise RewardMistake(f"{client.url} gave {len(scores)} scores for {len(images)} images: one each is needed")
    return scores
