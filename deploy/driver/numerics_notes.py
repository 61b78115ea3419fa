"""Report in one line if the roles of a run compute differently: other machines, rounding or batch sizes."""

from collections.abc import Iterable, Mapping

import torch

from ray_ddpo.common.machine import Machine
from ray_ddpo.common.print_line import print_line
from ray_ddpo.common.trajectory import Rollout
from ray_ddpo.deploy.driver.components import Components

LARGE_ROUNDING = 1e-2  # difference of log-probs (mean over latent elements): more than half precision usually costs
SAME_BITS = "results have the same bits on machines of one kind only"


class NumericsNotes:
    """Record of the machines of a run. It prints each difference once on standard error."""

    def __init__(self, learner: Machine, before: Machine | None = None) -> None:
        """Compare the learner's machine with the one of the checkpoint that the run resumes from."""
        self._learner = learner
        self._samplers: list[Machine] = []
        self._reward_workers: list[Machine] = []
        self._told_rounding = False
        if before is not None and (differing := before.differences(learner)):
            _say(f"the checkpoint was made on another machine than this one ({differing}); {SAME_BITS}")

    def saw(self, rollouts: Iterable[Rollout]) -> None:
        """Compare the machines of a round's rollouts with those seen before."""
        for rollout in rollouts:
            if rollout.report.machine is not None:
                self._met("samplers", rollout.report.machine, self._samplers)
            for machine in sorted(rollout.scores.machines, key=str):
                self._met("reward workers", machine, self._reward_workers)

    def rounded(self, metrics: Mapping[str, float]) -> None:
        """Report if the log-probs of samplers and learner differ more than usual."""
        rounding = metrics.get("log_prob_check/rounding", 0.0)
        if rounding > LARGE_ROUNDING and not self._told_rounding:
            self._told_rounding = True
            _say(
                f"samplers and learner compute the same log-probs up to {rounding:.2g} apart (dtype, merged adapters "
                "or compilation). The loss's ratio is not affected: it is taken to the learner's own log-probs. "
                "kl_nats and an importance weight are: policy.sampler_dtype and policy.compile decide how much"
            )

    def _met(self, role: str, machine: Machine, known: list[Machine]) -> None:
        """Report a machine that differs from the role's other machines or from the learner's."""
        if machine in known:
            return
        known.append(machine)
        if len(known) > 1:
            _say(f"{role} are machines of several kinds ({known[0].differences(machine)}); {SAME_BITS}")
        elif role == "samplers" and not machine.computes_like(self._learner):
            _say(
                f"samplers and learner are machines of two kinds ({machine.differences(self._learner)}): they round "
                f"differently, by as much as the metric log_prob_check/max_abs; {SAME_BITS}"
            )


def _say(text: str) -> None:
    print_line(f"note: {text}")


def rows_note(components: Components) -> str | None:
    """Return the warning with advice; None if the ratio is exactly 1 before the first update or need not be."""
    recipe, policy = components.recipe, components.policy
    in_half = {policy.dtype_of("sampler"), policy.dtype_of("learner")} != {torch.float32}
    on_gpu = recipe.runtime.device != "cpu" and bool(recipe.learner.num_gpus or recipe.samplers.num_gpus)
    off_policy = getattr(components.algorithm, "off_policy", None)
    learner, sampler = recipe.learner.micro_batch_size, recipe.sampling.batch_size
    if not (in_half and on_gpu) or off_policy is None or off_policy.ratio == "proximal" or learner == sampler:
        return None
    return (
        f"learner.micro_batch_size is {learner!r} and sampling.batch_size {sampler}: in half precision a GPU takes "
        "other kernels for other rows, so the ratio is not exactly 1 before the first update (ratio/max_abs_log shows "
        "by how much); give both "
        'the same number, or algorithm.off_policy.ratio = "proximal"'
    )
