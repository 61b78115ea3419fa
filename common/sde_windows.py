"""Position of the SDE window in each round, as a pure function of the run's seed and the round (no torch)."""

import math
from bisect import bisect_right
from itertools import accumulate

import numpy as np

from ray_ddpo.common.recipe.sampling_table import SamplingTable

WINDOW = 6  # random stream of the window's position


def window_of_round(sampling: SamplingTable, run_seed: int, round_index: int) -> range:
    """Return the steps of a round's window, which lies between `skip_first_steps` and `skip_last_steps`."""
    assert sampling.sde_window is not None, "a recipe without a window has no position of it"
    first, stop = sampling.skip_first_steps, sampling.num_steps - sampling.skip_last_steps
    starts = range(first, stop - sampling.sde_window + 1)
    if sampling.sde_window_order == "random":
        move = round_index // sampling.sde_window_rounds
        start = starts[int(np.random.default_rng([run_seed, WINDOW, move]).integers(len(starts)))]
    else:
        start = sliding_start(sampling, starts, round_index)
    return range(start, start + sampling.sde_window)


def sliding_start(sampling: SamplingTable, starts: range, round_index: int) -> int:
    """Return where a sliding window starts in a round: MixGRPO's progressive strategy (arXiv 2507.21802, section 4.2).

    Args:
        sampling: stride, rounds at a place, their decay, and what follows the last place.
        starts: the steps at which the window may start.
        round_index: the round.
    """
    places = starts[:: sampling.sde_window_stride] if sampling.sde_window_stride else starts[:1]
    ends = list(accumulate(rounds_at(sampling, place) for place in places))
    if sampling.sde_window_end == "stop" and round_index >= ends[-1]:
        return places[-1]
    return places[bisect_right(ends, round_index % ends[-1])]


def rounds_at(sampling: SamplingTable, start: int) -> int:
    """Return for how many rounds a sliding window stays at a start: ⌈τ exp(−k max(0, start − k₀))⌉, at least one."""
    distance = max(0, start - sampling.sde_window_decay_from)
    left = sampling.sde_window_rounds * math.exp(-sampling.sde_window_decay * distance)
    return max(1, math.ceil(left))  # the exponential may underflow to 0
