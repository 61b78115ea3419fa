"""Care: how to sample a task again after samplers died over it."""

from dataclasses import dataclass
from typing import Literal

# Deaths of samplers over a task, of reward workers over a batch, or of either over one image, after which the task,
# the batch or the image is suspected: one death may be chance.
DEATHS = 2


@dataclass(frozen=True)
class Care:
    """How to sample a task over which samplers died. By default like any other task."""

    # The part of the work to do image by image, so that the current image is known if the sampler dies.
    one_by_one: Literal["nothing", "decoding", "all"] = "nothing"
    not_decoded: tuple[int, ...] = ()  # rows that kill samplers when decoded
    not_sampled: tuple[int, ...] = ()  # rows that kill samplers when denoised

    @property
    def left_out(self) -> dict[int, str]:
        """Return the rows that have no image, and why."""
        died = f"died, {DEATHS} times over it alone"
        reasons = {row: f"the sampler that decoded it {died}" for row in self.not_decoded}
        return reasons | {row: f"the sampler that sampled it {died}" for row in self.not_sampled}


PLAIN = Care()
