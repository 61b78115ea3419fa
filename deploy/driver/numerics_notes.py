"""Report once, in one line, if the roles of a run compute differently: on different machines or with other rounding."""

import sys
from collections.abc import Iterable, Mapping

from ray_ddpo.common.machine import Machine
from ray_ddpo.common.trajectory import Rollout

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
    print(f"note: {text}", file=sys.stderr, flush=True)
