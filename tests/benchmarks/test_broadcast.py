"""A broadcast's times from arrival times, by hand."""

import pytest

from benchmarks.broadcast import Arrival, summary


def test_broadcast_milliseconds_by_hand() -> None:
    arrivals = [
        Arrival("a", 10.02, 10.03),
        Arrival("a", 10.04, 10.05),
        Arrival("b", 10.05, 10.06),
        Arrival("b", 10.055, 10.09),
    ]
    measured = summary((10.0, 10.01), arrivals, [1.0, 1.0])
    assert measured.put == pytest.approx(10)
    assert measured.last_node == pytest.approx(50)
    assert measured.last_actor == pytest.approx(90)
    assert measured.later_on_a_node == pytest.approx(20)
