"""Clips as files in memory: mp4 with H.264 for players, and GIF for TensorBoard."""

import io
from fractions import Fraction

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from ray_ddpo.common.clips import Clip

PACKAGE = "av"  # whose wheels bring FFmpeg with x264
SHOWN_EDGE = 128  # pixels; clips with a smaller longest edge are enlarged by an integer factor
FACTORS = (18, 24, 30, 36, 42, 51)  # x264's constant rate factor: higher ones make smaller and coarser files
PRESET = "veryfast"  # of x264: a third of the time of its default
MOST_BYTES = 2_000_000  # of a file, as far as the coarsest factor reaches
LONGEST_RATE = 1000  # denominator of a frame rate in a file


def playable(clip: Clip, longest_edge: int | None = None) -> UInt8[np.ndarray, "F H2 W2 3"]:
    """Return the clip with sides that a file can have.

    A small clip is enlarged so that players show its pixels. Sides become even, as H.264 stores color, by repeating the
    last row or column.

    Args:
        clip: the clip.
        longest_edge: pixels to which a larger clip is reduced, if given.
    """
    longest = max(clip.shape[1:3])
    if longest_edge is not None and longest > longest_edge:
        height, width = (max(1, round(side * longest_edge / longest)) for side in clip.shape[1:3])
        clip = np.stack([np.asarray(Image.fromarray(frame).resize((width, height))) for frame in clip])
    factor = max(1, SHOWN_EDGE // longest)
    clip = clip.repeat(factor, axis=1).repeat(factor, axis=2)
    rows, columns = (side % 2 for side in clip.shape[1:3])
    return np.pad(clip, ((0, 0), (0, rows), (0, columns), (0, 0)), mode="edge")


def mp4(clip: Clip, frame_rate: float, most_bytes: int = MOST_BYTES, longest_edge: int | None = None) -> bytes:
    """Return the clip as an mp4 file. The same clip gives the same bytes under the same version of av.

    Args:
        clip: the clip.
        frame_rate: frames a second.
        most_bytes: the size of the file, above which a coarser quality is taken.
        longest_edge: pixels to which a larger clip is reduced, if given.
    """
    frames, file = playable(clip, longest_edge), b""
    for factor in FACTORS:
        file = _encoded(frames, frame_rate, factor)
        if len(file) <= most_bytes:
            break
    return file


def _encoded(frames: Clip, frame_rate: float, factor: int) -> bytes:
    """Return the frames as H.264 in mp4, on one thread, with the color space in the file."""
    import av
    from av.video.reformatter import ColorRange, Colorspace

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as file:
        rate = Fraction(frame_rate).limit_denominator(LONGEST_RATE)
        stream = file.add_stream("libx264", rate=rate, options={"crf": str(factor), "preset": PRESET})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"  # the only one that all browsers play
        codec = stream.codec_context
        codec.thread_count = 1  # several threads may change the bits
        codec.colorspace = codec.color_primaries = codec.color_trc = Colorspace.ITU709
        codec.color_range = ColorRange.MPEG
        for frame in frames:
            shown = av.VideoFrame.from_ndarray(frame, format="rgb24")
            file.mux(stream.encode(shown.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)))
        file.mux(stream.encode())
    return buffer.getvalue()


def frames_of(data: bytes) -> Clip:
    """Return the frames of an mp4 file of this module, as `playable` made them and H.264 keeps them."""
    import av

    with av.open(io.BytesIO(data), "r") as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def gif(clip: Clip, frame_rate: float) -> bytes:
    """Return the clip as an animated GIF of up to 256 colors a frame, which repeats forever."""
    first, *others = [Image.fromarray(frame) for frame in clip]
    buffer = io.BytesIO()
    duration = max(20, round(1000 / frame_rate))  # milliseconds; browsers slow down shorter ones
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=duration, loop=0)
    return buffer.getvalue()
