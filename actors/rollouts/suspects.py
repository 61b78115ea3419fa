"""Suspects: find the image that kills samplers, among tasks over which samplers died; no clock, no Ray."""

from dataclasses import dataclass, field, replace

from ray_ddpo.actors.task_care import DEATHS, PLAIN, Care
from ray_ddpo.common.schedule import Place


@dataclass
class _Suspect:
    """A task over which a sampler died."""

    care: Care = PLAIN
    deaths: int = 0  # since `care` was chosen
    deaths_alone: dict[int, int] = field(default_factory=dict)  # by row
    cleared: bool = False  # its images were decoded one by one, and no sampler died

    def begin(self, care: Care) -> None:
        self.care, self.deaths = care, 0


class Suspects:
    """Tasks over which samplers died.

    After two deaths a task is denoised as a batch and decoded image by image. After two more, images are sampled one by
    one. An image over which two more samplers die is left out from then on. One death proves nothing. Neither do two,
    if no sampler dies when images are tried: the task is then sampled like any other, to the same bits.
    """

    def __init__(self) -> None:
        self._suspects: dict[Place, _Suspect] = {}

    def care(self, place: Place) -> Care:
        """Return how to sample the task now."""
        suspect = self._suspects.get(place)
        return suspect.care if suspect else PLAIN

    def died(self, place: Place, care: Care, row: int | None) -> None:
        """Note that a sampler died over the task.

        Args:
            care: how the task was sampled.
            row: the current image, if known.
        """
        suspect = self._suspects.setdefault(place, _Suspect())
        if care != suspect.care:  # another sampler found out more meanwhile
            return
        if row is None:
            self._died_over_task(suspect)
            return
        suspect.deaths_alone[row] = suspect.deaths_alone.get(row, 0) + 1
        if suspect.deaths_alone[row] < DEATHS:
            return
        if care.one_by_one == "decoding":
            suspect.begin(Care(not_decoded=(*care.not_decoded, row), not_sampled=care.not_sampled))
        else:
            suspect.begin(Care(not_decoded=care.not_decoded, not_sampled=(*care.not_sampled, row)))

    def _died_over_task(self, suspect: _Suspect) -> None:
        suspect.deaths += 1
        if suspect.deaths >= DEATHS:
            following = {"nothing": "decoding", "decoding": "all", "all": "nothing"}[suspect.care.one_by_one]
            suspect.begin(replace(suspect.care, one_by_one=following))

    def counts(self, place: Place, care: Care) -> bool:
        """Return whether images sampled with `care` are the task's result. If not, the task must be sampled again.

        Images that were decoded one by one have other last bits. They count only if the task kills samplers every other
        way, as a batch that is too large for the memory does.
        """
        suspect = self._suspects.get(place)
        if suspect is None or care.one_by_one == "nothing":
            return True
        if care == suspect.care:
            suspect.begin(replace(care, one_by_one="nothing"))
        counts, suspect.cleared = suspect.cleared and care.one_by_one == "decoding", True
        return counts

    def forget(self, place: Place) -> None:
        """Forget a task that was sampled."""
        self._suspects.pop(place, None)
