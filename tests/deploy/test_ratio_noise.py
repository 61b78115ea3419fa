"""Units, thresholds and advice for the noise of the ratio, with numbers by hand."""

import io
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from ray_ddpo.common.recipe.tables import SamplingTable
from ray_ddpo.deploy.commands.doctor.doctor import _print_noise
from ray_ddpo.deploy.commands.doctor.ratio_noise import (
    Noise,
    RatioComparison,
    clip_range,
    in_nats,
    noise_findings,
    share_outside,
    step_bars,
    table_rows,
    worst_in_words,
)
from ray_ddpo.learner.algorithms.ddpo_is import DDPOImportanceSampling
from ray_ddpo.learner.algorithms.ddpo_sf import DDPOScoreFunction

CLIP = 1e-4
SAMPLING = SamplingTable(num_steps=5)


def compared(log_ratios: list[list[float]], kind: str = "run", name: str = "micro-batches") -> RatioComparison:
    steps = np.tile(np.arange(len(log_ratios[0])), (len(log_ratios), 1))
    return RatioComparison(name, kind, np.array(log_ratios), steps)


def noise(*comparisons: RatioComparison, sensitivity: dict[int, float] | None = None) -> Noise:
    return Noise(comparisons, (), 16_384, sensitivity or {}, "cpu")


def test_six_thousandths_are_sixty_clip_ranges_and_98_nats() -> None:
    ((name, clips, nats, _),) = table_rows(noise(compared([[0.0, -6e-3], [1e-3, 0.0]])), CLIP)
    assert (name, float(clips), float(nats)) == ("micro-batches", 60, 98)
    assert in_nats(6e-3, 16_384) == pytest.approx(98.304)


def test_a_clip_of_1e_4_is_1_64_nats_of_stable_diffusions_latents() -> None:
    assert in_nats(1e-4, 16_384) == pytest.approx(1.6384)


def test_a_clip_given_in_nats_is_brought_to_the_scale_of_log_prob_and_none_stays_none() -> None:
    assert clip_range(DDPOImportanceSampling(clip_nats=1.6384), 16_384) == pytest.approx(1e-4)
    assert clip_range(DDPOImportanceSampling(clip_range=2e-4), 16_384) == 2e-4
    assert clip_range(DDPOScoreFunction(), 16_384) is None


def test_noise_uses_up_no_clip_range_with_proximal_log_probs() -> None:
    own = DDPOImportanceSampling.model_validate({"clip_range": 1e-4, "off_policy": {"ratio": "proximal"}})
    clip = clip_range(own, 16_384)
    (finding,) = noise_findings(noise(compared([[0.0, 6e-3]])), clip, SAMPLING)
    assert clip is None and finding.level == "ok" and "98 nats" in finding.found


def test_a_narrow_terminal_folds_names_and_cuts_no_number() -> None:
    console = Console(width=80, file=io.StringIO())
    names = ("rounded to bfloat16 once scored, not compiled", "learner's micro-batches of 32, not compiled")
    measured = noise(*(compared([[1.234e-2] * 30], name=name) for name in names))
    _print_noise(console, measured, CLIP)
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    assert printed.count(f" 1.2e+02    2e+02  {'█' * 30}") == 2 and "…" not in printed
    assert "clip ranges" in printed


def test_without_a_clip_only_nats_are_printed_and_nothing_is_judged_by_it() -> None:
    measured = noise(compared([[6e-3, 0.0]]))
    assert table_rows(measured, None)[0][1:3] == ("–", "98")
    (finding,) = noise_findings(measured, None, SAMPLING)
    assert finding.level == "ok" and "98 nats" in finding.found and "clip" not in finding.found


@pytest.mark.parametrize(
    ("largest", "level", "words"),
    [
        (0.0, "ok", "the same bits"),
        (0.9e-5, "ok", "0.09 clip"),
        (1e-5, "warning", "0.1 clip"),
        (1e-4, "fault", "1 clip"),
    ],
)
def test_a_tenth_of_the_clip_range_is_a_warning_and_a_full_one_a_fault(largest: float, level: str, words: str) -> None:
    (finding,) = noise_findings(noise(compared([[0.0, largest]])), CLIP, SAMPLING)
    assert finding.level == level and words in finding.found
    assert bool(finding.advice) == (level != "ok")


def test_large_rounding_that_no_clip_range_sees_is_a_warning() -> None:
    (finding,) = noise_findings(noise(compared([[0.0, 2e-2]])), None, SAMPLING)
    assert finding.level == "warning" and finding.advice


def test_a_log_ratio_that_is_not_a_number_is_a_fault() -> None:
    (finding,) = noise_findings(noise(compared([[0.0, np.nan]])), CLIP, SAMPLING)
    assert finding.level == "fault"


def test_where_late_steps_lead_the_advice_says_how_many_to_leave_out() -> None:
    late = compared([[1e-5, 1e-5, 1e-5, 1e-5, 1e-5, 1e-5, 2e-4, 9e-5]])
    sampling = SamplingTable(num_steps=9, skip_last_steps=1, latents_dtype="float16")
    half = compared([[0.0] * 8], "rounded", "rounded to float16")
    first, *_ = noise_findings(noise(late, half), CLIP, sampling)
    assert "sampling.skip_last_steps 3" in first.advice and "latents_dtype float32" in first.advice
    early = compared([[2e-4, *[1e-5] * 7]])
    first, *_ = noise_findings(noise(early, half), CLIP, sampling)
    assert "skip_last_steps" not in first.advice


def test_another_way_of_computing_that_is_far_quieter_is_advised() -> None:
    measured = noise(compared([[2e-5]]), compared([[1e-6]], "other", "math attention"))
    assert "math attention" in noise_findings(measured, CLIP, SAMPLING)[0].advice


def test_a_share_counts_the_ratios_outside_one_plus_or_minus_the_clip() -> None:
    # exp(0.1) − 1 = 0.1052 is outside 0.1, exp(−0.1) − 1 = −0.0952 is not.
    assert share_outside(np.array([[0.1, -0.1], [0.0, -0.2]]), 0.1) == 0.5


@pytest.mark.parametrize(("outside", "level"), [(0, "ok"), (1, "warning")])
def test_half_precision_latents_are_judged_by_the_share_that_rounding_clips(outside: int, level: str) -> None:
    rounded = compared([[2e-4] * outside + [0.0] * (50 - outside)], "rounded", "rounded to bfloat16 once scored")
    sampling = SamplingTable(num_steps=51, latents_dtype="bfloat16")
    ratio, latents = noise_findings(noise(compared([[0.0] * 50]), rounded), CLIP, sampling)
    assert (ratio.level, latents.level) == ("ok", level)
    assert "the ratio stays 1" in latents.found and f"{outside / 50:.1%}" in latents.found
    assert ("float32" in latents.advice) == (level == "warning")


def test_a_step_over_three_times_as_sensitive_as_the_median_is_to_be_left_out() -> None:
    calm = noise(compared([[0.0]]), sensitivity=dict.fromkeys(range(10), 0.8) | {9: 2.4})
    assert noise_findings(calm, CLIP, SAMPLING)[1].level == "ok"
    # Stable Diffusion's: the last but one leads, so two go.
    leading = replace(calm, sensitivity=dict.fromkeys(range(10), 0.5) | {8: 3.28})
    finding = noise_findings(leading, CLIP, SAMPLING)[1]
    assert finding.level == "warning" and "6.6 times" in finding.found and "step 8" in finding.found
    assert "skip_last_steps 2" in finding.advice
    assert len(noise_findings(leading, None, SAMPLING, reads_log_probs=False)) == 1  # no step is learned from


def test_the_bars_are_as_high_as_the_largest_step_and_zero_has_a_dot() -> None:
    assert step_bars([0.0, 1.0, 4.0, 8.0]) == "·▂▅█"
    assert step_bars([0.0, 0.0]) == "··"
    assert len(step_bars(list(range(1, 1001)))) == 30


def test_the_worst_comparison_is_named_with_its_step() -> None:
    measured = noise(compared([[0.0, 0.0, 0.0]]), compared([[1e-4, 3e-4, 2e-4]], "other", "one at a time"))
    assert worst_in_words(measured, CLIP) == "one at a time: most at step 1, 3 clip ranges; at the median step 2"
    assert "4.9 nats" in worst_in_words(measured, None)
    assert "same bits" in worst_in_words(noise(compared([[0.0]])), CLIP)
