"""RewardWorker: pictures in, scores out; it refuses whatever is not one finite number a picture."""

import time

import numpy as np
from jaxtyping import Float

from actors.rewards.reward import LoadedReward, Reward
from common.config import RuntimeTable
from common.runtime import settle
from common.trajectory import ImageBatch, Scores


class RewardWorker:
    """Holds the loaded rewards, by name, and scores batches of a set size cut from a task in order."""

    def __init__(self, rewards: dict[str, Reward], batch_size: int, runtime: RuntimeTable) -> None:
        device = settle(runtime)
        self._rewards = {name: reward.load(device) for name, reward in rewards.items()}
        self._batch_size = batch_size

    def ready(self) -> bool:
        """True, once the rewards are loaded."""
        return True

    def score(self, images: ImageBatch) -> Scores:
        """Every reward of every picture. ValueError: a reward gave the wrong shape, the wrong type, or no finite number."""
        start = time.perf_counter()
        rewards = {name: self._score_all(name, reward, images) for name, reward in self._rewards.items()}
        return Scores(rewards, time.perf_counter() - start)

    def _score_all(self, name: str, reward: LoadedReward, images: ImageBatch) -> Float[np.ndarray, "B"]:
        parts = []
        for start in range(0, len(images.prompts), self._batch_size):
            part = slice(start, start + self._batch_size)
            texts = [prompt.text for prompt in images.prompts[part]]
            metadata = [prompt.metadata for prompt in images.prompts[part]]
            parts.append(_checked(name, reward(images.pixels[part], texts, metadata), texts))
        return np.concatenate(parts)


def _checked(name: str, values: np.ndarray, prompts: list[str]) -> Float[np.ndarray, "B"]:
    values = np.asarray(values)
    if values.shape != (len(prompts),) or not np.issubdtype(values.dtype, np.number) or np.iscomplexobj(values):
        raise ValueError(
            f"the reward {name!r} returned {values.dtype} of shape {values.shape} for {len(prompts)} pictures: "
            f"it must return one real number for each, shape ({len(prompts)},)"
        )
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as that
        scores = values.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        raise ValueError(
            f"the reward {name!r} gave {values[bad[0]]} for the picture of {prompts[bad[0]]!r} "
            f"({bad.size} of {len(prompts)} pictures are not finite): a picture that cannot be scored is never scored 0"
        )
    return scores
