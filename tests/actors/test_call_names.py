"""Names of calls are bounded."""

from ray_ddpo.actors.rollouts.call_names import CallNames


def test_names_say_the_task_while_there_is_room_and_then_the_round() -> None:
    names = CallNames(most=2)
    given = [
        names.of(f"sample round {number}, task {task}", f"sample round {number}")
        for number in (0, 1)
        for task in (0, 1)
    ]
    assert given == ["sample round 0, task 0", "sample round 0, task 1", "sample round 1", "sample round 1"]
    assert (
        names.of("sample round 0, task 1", "sample round 0") == "sample round 0, task 1"
    )  # a name that Ray knows costs nothing
