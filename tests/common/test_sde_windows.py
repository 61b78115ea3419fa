"""Positions of SDE windows: MixGRPO's progressive schedule counted as its authors count, and refused combinations."""

from itertools import product

import pytest

from ray_ddpo.common.recipe.tables import SamplingTable
from ray_ddpo.common.sde_windows import rounds_at, window_of_round
from tests.reference.flow_samplers_reference import MixGRPOWindows

KEYS = {"num_steps": 25, "sde_window": 4, "skip_last_steps": 2}


def starts(rounds: int, **keys: object) -> list[int]:
    sampling = SamplingTable(**{**KEYS, "sde_window_order": "sliding", **keys})
    return [window_of_round(sampling, 3, each).start for each in range(rounds)]


@pytest.mark.rotated(every=5)
@pytest.mark.parametrize(
    ("size", "stride", "rounds", "wraps", "decay"),
    [*product((2, 4), (1, 3, 4), (1, 5), (True, False), ((0.0, 0), (0.1, 13), (0.5, 2)))],
)
def test_sliding_windows_are_those_of_mixgrpo(
    size: int, stride: int, rounds: int, wraps: bool, decay: tuple[float, int]
) -> None:
    k, threshold = decay
    theirs = MixGRPOWindows(size, stride, rounds, 23, wraps, k, threshold)
    sampling = SamplingTable(
        num_steps=25,
        skip_last_steps=2,
        sde_window=size,
        sde_window_order="sliding",
        sde_window_stride=stride,
        sde_window_rounds=rounds,
        sde_window_end="wrap" if wraps else "stop",
        sde_window_decay=k,
        sde_window_decay_from=threshold if k else 0,
    )
    for each in range(250):
        assert list(window_of_round(sampling, 3, each)) == theirs.next_window(), each


def test_rounds_at_a_place_decay_as_by_hand() -> None:
    sampling = SamplingTable(
        **KEYS, sde_window_order="sliding", sde_window_rounds=20, sde_window_decay=0.1, sde_window_decay_from=13
    )
    # 20 exp(−0.1 · (start − 13)): 20, 20, 18.1, 10.97
    assert [rounds_at(sampling, start) for start in (0, 13, 14, 19)] == [20, 20, 19, 11]
    for decay in (50.0, 1000.0):  # exp(−6000) is 0 in float64
        assert rounds_at(sampling.model_copy(update={"sde_window_decay": decay}), 19) == 1


def test_a_window_stays_between_the_skipped_steps() -> None:
    assert starts(5, num_steps=10, skip_first_steps=2, sde_window=3, sde_window_stride=2) == [2, 4, 2, 4, 2]
    random = SamplingTable(num_steps=10, skip_first_steps=2, skip_last_steps=3, sde_window=2)
    found = {window_of_round(random, 3, each).start for each in range(100)}
    assert found == {2, 3, 4, 5}


def test_a_stride_of_0_keeps_the_first_place() -> None:
    assert starts(9, sde_window_stride=0, skip_first_steps=1) == [1] * 9


def test_a_window_that_stops_stays_at_its_last_place() -> None:
    assert starts(6, num_steps=6, sde_window_end="stop", skip_last_steps=0) == [0, 1, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"sde_window_stride": 2}, "sde_window_stride is 2, and there is no window that slides"),
        (
            {"sde_window": None, "sde_window_end": "stop", "sde_window_order": "sliding"},
            "sde_window_end is 'stop', and",
        ),
        (
            {"sde_window_order": "sliding", "sde_window_decay_from": 3},
            "decay_from is 3 and sde_window_decay 0: nothing",
        ),
        (
            {"sde_window_order": "sliding", "sde_window_stride": 0, "sde_window_end": "stop"},
            "sde_window_end is 'stop' and sde_window_stride 0",
        ),
        (
            {"sde_window_order": "sliding", "sde_window_stride": 0, "sde_window_decay": 0.1},
            "sde_window_decay is 0.1 and sde_window_stride 0",
        ),
        ({"skip_first_steps": 20}, "sde_window 4 is longer than num_steps 25 less skip_first_steps 20 and skip_last_s"),
        (
            {"sde_window": None, "skip_first_steps": 22},
            "skip_first_steps 22 and skip_last_steps 2 of num_steps 25 leave",
        ),
    ],
)
def test_keys_without_effect_are_refused(keys: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SamplingTable(**{**KEYS, **keys})
