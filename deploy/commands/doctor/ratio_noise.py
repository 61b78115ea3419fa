"""Judge the numerical noise of the probability ratio before any update: units, thresholds, remedies. Pure functions."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from ray_ddpo.common.recipe.tables import SamplingTable
from ray_ddpo.deploy.commands.doctor.checks import Finding
from ray_ddpo.deploy.driver.numerics_notes import LARGE_ROUNDING
from ray_ddpo.learner.algorithms.algorithm import Algorithm
from ray_ddpo.learner.algorithms.policy_gradient import ClippedPolicyGradient

NOISY, TOO_NOISY = 0.1, 1.0  # in clip ranges
LARGE_SHARE = 0.01  # of ratios, clipped because of rounding alone
SENSITIVE = 3.0  # × the median step
BARS, NO_BAR = "▁▂▃▄▅▆▇█", "·"
WIDEST = 30  # bars


# "run": scored as the learner does; "other": in another way; "rounded": latents rounded after scoring.
Kind = Literal["run", "other", "rounded"]


@dataclass(frozen=True)
class RatioComparison:
    """The same transitions scored again: log_prob − old_log_prob, mean over latent elements."""

    name: str
    kind: Kind
    log_ratios: Float[np.ndarray, "N W"]
    steps: Int[np.ndarray, "N W"]

    @property
    def largest(self) -> float:
        """Return the largest |log ratio|; infinity if a ratio is not finite."""
        return float(np.nan_to_num(np.abs(self.log_ratios), nan=np.inf).max())

    @property
    def by_step(self) -> dict[int, float]:
        """Return the largest |log ratio| of each step."""
        of_all = np.abs(self.log_ratios)
        return {int(step): float(of_all[self.steps == step].max()) for step in np.unique(self.steps)}


@dataclass(frozen=True)
class Noise:
    """All comparisons of one recipe on one device."""

    comparisons: tuple[RatioComparison, ...]
    unavailable: tuple[str, ...]  # attention kernels that this device does not support
    latent_elements: int  # D: log_prob is a mean over them
    sensitivity: dict[int, float]  # |dμ/dε| / σ of each trained step; empty if unknown
    device: str
    restart_levels: float | None = None  # grey levels between the sampler's images and the learner's last steps

    @property
    def of_the_run(self) -> RatioComparison:
        """Return the comparison that scores as the learner will."""
        return next(comparison for comparison in self.comparisons if comparison.kind == "run")


def clip_range(algorithm: Algorithm, latent_elements: int) -> float | None:
    """Return the clip range on the scale of `log_prob`, to compare the noise with.

    Returns:
        None if the algorithm does not clip, or if its ratio is to the learner's own log-probs without such noise.
    """
    if not isinstance(algorithm, ClippedPolicyGradient) or "proximal_log_probs" in algorithm.columns:
        return None
    return algorithm.clip(latent_elements)


def in_nats(log_ratio: float, latent_elements: int) -> float:
    """Return the log-ratio as a sum over latent elements; `log_ratio` is their mean."""
    return log_ratio * latent_elements


def share_outside(log_ratios: Float[np.ndarray, "N W"], clip: float) -> float:
    """Return the share of ratios outside 1 ± clip, whose transitions would be clipped without any update."""
    return float(np.mean(np.abs(np.expm1(log_ratios.astype(np.float64))) > clip))


def table_rows(noise: Noise, clip: float | None) -> list[tuple[str, str, str, str]]:
    """Return a row a comparison: name, largest |log ratio| in clip ranges and in nats, and bars over the steps."""
    rows = []
    for comparison in noise.comparisons:
        largest = comparison.largest
        in_clips = "–" if clip is None else f"{largest / clip:.2g}"
        nats = f"{in_nats(largest, noise.latent_elements):.2g}"
        rows.append((comparison.name, in_clips, nats, step_bars(list(comparison.by_step.values()))))
    return rows


def worst_in_words(noise: Noise, clip: float | None) -> str:
    """Describe the comparison with the largest difference: its worst step and its median step."""
    worst = max(noise.comparisons, key=lambda comparison: comparison.largest)
    if worst.largest == 0:
        return "all are the same bits, at every step"
    unit, name = (1 / clip, "clip ranges") if clip is not None else (noise.latent_elements, "nats")
    steps = {step: value * unit for step, value in worst.by_step.items()}
    highest = max(steps, key=lambda step: steps[step])
    median = float(np.median(list(steps.values())))
    return f"{worst.name}: most at step {highest}, {steps[highest]:.2g} {name}; at the median step {median:.2g}"


def step_bars(values: list[float]) -> str:
    """Draw a bar a step, or a bar for several neighbors if there are many steps; the highest is the largest value."""
    parts = [float(part.max()) for part in np.array_split(np.array(values), min(len(values), WIDEST))]
    highest = max(parts)
    if not math.isfinite(highest) or highest == 0:
        return NO_BAR * len(parts)
    return "".join(BARS[min(int(part / highest * len(BARS)), len(BARS) - 1)] if part else NO_BAR for part in parts)


def noise_findings(
    noise: Noise, clip: float | None, sampling: SamplingTable, reads_log_probs: bool = True
) -> list[Finding]:
    """Judge what the comparisons mean for a run. The sensitivity of steps matters to losses on log-probs only."""
    findings = [_run_finding(noise, clip, sampling)]
    if clip is not None and sampling.latents_dtype != "float32":
        findings.append(_rounding_finding(noise, clip, sampling.latents_dtype))
    return [*findings, *(_sensitivity_findings(noise, sampling) if reads_log_probs else [])]


def _run_finding(noise: Noise, clip: float | None, sampling: SamplingTable) -> Finding:
    """Judge the difference between learner and sampler."""
    largest, subject = noise.of_the_run.largest, "ratio"
    if largest == 0:
        return Finding("ok", subject, "learner and sampler get the same bits: it is 1 before any update")
    units = f"{in_nats(largest, noise.latent_elements):.2g} nats"
    units = units if clip is None else f"{largest / clip:.2g} clip ranges, {units}"
    found = f"learner and sampler lie up to {units} apart, before any update"
    if clip is None and largest > LARGE_ROUNDING:
        return Finding("warning", subject, found, _remedies(noise, sampling))
    if clip is None or largest < NOISY * clip:
        return Finding("ok", subject, found)
    return Finding("fault" if largest >= TOO_NOISY * clip else "warning", subject, found, _remedies(noise, sampling))


def _remedies(noise: Noise, sampling: SamplingTable) -> str:
    """List changes to the recipe that reduce the noise, the most effective first."""
    run, remedies = noise.of_the_run, []
    if sampling.latents_dtype != "float32":
        remedies.append("sampling.latents_dtype float32")
    late = _late_steps(run.by_step)
    if late:
        remedies.append(f"sampling.skip_last_steps {sampling.skip_last_steps + late}, for the late steps lead")
    better = [other for other in noise.comparisons if other.kind == "other" and other.largest < NOISY * run.largest]
    remedies += [f"compute as in '{better[0].name}', which is far quieter"] if better else []
    return "; ".join([*remedies, "the same attention kernel on both sides; a larger clip range; policy.dtype float32"])


def _late_steps(by_step: dict[int, float]) -> int:
    """Return how many last steps to skip so that no step exceeds 3 × the median; 0 if others are the cause."""
    steps, limit = sorted(by_step), SENSITIVE * float(np.median(list(by_step.values())))
    high = [step for step in steps if by_step[step] > limit]
    late = [step for step in steps if high and step >= high[0]]
    return len(late) if 0 < len(late) <= len(steps) // 3 else 0


def _rounding_finding(noise: Noise, clip: float, dtype: str) -> Finding:
    """Judge the rounding of stored latents against the clip range."""
    # A recipe in half precision has exactly one comparison with rounding: that to its dtype.
    (rounded,) = [comparison for comparison in noise.comparisons if comparison.kind == "rounded"]
    share = share_outside(rounded.log_ratios, clip)
    found = (
        f"{dtype}: latents are rounded before they are scored, so the ratio stays 1; scored unrounded, rounding alone "
        f"would put {share:.1%} of the ratios outside the clip range"
    )
    large = share >= LARGE_SHARE
    advice = "sampling.latents_dtype float32: steps of this size are drowned by the rounding" if large else ""
    return Finding("warning" if large else "ok", "latents_dtype", found, advice)


def _sensitivity_findings(noise: Noise, sampling: SamplingTable) -> list[Finding]:
    """Report late-step sensitivity: by how many σ the mean moves if the network's output moves by 1."""
    if not noise.sensitivity:
        return []
    median = float(np.median(list(noise.sensitivity.values())))
    worst = max(noise.sensitivity, key=lambda step: noise.sensitivity[step])
    factor = noise.sensitivity[worst] / median
    found = f"|dμ/dε|/σ is {median:.2g} at the median step, at most {factor:.2g} times that (step {worst})"
    if factor <= SENSITIVE:
        return [Finding("ok", "steps", found)]
    late = _late_steps(noise.sensitivity)
    last = sampling.skip_last_steps + late if late else sampling.num_steps - worst
    drop = f"set sampling.skip_last_steps {last}"
    return [Finding("warning", "steps", f"{found}: it drowns the others in ratio and clip", drop)]
