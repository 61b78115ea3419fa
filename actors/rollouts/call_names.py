"""CallNames: what a call is called in Ray's dashboard, with a bound on how many names there are."""

# Ray's metrics keep every name that a call had: 13 to 17 kB in the driver, 11 to 12 kB in the actor (docs/scale.md).
MOST_NAMES = 2000


class CallNames:
    """The first calls are named task by task; from then on a name says the round, so that names grow with rounds alone."""

    def __init__(self, most: int = MOST_NAMES) -> None:
        self._most = most
        self._given: set[str] = set()

    def of(self, by_task: str, by_round: str) -> str:
        """The first of the two, while there is room for it."""
        if by_task not in self._given:
            if len(self._given) >= self._most:
                return by_round
            self._given.add(by_task)
        return by_task
