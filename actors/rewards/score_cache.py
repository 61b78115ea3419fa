"""ScoreCache: remember the scores of images, for rewards that are independent of the batch."""

import hashlib
import json
from collections import OrderedDict
from typing import Any

import numpy as np

from ray_ddpo.actors.rewards.reward import LoadedReward
from ray_ddpo.common.clips import ImageOrClip, Pixels


class ScoreCache:
    """A reward with a cache of its last `size` finite scores, by image or clip, prompt and metadata."""

    def __init__(self, reward: LoadedReward, size: int) -> None:
        self._reward = reward
        self._size = size
        self._scores: OrderedDict[str, float] = OrderedDict()  # the most recently used is last

    def __call__(self, images: Pixels, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
        keys = [_key(*asked) for asked in zip(images, prompts, metadata, strict=True)]
        new = [row for row, key in enumerate(keys) if key not in self._scores]
        answers: Any = np.zeros(0)
        if new:
            answers = np.asarray(
                self._reward(images[new], [prompts[row] for row in new], [metadata[row] for row in new])
            )
            if answers.shape != (len(new),) or not np.issubdtype(answers.dtype, np.floating):
                return answers  # the worker raises the error
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


def _key(image: ImageOrClip, prompt: str, metadata: dict[str, Any]) -> str:
    beside = json.dumps([image.shape, prompt, metadata], sort_keys=True, default=repr)
    return hashlib.sha256(np.ascontiguousarray(image).tobytes() + beside.encode()).hexdigest()
