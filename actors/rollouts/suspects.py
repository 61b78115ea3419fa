"""Suspects: tasks over which samplers have died, and how to find the image that kills them; no clock, no Ray."""

from dataclasses import dataclass, field, replace

from ray_ddpo.actors.task_care import DEATHS, PLAIN, Care
from ray_ddpo.common.schedule import Place


@dataclass
class _Suspect:
    care: Care = PLAIN
    deaths: int = 0  # since `care` was chosen
    deaths_alone: dict[int, int] = field(default_factory=dict)  # by row
    cleared: bool = False  # its images were decoded one by one, and nobody died

    def begin(self, care: Care) -> None:
        self.care, self.deaths = care, 0


class Suspects:
    """After two deaths over a task it is denoised as ever and decoded image by image, then, if need be, sampled image by image.

    The image over which two more samplers die is left out from then on. One death proves nothing, and neither do two of them
    if nobody dies when the images are tried: the task is then sampled as any other, to the same bits.
    """

    def __init__(self) -> None:
        self._suspects: dict[Place, _Suspect] = {}

    def care(self, place: Place) -> Care:
        """Return how the task is to be sampled now."""
        suspect = self._suspects.get(place)
        return suspect.care if suspect else PLAIN

    def died(self, place: Place, care: Care, row: int | None) -> None:
        """Note that a sampler died over the task, sampled with `care`, with `row` in hand if that is known."""
        suspect = self._suspects.setdefault(place, _Suspect())
        if care != suspect.care:  # another sampler has found out more meanwhile
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
        """Return whether what was sampled with `care` is the task's result. If not, it is to be sampled once more.

        Images decoded one by one have other last bits; they count only if the task kills samplers in no other way, as a
        batch that is too large for the memory does.
        """
        suspect = self._suspects.get(place)
        if suspect is None or care.one_by_one == "nothing":
            return True
        if care == suspect.care:
            suspect.begin(replace(care, one_by_one="nothing"))
        counts, suspect.cleared = suspect.cleared and care.one_by_one == "decoding", True
        return counts

    def forget(self, place: Place) -> None:
        """Drop what is known of a task that is sampled."""
        self._suspects.pop(place, None)
