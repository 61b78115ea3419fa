"""All trackers of a run as one. A tracker that fails during the run is left out, and the run continues."""

from collections.abc import Callable
from contextlib import ExitStack

from ray_ddpo.common.print_line import print_line
from ray_ddpo.common.trackers import TRACKERS
from ray_ddpo.common.trackers.media import Media
from ray_ddpo.common.trackers.tracker import LiveTracker, Metrics, RunInfo, Tracker
from ray_ddpo.common.user_code.blame import call_if_own, converting_errors


class FanOut:
    """A tracker that forwards everything to each of a run's trackers, in the recipe's order."""

    def __init__(self, trackers: dict[str, Tracker]) -> None:
        self._trackers = trackers
        self._live: dict[str, LiveTracker] = {}
        self._identities: dict[str, str] = {}

    def start(self, run: RunInfo) -> None:
        """Open all trackers.

        Raises:
            ValueError: A tracker cannot be opened because of a mistake in the recipe, the login or the tracker.
        """
        self._identities = dict(run.tracker_ids)
        with ExitStack() as after_an_error:
            after_an_error.callback(self.finish)  # or a progress bar would overwrite the error's text
            for name, tracker in self._trackers.items():
                live = self._live[name] = _started(name, tracker, run)
                identity = live.identity()
                if identity is not None:
                    self._identities[name] = identity
            after_an_error.pop_all()

    def identities(self) -> dict[str, str]:
        """Return the trackers' ids for the checkpoint, also of failed trackers, because a later start may need them."""
        return dict(self._identities)

    def log(self, metrics: Metrics) -> None:
        """Log one round's metrics to all trackers."""
        self._each(lambda live: live.log(metrics))

    @property
    def shows(self) -> bool:
        """Return whether any tracker shows media, so that making them is worthwhile."""
        return any(type(live).show is not LiveTracker.show for live in self._live.values())

    def show(self, media: Media) -> None:
        """Show media in all trackers. Trackers of numbers alone ignore them."""
        self._each(lambda live: live.show(media))

    def flush(self) -> None:
        """Let each tracker write what the run's folder refused before.

        Raises:
            StorageError: The folder refuses again.
        """
        for live in self._live.values():
            live.flush()

    def finish(self) -> None:
        """Close all trackers."""
        self._each(lambda live: live.finish())
        self._live = {}

    def _each(self, call: Callable[[LiveTracker], None]) -> None:
        self._live = {name: live for name, live in self._live.items() if _went_well(name, live, call)}


def _started(name: str, tracker: Tracker, run: RunInfo) -> LiveTracker:
    """Open one tracker, and check that a user's own returns a LiveTracker. Its errors become a ValueError."""

    def converted(error: BaseException) -> BaseException:
        if isinstance(error, (ValueError, BrokenPipeError)) or not isinstance(error, Exception):
            return error
        says = f"{type(error).__name__}: {error}"
        return ValueError(f"trackers: {name} cannot be started: {says}; fix that, or leave the tracker out")

    with converting_errors(converted):
        live = call_if_own(tracker, TRACKERS, "start", run)
    if not isinstance(live, LiveTracker):
        raise ValueError(
            f"{type(tracker).__name__}.start returned {type(live).__name__}: expected a ray_ddpo.LiveTracker"
        )
    return live


def _went_well(name: str, live: LiveTracker, call: Callable[[LiveTracker], None]) -> bool:
    """Call a tracker. Return whether it succeeded."""
    try:
        call(live)
    # A run of many hours must not end because a disk is full, a service is down or a tracker has a bug.
    except Exception as error:  # noqa: BLE001
        print_line(f"tracker {name} failed and is left out from here on: {type(error).__name__}: {error}")
        return False
    return True
