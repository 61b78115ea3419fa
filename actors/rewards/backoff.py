"""Exponential backoff before a retry."""


def backoff_seconds(failures: int) -> float:
    """Return the pause before a retry: half a second, doubled after each failure, at most 30."""
    return min(30.0, 0.5 * 2 ** max(0, failures - 1)) if failures else 0.0
