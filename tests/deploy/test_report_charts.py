"""The report's curves and busy times, with coordinates by hand."""

import math

import numpy as np

from ray_ddpo.deploy.commands.report import charts
from tests.logged_rounds import logged


def test_a_chart_by_hand() -> None:
    made = charts.chart("t", "c", np.arange(3.0), [charts.RoundSeries("a", np.array([0.0, 10.0, 5.0]))])
    assert made is not None
    # Rounds 0, 1, 2 from 54 to 330; values 0 to 10 from 166 up to 8.
    assert made.curves[0].path == "M54 166L192 8L330 87"
    assert made.x_ticks == [("54", "0"), ("192", "1"), ("330", "2")] and ("166", "0") in made.y_ticks


def test_a_curve_is_broken_where_a_round_has_no_value_and_its_band_goes_around_it() -> None:
    values = np.array([0.0, math.nan, 5.0, 10.0])
    made = charts.chart("t", "c", np.arange(4.0), [charts.RoundSeries("a", values)])
    assert made is not None and [part.count("L") for part in made.curves[0].path.split("M")[1:]] == [0, 1]
    banded = charts.chart(
        "t", "c", np.arange(2.0), [charts.RoundSeries("a", np.array([2.0, 8.0]), np.array([2.0, 2.0]))]
    )
    assert banded is not None and banded.curves[0].band == "M54 102.8L330 8L330 71.2L54 166z"
    assert charts.chart("t", "c", np.arange(2.0), [charts.RoundSeries("a", np.full(2, math.nan))]) is None


def test_the_left_margin_has_room_for_the_longest_tick() -> None:
    made = charts.chart("t", "c", np.arange(2.0), [charts.RoundSeries("a", np.array([0.0, 2e8]))])
    assert made is not None and max(text for _, text in made.y_ticks) == "50,000,000"
    assert made.left >= 6 * len("200,000,000") + charts.GAP and made.x_ticks[0] == (str(made.left), "0")
    assert made.curves[0].path.startswith(f"M{made.left} ")


def test_a_long_run_is_averaged_and_says_so() -> None:
    values = np.arange(1000.0)
    assert charts.binned(values)[:2].tolist() == [2.0, 7.0] and len(charts.binned(values)) == charts.POINTS
    made = charts.chart("t", "c", values, [charts.RoundSeries("a", values)])
    assert made is not None and made.caption.endswith("mean of about 5 rounds") and made.curves[0].dots == []


def test_only_logged_metrics_are_plotted() -> None:
    rounds = [logged(0), logged(1, clip_fraction=0.5)]
    titles = [chart.title for chart in charts.run_charts(rounds, ["a"])]
    assert titles == ["reward", "spread of rewards", "KL", "clip fraction", "seconds by part"]
    mfu = charts.run_charts([logged(0, **{"mfu/sampler": 0.4}), logged(1, **{"mfu/sampler": 0.5})], ["a"])[-1]
    assert mfu.title == "MFU" and [curve.name for curve in mfu.curves] == ["samplers"]
    assert "clip fraction" not in [chart.title for chart in charts.run_charts([logged(0)], ["a"])]
    rounds = [logged(0, **{"reward/a/mean": 1.0, "reward/a/std": 1.0, "reward/b/mean": 2.0})]
    assert [chart.title for chart in charts.run_charts(rounds, ["a", "b"])][:3] == ["reward", "reward a", "reward b"]


def test_who_was_busy_by_hand() -> None:
    samplers, workers, learner = charts.strips([logged(0, **{"idle/reward_worker": math.nan}), logged(1)])
    assert samplers.path == "M0 100v-75h50v75zM50 100v-75h50v75z" and samplers.busy == 0.75
    assert workers.path == "M50 100v-75h50v75z" and workers.busy == 0.75 and learner.role == "learner"
