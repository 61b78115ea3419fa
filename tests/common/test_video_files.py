"""Files of clips: their frames, colors, duration and size as a player reads them."""

import io

import av
import numpy as np
import pytest
from PIL import Image

from ray_ddpo.common.clips import mosaic
from ray_ddpo.common.video_files import frames_of, gif, mp4, playable
from tests.tiny_clips import moving_clip

COLORS = np.array([(255, 0, 0), (0, 255, 0), (30, 60, 200), (250, 250, 250), (0, 0, 0)], np.uint8)
PLAIN = COLORS[:, None, None].repeat(64, 1).repeat(130, 2)  # five frames of one color each


def test_an_mp4_file_has_the_frames_their_colors_and_the_rate() -> None:
    data = mp4(PLAIN, 12.5)
    with av.open(io.BytesIO(data)) as file:
        (stream,) = file.streams.video
        assert (stream.codec_context.name, stream.pix_fmt, stream.frames) == ("h264", "yuv420p", 5)
        assert stream.average_rate == 12.5 and file.duration == pytest.approx(5 / 12.5 * av.time_base)
    frames = frames_of(data)
    assert frames.shape == PLAIN.shape and np.abs(frames.astype(int) - PLAIN).max() <= 4
    assert mp4(PLAIN, 12.5) == data  # the same bytes


def test_a_small_clip_is_enlarged_and_odd_sides_become_even() -> None:
    clip = np.random.default_rng(0).integers(0, 256, (2, 15, 17, 3), np.uint8)
    shown = playable(clip)
    assert shown.shape == (2, 106, 120, 3)  # 7 times, and another row and column
    assert np.array_equal(shown[:, :105:7, :119:7], clip) and np.array_equal(shown[:, 105], shown[:, 104])
    assert np.array_equal(playable(shown), shown) and frames_of(mp4(clip, 8.0)).shape == shown.shape
    assert playable(PLAIN, longest_edge=65).shape == (5, 32, 66, 3)


def test_a_file_has_at_most_the_bytes_that_are_asked_for() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 96, 128, 3), np.uint8)
    assert len(mp4(noise, 8.0)) > 50_000 > len(mp4(noise, 8.0, most_bytes=50_000))


def test_a_gif_has_the_frames_and_repeats() -> None:
    with Image.open(io.BytesIO(gif(moving_clip(), 10.0))) as image:
        assert (image.n_frames, image.info["duration"], image.info["loop"]) == (5, 100, 0)
        image.seek(3)
        assert image.size == (24, 16) and image.convert("RGB").getpixel((8, 6)) == (220, 30, 40)
        assert image.convert("RGB").getpixel((4, 6)) == (20, 20, 20)


def test_a_mosaic_has_rows_of_clips() -> None:
    rows = [np.stack([moving_clip(number), moving_clip(number + 1)]) for number in (0, 2)]
    clip = mosaic(rows)
    assert clip.shape == (5, 32, 48, 3)
    assert [clip[0, y, x, 0] for y, x in ((0, 0), (0, 24), (16, 0), (16, 24))] == [20, 30, 40, 50]
