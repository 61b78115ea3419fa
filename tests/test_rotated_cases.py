"""The cases of tests marked `rotated` take turns, and every test has a case in each turn."""

import pytest

from tests.conftest import TURN, waiting_cases


def items_of(parent: pytest.Module, name: str, count: int, every: int | None) -> list[pytest.Item]:
    """Return a test's cases, marked `rotated` if `every` is given."""
    items: list[pytest.Item] = []
    for case in range(count):
        item = pytest.Function.from_parent(parent, name=f"{name}[{case}]", callobj=items_of)
        if every:
            item.add_marker(pytest.mark.rotated(every=every))
        items.append(item)
    return items


@pytest.mark.rotated(every=3)
@pytest.mark.parametrize("case", range(7))
def test_only_the_cases_of_this_turn_run(case: int) -> None:
    assert TURN == "all" or case % 3 == int(TURN) % 3


def test_each_case_has_its_turn_and_each_turn_a_case(request: pytest.FixtureRequest) -> None:
    module = request.node.getparent(pytest.Module)
    items = [*items_of(module, "large", 7, 3), *items_of(module, "small", 2, 5), *items_of(module, "whole", 2, None)]
    turns = [{item.name for item in items} - {item.name for item in waiting_cases(items, turn)} for turn in range(3)]
    assert turns[0] == {"large[0]", "large[3]", "large[6]", "small[0]", "whole[0]", "whole[1]"}
    assert turns[1] == {"large[1]", "large[4]", "small[1]", "whole[0]", "whole[1]"}
    assert turns[2] == {"large[2]", "large[5]", "small[0]", "whole[0]", "whole[1]"}


def test_thorough_cases_have_turns_of_their_own(request: pytest.FixtureRequest) -> None:
    items = items_of(request.node.getparent(pytest.Module), "both", 4, 2)
    for item in items[2:]:
        item.add_marker(pytest.mark.thorough)
    assert [item.name for item in items if item not in waiting_cases(items, 1)] == ["both[1]", "both[3]"]


def test_tests_of_a_group_take_turns_with_each_other(request: pytest.FixtureRequest) -> None:
    module = request.node.getparent(pytest.Module)
    items = [item for name in ("one", "two", "three") for item in items_of(module, name, 1, None)]
    for item in items:
        item.add_marker(pytest.mark.rotated(every=2, group="longest"))
    turns = [[item.name for item in items if item not in waiting_cases(items, turn)] for turn in range(2)]
    assert turns == [["one[0]", "three[0]"], ["two[0]"]]
