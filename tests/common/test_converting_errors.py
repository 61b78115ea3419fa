"""Errors of a user's code are converted, except interrupts and those that the caller lets pass."""

from collections.abc import Iterator

import pytest

from ray_ddpo.common.user_code.blame import converting_errors
from ray_ddpo.deploy.commands.doctor.guard import Finding, OutOfTime, guarded


def raised(error: BaseException, other: BaseException) -> BaseException:
    """Return what comes out of a body that raises `error`, where all errors are converted to `other`."""
    with pytest.raises(BaseException) as caught, converting_errors(lambda _: other):
        raise error
    return caught.value


@pytest.mark.parametrize("error", [ValueError("a"), SystemExit(3), StopIteration(), MemoryError()])
def test_any_error_is_converted_with_its_cause(error: BaseException) -> None:
    other = ValueError("in words")
    assert raised(error, other) is other and other.__cause__ is error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), GeneratorExit()])
def test_an_interrupt_passes_unchanged(error: BaseException) -> None:
    assert raised(error, ValueError("in words")) is error


def test_an_error_that_stays_the_same_keeps_its_cause() -> None:
    cause, error = KeyError("k"), ValueError("v")
    error.__cause__ = cause
    assert raised(error, error) is error and error.__cause__ is cause


def test_a_doctors_check_that_raises_ends_in_a_fault_after_its_findings() -> None:
    def check(error: BaseException) -> Iterator[Finding]:
        yield Finding("ok", "model", "is there")
        raise error

    first, second = guarded("model", check, SystemExit("gone"))
    assert first.level == "ok" and second.level == "fault" and second.found.startswith("SystemExit: gone")
    with pytest.raises(OutOfTime):
        list(guarded("model", check, OutOfTime()))
    stopped = guarded("model", check, ValueError("v"))
    next(stopped)
    stopped.close()  # nothing is yielded after it
