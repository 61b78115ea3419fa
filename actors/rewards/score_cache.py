"""ScoreCache: an image that was scored before has its score at once, from rewards for which its batch does not matter."""

import hashlib
import json
from collections import OrderedDict
from typing import Any

import numpy as np

from ray_ddpo.actors.rewards.reward import Images, LoadedReward


class ScoreCache:
    """A reward that remembers its last `size` scores by image, prompt and metadata; what is not finite is not kept."""

    def __init__(self, reward: LoadedReward, size: int) -> None:
        self._reward = reward
        self._size = size
        self._scores: OrderedDict[str, float] = OrderedDict()  # the one that was asked for last is last

    def __call__(self, images: Images, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
        keys = [_key(*asked) for asked in zip(images, prompts, metadata, strict=True)]
        new = [row for row, key in enumerate(keys) if key not in self._scores]
        answers: Any = np.zeros(0)
        if new:
            answers = np.asarray(
                self._reward(images[new], [prompts[row] for row in new], [metadata[row] for row in new])
            )
            if answers.shape != (len(new),) or not np.issubdtype(answers.dtype, np.floating):
                return answers  # the worker says what is wrong with it
        scores = np.array([self._scores.get(key, np.nan) for key in keys], answers.dtype)
        scores[new] = answers
        for key, score in zip(keys, scores, strict=True):
            self._keep(key, float(score))
        return scores

    def _keep(self, key: str, score: float) -> None:
        if np.isfinite(score):
            self._scores[key] = score
            self._scores.move_to_end(key)
            if len(self._scores) > self._size:
                self._scores.popitem(last=False)


def _key(image: np.ndarray, prompt: str, metadata: dict[str, Any]) -> str:
    beside = json.dumps([image.shape, prompt, metadata], sort_keys=True, default=repr)
    return hashlib.sha256(np.ascontiguousarray(image).tobytes() + beside.encode()).hexdigest()
