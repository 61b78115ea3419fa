"""Rewards on clips: which frames are scored, how their scores become one, and what a reward of clips is given."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from ray_ddpo.actors.reward_worker import RewardWorker
from ray_ddpo.actors.rewards.frames import FrameScoring
from ray_ddpo.actors.rewards.function import FunctionReward
from ray_ddpo.actors.rewards.http import Http
from ray_ddpo.actors.rewards.image_statistics import Brightness
from ray_ddpo.actors.rewards.motion import Motion, motion
from ray_ddpo.actors.rewards.reward import LoadedReward, Reward, RewardMistake
from ray_ddpo.common.clips import equally_distant, poster, posters, some_frames
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.recipe.tables import RewardPoolTable, RewardTable, RuntimeTable
from ray_ddpo.common.trajectory import ImageBatch, image_fingerprints, thumbnails
from ray_ddpo.deploy.commands.doctor.checks import reward_findings
from tests.reward_services import serving

SEEN: list[tuple[tuple[int, ...], list[int], list[str]]] = []
LEVELS = [[10, 40, 250], [0, 20, 40]]  # the grey level of each frame of two clips


class Level(Reward):
    """A reward of images that remembers what it was given."""

    independent: bool = False

    @property
    def independent_of_batch(self) -> bool:
        return self.independent

    def load(self, device: str) -> LoadedReward:
        def score(images: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> np.ndarray:
            levels = images[:, 0, 0, 0]
            SEEN.append((images.shape, levels.tolist(), prompts))
            return np.where(levels == 250, np.nan, levels) if metadata[0].get("nan") else levels.astype(float)

        return score


def clips(levels: Sequence[Sequence[int]] = LEVELS, **metadata: Any) -> ImageBatch:
    pixels = np.array(levels, np.uint8)[:, :, None, None, None].repeat(4, 2).repeat(6, 3).repeat(3, 4)
    return ImageBatch(pixels, tuple(Prompt(f"clip {number}", metadata) for number in range(len(levels))), 8.0)


def scored(reward: Reward, batch: ImageBatch, frames: FrameScoring | None = None, **pool: Any) -> Any:
    SEEN.clear()
    keys = {"mine": frames} if frames else None
    return RewardWorker({"mine": reward}, RewardPoolTable(**pool), RuntimeTable(device="cpu"), frames=keys).score(batch)


@pytest.mark.parametrize(
    ("scoring", "expected"),
    [
        (FrameScoring(), [100, 20]),
        (FrameScoring("minimum"), [10, 0]),
        (FrameScoring("last"), [250, 40]),
        (FrameScoring(count=2), [130, 20]),  # the first and the last
        (FrameScoring("minimum", count=1), [40, 20]),  # the middle one
        (FrameScoring(count=9), [100, 20]),
    ],
)
@pytest.mark.parametrize("independent", [True, False])
def test_scores_of_frames_become_one_score(scoring: FrameScoring, expected: list[float], independent: bool) -> None:
    scores = scored(Level(independent=independent), clips(), scoring).rewards["mine"]
    assert scores.tolist() == expected and scores.dtype == np.float32


def test_an_independent_reward_gets_frames_in_pieces_of_the_batch_size() -> None:
    scored(Level(independent=True), clips([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]), batch_size=4)
    assert [shape for shape, _, _ in SEEN] == [(4, 4, 6, 3), (4, 4, 6, 3), (2, 4, 6, 3)]
    assert sum((levels for _, levels, _ in SEEN), []) == [1, 6, 2, 7, 3, 8, 4, 9, 5, 10]
    assert SEEN[0][2] == ["clip 0", "clip 1", "clip 0", "clip 1"]


def test_another_reward_gets_one_frame_of_every_clip_at_a_time() -> None:
    scored(Level(), clips([[1, 2], [3, 4], [5, 6]]), batch_size=2)
    assert [levels for _, levels, _ in SEEN] == [[1, 3], [2, 4], [5], [6]]


def test_a_clip_with_a_frame_that_has_no_score_is_dropped() -> None:
    for kind in ("mean", "minimum"):
        scores = scored(Level(), clips(nan=True), FrameScoring(kind))
        assert scores.dropped == {0: "the reward 'mine' gave nan for the clip of 'clip 0'"}
        assert scores.rewards["mine"][1] == {"mean": 20, "minimum": 0}[kind]


def test_scores_are_cached_by_clip() -> None:
    worker = RewardWorker({"mine": Level(independent=True)}, RewardPoolTable(cache=9), RuntimeTable(device="cpu"))
    SEEN.clear()
    first, again = worker.score(clips()), worker.score(clips([[0, 20, 41], LEVELS[1]]))
    assert first.rewards["mine"][1] == again.rewards["mine"][1]
    assert [levels for _, levels, _ in SEEN] == [[10, 0, 40, 20, 250, 40], [0, 20, 41]]


def test_motion_is_the_mean_difference_of_neighboring_frames() -> None:
    # Differences of the first clip: 30 and 210; of the second: 20 and 20.
    scores = scored(Motion(), clips()).rewards["mine"]
    np.testing.assert_allclose(scores, [(30 + 210) / 2 / 255, 20 / 255], rtol=1e-6)
    still, flashing = clips([[7, 7, 7], [0, 255, 0]]).pixels
    assert (motion(still), motion(flashing)) == (0.0, 1.0)
    half = np.zeros((2, 2, 2, 3), np.uint8)
    half[1, 0, 0, 0] = 51  # one of 12 values changes by a fifth
    assert motion(half) == pytest.approx(0.2 / 12)
    with pytest.raises(ValueError, match="motion is of neighboring frames, and the clip has 1"):
        motion(still[:1])


def test_a_reward_of_clips_refuses_images() -> None:
    with pytest.raises(RewardMistake, match="the reward 'mine' scores clips, and it was given images"):
        scored(Motion(), ImageBatch(clips().pixels[:, 0], clips().prompts))


def test_a_users_function_of_clips_gets_whole_clips_read_only() -> None:
    def frames(clips: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        assert not clips.flags.writeable
        return [10.0 * clips.shape[1] + clips.shape[2]] * len(prompts)

    assert FunctionReward.of(frames).takes_clips
    assert scored(FunctionReward.of(frames), clips()).rewards["mine"].tolist() == [34, 34]
    assert not FunctionReward(path="tests.user_functions:brightness").takes_clips
    assert not FunctionReward.of(lambda images, prompts, metadata, clips=None: [0.0] * len(images)).takes_clips


def test_a_service_scores_clips_and_frames() -> None:
    with serving(Motion()) as url:
        through_service = scored(Http(url=url, clips=True, images_per_request=1), clips()).rewards["mine"]
        assert through_service.tolist() == scored(Motion(), clips()).rewards["mine"].tolist()
        failed = "scores clips, and it was given images"
        with pytest.raises(ValueError, match=failed):
            scored(Http(url=url, attempts=1), clips())
    with serving(Brightness()) as url:  # of images: the service itself takes the mean of the frames
        for whole in (True, False):
            scores = scored(Http(url=url, clips=whole), clips()).rewards["mine"]
            np.testing.assert_allclose(scores, np.array([100, 20]) / 255, rtol=1e-6)


def test_the_doctor_tries_a_reward_of_clips_on_a_clip() -> None:
    (finding,) = reward_findings("the recipe", "motion", Motion())
    assert (finding.level, finding.found) == ("ok", "motion can be loaded, and scores")


def test_the_poster_stands_for_the_clip_and_the_fingerprint_is_of_all_frames() -> None:
    batch = clips().pixels
    assert posters(batch)[:, 0, 0, 0].tolist() == [40, 20] and poster(batch[0])[0, 0, 0] == 40
    assert poster(batch[0, :2])[0, 0, 0] == 40  # the later one of two
    assert posters(batch[:, 0]) is not None and np.array_equal(posters(batch[:, 0]), batch[:, 0])
    assert np.array_equal(thumbnails(batch), thumbnails(posters(batch)))
    other = batch.copy()
    other[0, 2, 3, 5, 2] += 1
    same = [one == two for one, two in zip(image_fingerprints(batch), image_fingerprints(other), strict=True)]
    assert same == [False, True]


def test_frames_at_equal_distances_have_the_first_and_the_last() -> None:
    assert equally_distant(81, 5) == [0, 20, 40, 60, 80]
    assert equally_distant(5, 1) == [2] and equally_distant(3, 7) == [0, 1, 2] and equally_distant(1, 4) == [0]
    assert some_frames(clips().pixels, 2)[:, 0, 0, 0].tolist() == [10, 250, 0, 40]


def test_the_last_frame_and_a_number_of_frames_are_refused_together() -> None:
    assert FrameScoring.of(RewardTable(name="motion", frames="minimum", scored_frames=4)) == FrameScoring("minimum", 4)
    with pytest.raises(ValueError, match="frames is 'last' and scored_frames 4: give one of the two"):
        RewardTable(name="motion", frames="last", scored_frames=4)
