"""How long to wait before a failed call is tried again."""


def backoff_seconds(failures: int) -> float:
    """How long to wait before the next attempt: half a second, then twice as long each time, 30 at the most."""
    return min(30.0, 0.5 * 2 ** max(0, failures - 1)) if failures else 0.0
