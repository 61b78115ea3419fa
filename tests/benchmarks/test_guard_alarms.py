"""The table of the guard's alarms in healthy runs: counts and extremes by hand."""

import base64

import numpy as np
import pytest

from benchmarks.guard_alarms import statistics, table
from ray_ddpo.common.run_storage.png import png


def entry(edges: float, saturation: float | None, *about: str) -> dict:
    statistics = dict.fromkeys(("sharpness", "entropy", "diversity"), 1.0) | {"edge_density": edges, "dark_share": 0.1}
    return {
        "scores": {},
        "image_statistics": statistics,
        "saturation": saturation,
        "alarms": [{"about": each, "says": each} for each in about],
    }


def test_alarms_are_counted_by_limit() -> None:
    later = [entry(0.4, 0.5, "edge_density", "named"), entry(0.8, 0.9), entry(0.2, 0.1, "edge_density")]
    heading, _, first, second = table(
        {"a": [entry(0.8, 0.0), *later], "b": [entry(0.8, None), entry(0.6, None)]}
    ).split("\n")
    assert heading == "| run | edge_density | sharpness | entropy | diversity | dark_share | saturation | scorers |"
    full = "0 of 3; 1.00"
    assert first == f"| `a` | 2 of 3; 0.25 | {full} | {full} | {full} | 0 of 3; +0.00 | 0 of 3; 0.90 | 1 of 3 |"
    assert second.startswith("| `b` | 0 of 1; 0.75 |") and second.endswith("| no bound | 0 of 1 |")


def test_images_are_those_of_a_reports_gallery() -> None:
    black, noise = np.zeros((16, 16, 3), np.uint8), np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    uris = [base64.b64encode(png(each)).decode() for each in (black, noise)]
    gallery = "".join(
        f'<img class="{side}" src="data:image/png;base64,{uri}" alt="{side}: a &quot;cat&quot;" width="16" height="16">'
        for side, uri in (("before", uris[1]), ("after", uris[0]))
    )
    before, after = statistics(gallery, "before"), statistics(gallery, "after")
    assert after["dark_share"] == pytest.approx(1) and before["dark_share"] < 0.1
    assert before["entropy"] > 5 > after["entropy"]
