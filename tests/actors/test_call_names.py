"""Names of calls are bounded."""

from ray_ddpo.actors.rollouts.call_names import CallNames


def test_names_say_the_task_while_there_is_room_and_then_the_round() -> None:
    names = CallNames(most=2)
    given = [names.of(f"draw round {round}, task {task}", f"draw round {round}") for round in (0, 1) for task in (0, 1)]
    assert given == ["draw round 0, task 0", "draw round 0, task 1", "draw round 1", "draw round 1"]
    assert (
        names.of("draw round 0, task 1", "draw round 0") == "draw round 0, task 1"
    )  # a name that Ray knows costs nothing
