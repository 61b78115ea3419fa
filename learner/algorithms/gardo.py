"""GARDO (He et al. 2025, arXiv 2512.24138): a KL for images whose reward is uncertain, to a reference that moves."""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float, UInt8
from pydantic import Field

from ray_ddpo.common.diffusion.policy import PolicyConfig
from ray_ddpo.common.recipe.recipe import Recipe
from ray_ddpo.learner.algorithms.advantage_settings import AdvantageSettings
from ray_ddpo.learner.algorithms.advantages import PromptStatistics
from ray_ddpo.learner.algorithms.policy_gradient import ClippedPolicyGradient

LAST_RISKS = 20  # rounds whose mean uncertainty the fraction of gated images is compared with
FRACTION_STEP, SMALLEST_FRACTION, LARGEST_FRACTION = 0.1, 0.02, 0.2  # the authors' RiskCompensator


class GARDO(ClippedPolicyGradient):
    """GARDO on denoising steps: GRPO whose KL is gated, adaptive and beside diversity-aware advantages.

    **Gate.** An image's uncertainty is its win rate in the round by the trained reward, minus the mean of its win rates
    by the auxiliary rewards, those of weight 0. The KL applies to the most uncertain images: those that the trained
    reward rates too well. In the authors' code (tinnerhrhe/GARDO, 1cc77fb) ranks count from the best image, so that it
    gates images that the trained reward rates too badly; this is the paper's sign.

    **Adaptive reference.** The reference is the pretrained model at first, and then the policy whenever the KL to it
    exceeds `reset_kl`, or after `reset_rounds` rounds.

    **Diversity.** A positive advantage is multiplied by the distance to the nearest image of the group, over the mean
    of these. The authors compare DINOv3's features by their cosines; here it is images of 16 × 16 pixels by their root
    mean square difference, for which samplers load no further network.
    """

    moves_reference: ClassVar[bool] = True

    advantages: AdvantageSettings = AdvantageSettings(kind="group", group_deviation="none")
    """Computation of advantages from rewards: by default reward minus the group's mean, not divided by a deviation."""
    kl_coef: float = Field(default=0.04, ge=0)
    """Coefficient of the gated KL to the reference, as a mean over latent elements."""
    gate: bool = True
    """Limit the KL to uncertain images. `false`: all images have it."""
    gate_fraction: float = Field(default=0.1, gt=0, le=1)
    """Fraction of the images of uncertainty 0 and more that have the KL, in the first round.

    It grows by a tenth after a round with more uncertainty than the last 20 had, and shrinks likewise (0.02 … 0.2).
    """
    reset_kl: float = Field(default=3e-4, ge=0)
    """KL to the reference, on the scale of `kl_coef`, above which the policy becomes the reference. 0: at no KL."""
    reset_rounds: int = Field(default=15, ge=0)
    """Rounds after which the policy becomes the reference in any case. 0: after no number of rounds."""
    diversity: bool = True
    """Multiply positive advantages by the relative distance to the group's nearest image. It needs
    `sampling.thumbnails`."""

    def check(self, recipe: Recipe, policy: PolicyConfig) -> None:
        super().check(recipe, policy)
        tables = recipe.all_rewards
        if self.gate and not (self.kl_coef or self.kl_coef_nats):
            raise ValueError(
                "algorithm.gate is true and there is no KL, which the gate would limit: give kl_coef or kl_coef_nats, or "
                "gate = false"
            )
        if self.gate and recipe.learner.replay_rounds:
            raise ValueError(
                f"algorithm.gate is true and learner.replay_rounds {recipe.learner.replay_rounds}: the gate compares a round "
                "with the ones before it, and a resumed run has that in its last state only; give gate = false, or 0"
            )
        if self.gate and all(table.weight for table in tables):
            raise ValueError(
                "algorithm.gate is true and no reward has weight 0: the gate compares the trained reward with auxiliary "
                "ones, so add a [[rewards]] table with weight = 0, or give gate = false"
            )
        if self.gate and (recipe.aggregation.kind != "sum" or any(table.floor is not None for table in tables)):
            raise ValueError(
                "algorithm.gate is true, and the gate compares the weighted sum of rewards: give aggregation.kind = 'sum' "
                "and no floor, or gate = false"
            )
        if self.diversity and not recipe.sampling.thumbnails:
            raise ValueError(
                "algorithm.diversity is true and sampling.thumbnails false: images are compared by their thumbnails; give "
                "sampling.thumbnails = true, or diversity = false"
            )
        if self.diversity and recipe.prompts.images_per_prompt < 2:
            raise ValueError(
                f"algorithm.diversity is true and prompts.images_per_prompt {recipe.prompts.images_per_prompt}: images are "
                "compared within a group, which needs at least 2"
            )

    def gate_kl(
        self,
        history: PromptStatistics,
        trained: Float[np.ndarray, "N"],
        auxiliary: Mapping[str, Float[np.ndarray, "N"]],
    ) -> tuple[PromptStatistics, Float[np.ndarray, "N"] | None]:
        if not self.gate:
            return history, None
        if not len(trained):  # every image was dropped, or no group of the round has different rewards
            return history, np.zeros(0)
        found = uncertainty(trained, auxiliary)
        risks, (last,) = history.get("risk", ()), history.get("fraction", (self.gate_fraction,))
        risk = float(found[found >= 0].mean())  # uncertainties have mean 0, so that one is not negative
        fraction = next_fraction(last, risk, risks)
        extended = {"risk": (*risks, risk)[-LAST_RISKS:], "fraction": (fraction,)}
        return extended, gated(found, fraction).astype(np.float64)

    def shape_advantages(
        self, advantages: Float[np.ndarray, "N"], thumbnails: UInt8[np.ndarray, "N D"], images_per_prompt: int
    ) -> Float[np.ndarray, "N"]:
        if not self.diversity:
            return advantages
        return advantages * np.where(advantages > 0, relative_distances(thumbnails, images_per_prompt), 1.0)

    def resets_reference(self, kl: float, rounds: int) -> bool:
        return (self.reset_kl > 0 and kl > self.reset_kl) or 0 < self.reset_rounds <= rounds


def round_win_rates(rewards: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """Return the fraction of the round's other images that an image beats; a tie counts half."""
    ordered = np.sort(rewards)
    below, upto = np.searchsorted(ordered, rewards, "left"), np.searchsorted(ordered, rewards, "right")
    return (below + (upto - below - 1) / 2) / max(1, len(rewards) - 1)


def uncertainty(
    trained: Float[np.ndarray, "N"], auxiliary: Mapping[str, Float[np.ndarray, "N"]]
) -> Float[np.ndarray, "N"]:
    """Return win rate by the trained reward − mean win rate by the auxiliary ones: high where only it is content."""
    others = np.mean([round_win_rates(values) for values in auxiliary.values()], axis=0)
    return np.round(round_win_rates(trained) - others, 12)  # equal win rates differ by 0, whatever their mean rounds to


def gated(found: Float[np.ndarray, "N"], fraction: float) -> Bool[np.ndarray, "N"]:
    """Return which images are the most uncertain `fraction` of those whose uncertainty is not negative."""
    return found > np.percentile(found[found >= 0], 100 * (1 - fraction))


def next_fraction(last: float, risk: float, risks: tuple[float, ...]) -> float:
    """Return the fraction of gated images: a tenth larger after a record risk, and a tenth smaller after a lowest one."""
    if not risks:
        return last
    factor = 1 + FRACTION_STEP if risk > max(risks) else 1 - FRACTION_STEP if risk < min(risks) else 1.0
    return float(np.clip(last * factor, SMALLEST_FRACTION, LARGEST_FRACTION))


def relative_distances(features: UInt8[np.ndarray, "N D"], images_per_prompt: int) -> Float[np.ndarray, "N"]:
    """Return each image's root mean square distance to the nearest of its group, over the group's mean of these.

    If all images of a group are alike, every value is 1.
    """
    groups = features.reshape(-1, images_per_prompt, features.shape[1]).astype(np.float64)
    nearest = np.empty(groups.shape[:2])
    for number, group in enumerate(groups):  # one group at a time: all differences of a round would be large
        apart = np.sqrt(np.square(group[:, None] - group[None]).mean(axis=2))
        np.fill_diagonal(apart, np.inf)
        nearest[number] = apart.min(axis=1)
    mean = nearest.mean(axis=1, keepdims=True)
    return np.where(mean > 0, nearest / np.where(mean > 0, mean, 1.0), 1.0).ravel()
