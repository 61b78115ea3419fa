"""StragglerDetector: a straggler takes much longer than its peers; a busy machine's jitter makes none."""

from ray_ddpo.actors.rollouts.stragglers import StragglerDetector


def detector_of(*seconds: float, factor: float = 3.0) -> StragglerDetector:
    made = StragglerDetector(factor)
    for each in seconds:
        made.add(each, 1)
    return made


def test_no_task_is_a_straggler_before_there_are_peers_to_compare_with() -> None:
    assert not detector_of(2.0, 2.0).is_straggler(1000.0, 1)


def test_a_straggler_takes_more_than_the_factor_times_the_median() -> None:
    of_peers = detector_of(2.0, 4.0, 100.0)  # the median is 4
    assert not of_peers.is_straggler(12.0, 1) and of_peers.is_straggler(12.1, 1)


def test_short_tasks_are_never_stragglers_within_a_second() -> None:
    quick = detector_of(0.01, 0.01, 0.01)
    assert not quick.is_straggler(1.0, 1) and quick.is_straggler(1.1, 1)


def test_only_the_last_tasks_count() -> None:
    slower = detector_of(*[1.0] * 50, *[10.0] * 32)
    assert not slower.is_straggler(30.0, 1)


def test_a_task_of_more_images_may_take_more_time() -> None:
    of_peers = detector_of(2.0, 2.0, 2.0)
    assert of_peers.is_straggler(8.0, 1) and not of_peers.is_straggler(8.0, 4)
