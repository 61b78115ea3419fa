"""What trackers are shown of an evaluated version: its images beside the pretrained model's of the same noise, and scores."""

import numpy as np
from jaxtyping import Float, UInt8

from ray_ddpo.common.run_storage.evaluation_log import EvaluatedImages
from ray_ddpo.common.trackers.media import CaptionedImage, Cell, Media, ShownTable

PANEL = "evaluation"


def evaluation_media(
    round: int,
    images: EvaluatedImages,
    before: list[UInt8[np.ndarray, "H W 3"]],
    reward_before: Float[np.ndarray, "N"],
) -> Media:
    """The first images, as many as `before` has, with their rewards; and a table of them with every score."""
    pairs, rows = [], []
    names = tuple(images.scores)
    for image, earlier in enumerate(before):
        prompt = images.prompts[image].text
        reward, change = images.scores["reward"][image], images.scores["reward"][image] - reward_before[image]
        side_by_side = np.concatenate([earlier, images.pixels[image]], axis=1)
        pairs.append(CaptionedImage(side_by_side, f"{prompt}: reward {reward:.4g} ({change:+.3g})"))
        # As text, for a page's numbers are exact to 53 bits only.
        cells: list[Cell] = [
            prompt,
            str(images.seeds[image]),
            CaptionedImage(earlier),
            CaptionedImage(images.pixels[image]),
        ]
        rows.append((*cells, *(float(images.scores[name][image]) for name in names)))
    columns = ("prompt", "seed", "before", "now", *names)
    scores = {f"{PANEL}/{name}": values[np.isfinite(values)] for name, values in images.scores.items()}
    if not pairs:
        return Media(round, histograms=scores)
    return Media(round, {PANEL: tuple(pairs)}, {PANEL: ShownTable(columns, tuple(rows))}, scores)
