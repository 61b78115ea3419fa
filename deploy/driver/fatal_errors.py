"""Errors that end a run with one line and exit code 1. The last checkpoint stays complete."""

from ray_ddpo.actors.rollouts.inquiry import RewardFailed
from ray_ddpo.actors.rollouts.ray_stream import StallError
from ray_ddpo.actors.rollouts.worker_pool import TooManyRestarts
from ray_ddpo.learner.optimization.optimizer_steps import NotFinite
from ray_ddpo.learner.restart_check import RestartDiffers
from ray_ddpo.learner.round_data.round_buffer import TooManyDropped
from ray_ddpo.learner.weight_check import WeightsDidNotArrive

FATAL_ERRORS = (
    NotFinite,
    RestartDiffers,
    StallError,
    RewardFailed,
    TooManyRestarts,
    TooManyDropped,
    WeightsDidNotArrive,
)
