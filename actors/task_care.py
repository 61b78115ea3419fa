"""Care: how a task over which samplers have died is sampled again."""

from dataclasses import dataclass
from typing import Literal

DEATHS = 2  # of samplers over one task, or over one of its images: one may be chance


@dataclass(frozen=True)
class Care:
    """How a task is to be sampled over which samplers have died. By default: as any other."""

    # Which part of the work is done image by image, so that it is known which one was in hand.
    one_by_one: Literal["nothing", "decoding", "all"] = "nothing"
    not_decoded: tuple[int, ...] = ()  # rows that kill who decodes them
    not_sampled: tuple[int, ...] = ()  # rows that kill who denoises them

    @property
    def left_out(self) -> dict[int, str]:
        """Return the rows that have no image, and why."""
        died = f"died, {DEATHS} times over it alone"
        reasons = {row: f"the sampler that decoded it {died}" for row in self.not_decoded}
        return reasons | {row: f"the sampler that sampled it {died}" for row in self.not_sampled}


PLAIN = Care()
