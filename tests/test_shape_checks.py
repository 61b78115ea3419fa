"""The tests' own decorator refuses what jaxtyping's refuses: types, shapes, and sizes that differ within one call."""

from collections.abc import Callable, Iterator

import pytest
import torch
from beartype import beartype
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from tests.shape_checks import jaxtyped

Rows = Float[Tensor, "rows"]


def checked(fn: Callable) -> Callable:
    return jaxtyped(fn, beartype)


@checked
def total(left: Rows, right: list[Rows]) -> Float[Tensor, ""]:
    return left.sum() + sum(each.sum() for each in right)


@checked
def kept(value: Rows, nested: bool) -> Rows:
    return value[:-1] if nested else value[: len(total(torch.ones(2), []).expand(len(value)))]


@checked
def named(value: "int | Missing", other: "str") -> None: ...  # noqa: F821  # pyright: ignore


@checked
def first(value: Rows, count: int) -> Float[Tensor, "{count}"]:
    return value[:count]


@checked
def pieces(value: Rows) -> Iterator[Rows]:
    yield value


@pytest.mark.parametrize(
    "call",
    [
        lambda: total(torch.ones(2, 2), []),
        lambda: total(torch.ones(2, dtype=torch.int64), []),
        lambda: total(torch.ones(2), [torch.ones(3)]),
        lambda: kept(torch.ones(3), True),
        lambda: named(1, 2),
        lambda: first(torch.ones(3), 4),
        lambda: next(pieces(1)),
    ],
)
def test_a_wrong_type_shape_or_size_is_refused(call: Callable[[], object]) -> None:
    with pytest.raises(TypeCheckError):
        call()


def test_sizes_are_bound_within_one_call_only() -> None:
    assert total(torch.ones(2), [torch.ones(2)]) == 4 and total(torch.ones(3), []) == 3
    assert len(kept(torch.ones(3), False)) == 3
    assert len(first(torch.ones(3), 2)) == 2
    assert torch.equal(next(pieces(torch.ones(3))), torch.ones(3))
    named(object(), "a name without a value allows anything")
