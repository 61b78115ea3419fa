"""The room of algorithms: what a reward is worth, and what we descend on. One file an algorithm, one line here."""

from common.registry import Room

ALGORITHMS: Room = {
    "ddpo_is": "learner.algorithms.ddpo_is:DDPOImportanceSampling",
}
