"""A reward from a service: images go there over HTTP, and scores come back as JSON. Nothing is unpickled."""

import json
import os
from typing import Any

import numpy as np
from jaxtyping import Float
from pydantic import ConfigDict, Field, model_validator

from ray_ddpo.actors.rewards.reward import LoadedReward, Reward, RewardMistake
from ray_ddpo.actors.rewards.service_client import RewardServiceFailed as RewardServiceFailed
from ray_ddpo.actors.rewards.service_client import ServiceClient, refuse_secrets
from ray_ddpo.common.clips import Pixels, are_clips
from ray_ddpo.common.reward_protocol import HEALTH_PATH, SCORE_PATH, Health, ScoreReply, read_token, to_png


class Http(Reward):
    """Reward service that scores images over HTTP."""

    model_config = ConfigDict(hide_input_in_errors=True)  # an error must not show a password in the URL
    url: str
    """URL of the service."""
    timeout_seconds: float = Field(default=60.0, gt=0)
    """Seconds that one request and its reply may take."""
    attempts: int = Field(default=3, ge=1)
    """Attempts if the service does not answer, or answers 429 or 5xx."""
    token_variable: str | None = None
    """Environment variable that holds the token of the service. By default no token is sent."""
    images_per_request: int | None = Field(default=None, ge=1)
    """Images, or clips, per request. By default the whole scoring batch."""
    clips: bool = False
    """Send complete clips of a video family, whose frames follow each other. By default each frame is scored as an image."""
    independent: bool = False
    """Promise that an image's score has the same bits in any request. Scores can then be cached."""

    # This validator checks the whole model because the error of a field validator shows the field's value.
    @model_validator(mode="after")
    def _holds_no_secret(self) -> "Http":
        """Refuse credentials in the URL, and a token in place of a variable's name."""
        refuse_secrets(self.url, self.token_variable)
        return self

    @property
    def independent_of_batch(self) -> bool:
        return self.independent

    @property
    def takes_clips(self) -> bool:
        return self.clips

    def check(self) -> None:
        self._client(attempts=1).ask(HEALTH_PATH, Health)

    def _client(self, attempts: int) -> ServiceClient:
        return ServiceClient(self.url, read_token(self.token_variable, os.environ), self.timeout_seconds, attempts)

    def load(self, device: str) -> LoadedReward:
        """Return the scoring function. The service is not contacted: a worker may start while the service is down.

        Raises:
            ValueError: the token is missing.
        """
        client = self._client(self.attempts)

        def score(images: Pixels, prompts: list[str], metadata: list[dict[str, Any]]) -> Float[np.ndarray, "B"]:
            size = self.images_per_request or len(images)
            scores = []
            for start in range(0, len(images), size):
                part = slice(start, start + size)
                scores += _ask(client, images[part], prompts[part], metadata[part])
            with np.errstate(over="ignore"):  # a score too large for float32 becomes infinite, so the image is dropped
                return np.array([np.nan if score is None else score for score in scores]).astype(np.float32)

        return score


def _ask(
    client: ServiceClient, images: Pixels, prompts: list[str], metadata: list[dict[str, Any]]
) -> list[float | None]:
    """Send one request, and return a score an image or a clip."""
    frames = images.reshape(-1, *images.shape[-3:])
    request = {"images": [to_png(image) for image in frames], "prompts": prompts, "metadata": metadata}
    request |= {"frames": images.shape[1]} if are_clips(images) else {}
    try:
        body = json.dumps(request, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise RewardMistake(f"the prompts' metadata cannot be sent as JSON: {error}") from error
    scores = client.ask(SCORE_PATH, ScoreReply, body).scores
    if len(scores) != len(images):
        raise RewardMistake(f"{client.url} gave {len(scores)} scores for {len(images)} images: one each is needed")
    return scores
