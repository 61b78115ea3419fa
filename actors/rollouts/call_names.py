"""CallNames: names of calls in Ray's dashboard, with a bound on their number."""

# Ray's metrics keep every name that a call had: 13 to 17 kB in the driver, 11 to 12 kB in the actor (docs/scale.md).
MOST_NAMES = 2000


class CallNames:
    """The names of calls: by task for the first calls, then by round, so that few more names are added."""

    def __init__(self, most: int = MOST_NAMES) -> None:
        self._most = most
        self._given: set[str] = set()

    def of(self, by_task: str, by_round: str) -> str:
        """Return the name by task, until the number of names reaches its bound; then the name by round."""
        if by_task not in self._given:
            if len(self._given) >= self._most:
                return by_round
            self._given.add(by_task)
        return by_task
