"""The rate of matrix products: from a clock by hand, and on this machine without a trace in the random states."""

import pytest
import torch

from ray_ddpo.common.matrix_rate import fastest_rate, matrix_rate


class Device:
    """A device with a clock, whose products take the time of 1e11 operations a second, with a start of 1 µs."""

    def __init__(self, slow_first: float = 0.0) -> None:
        self.now = 0.0
        self.sides: list[int] = []
        self.queued = 0.0
        self._slow_first = slow_first  # of each side: its kernel is loaded

    def product(self, side: int):  # noqa: ANN201
        def multiply() -> None:
            self.queued += 1e-6 + 2 * side**3 / 1e11 + (0.0 if side in self.sides else self._slow_first)
            self.sides.append(side)

        return multiply

    def wait(self) -> None:
        self.now, self.queued = self.now + self.queued, 0.0


def test_the_first_product_that_takes_long_enough_is_the_measure() -> None:
    device = Device(slow_first=0.5)
    rate = fastest_rate(device.product, device.wait, lambda: device.now)
    # 512³ takes 2.7 ms, less than 3 ms; 1024³ takes 21.5 ms.
    assert rate == 2 * 1024**3 / (1e-6 + 2 * 1024**3 / 1e11) or abs(rate / 1e11 - 1) < 1e-4
    assert device.sides[-4:] == [1024] * 4 and 2048 not in device.sides


def test_a_device_without_a_clock_has_no_rate() -> None:
    assert fastest_rate(lambda side: lambda: None, lambda: None, lambda: 0.0) == 0.0


def test_measuring_uses_no_random_state() -> None:
    before = torch.random.get_rng_state()
    rate = matrix_rate.__wrapped__("cpu", torch.float32)
    assert torch.equal(before, torch.random.get_rng_state())
    assert 1e8 < rate < 1e14


def test_of_a_cpu_one_thread_is_measured_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr("ray_ddpo.common.matrix_rate.fastest_rate", lambda *_: 10.0 * torch.get_num_threads())
    try:
        torch.set_num_threads(3)
        assert matrix_rate.__wrapped__("cpu", torch.float32) == 3 * 10.0 and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
