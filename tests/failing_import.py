"""A user's module that raises during its import, as a module does that reads missing weights."""

import numpy as np

raise RuntimeError("weights.pt is of another version")


def score(images: np.ndarray, prompts: list[str], metadata: list[dict]) -> np.ndarray:
    """Fail the test: this function is never reached."""
