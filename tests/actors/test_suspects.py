"""Tasks over which samplers die: by chance they are sampled as ever, by one image that image is found and left out."""

import pytest

from ray_ddpo.actors.rollouts.suspects import Suspects
from ray_ddpo.actors.task_care import PLAIN, Care

PLACE = (0, 0, 3)


def sampled(suspects: Suspects, not_decoded: set[int], not_sampled: set[int], images: int = 8) -> tuple[Care, int]:
    """Sample until the result counts, while images kill samplers. Return the last care, and the number of deaths."""
    deaths = 0
    while True:
        care = suspects.care(PLACE)
        killing = not_sampled - set(care.not_sampled)
        undecodable = not_decoded - set(care.left_out)
        if not killing and not undecodable:
            if suspects.counts(PLACE, care):
                return care, deaths
            continue
        deaths += 1
        row = None
        if care.one_by_one == "decoding" and not killing:
            row = min(undecodable)
        elif care.one_by_one == "all":
            row = min(killing | undecodable)
        suspects.died(PLACE, care, row)


@pytest.mark.parametrize("image", [0, 5, 7])
def test_an_image_that_cannot_be_decoded_is_left_out_of_decoding_after_four_deaths(image: int) -> None:
    care, deaths = sampled(Suspects(), {image}, set())
    assert care == Care(not_decoded=(image,)) and deaths == 4
    assert care.left_out == {image: "the sampler that decoded it died, 2 times over it alone"}


def test_an_image_that_cannot_be_denoised_is_left_out_altogether() -> None:
    care, deaths = sampled(Suspects(), set(), {2})
    assert care == Care(not_sampled=(2,)) and deaths == 6
    assert care.left_out == {2: "the sampler that sampled it died, 2 times over it alone"}


def test_several_images_are_found_one_after_the_other() -> None:
    care, _ = sampled(Suspects(), {1, 6}, {3})
    assert set(care.left_out) == {1, 3, 6} and care.one_by_one == "nothing"


def test_deaths_by_chance_leave_a_task_as_it_is() -> None:
    suspects = Suspects()
    suspects.died(PLACE, PLAIN, None)
    assert suspects.care(PLACE) == PLAIN
    suspects.died(PLACE, PLAIN, None)
    trying = suspects.care(PLACE)
    assert trying == Care(one_by_one="decoding")
    suspects.died(PLACE, trying, 4)  # once
    assert not suspects.counts(PLACE, trying), "images decoded one by one have other last bits"
    assert suspects.care(PLACE) == PLAIN and suspects.counts(PLACE, PLAIN)


def test_a_task_that_dies_only_as_a_batch_is_decoded_image_by_image_in_the_end() -> None:
    suspects = Suspects()
    for time in range(2):
        for _ in range(2):
            suspects.died(PLACE, PLAIN, None)
        assert suspects.counts(PLACE, suspects.care(PLACE)) == (time == 1)


def test_a_death_under_an_earlier_care_tells_nothing_new() -> None:
    suspects = Suspects()
    for _ in range(3):
        suspects.died(PLACE, PLAIN, None)
    assert suspects.care(PLACE).one_by_one == "decoding"
    suspects.forget(PLACE)
    assert suspects.care(PLACE) == PLAIN
