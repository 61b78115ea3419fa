"""What a run breaks off with where it cannot go on: one line and exit code 1, and the last checkpoint is whole."""

from ray_ddpo.actors.rollouts.inquiry import RewardFailed
from ray_ddpo.actors.rollouts.ray_stream import NothingMoves
from ray_ddpo.actors.rollouts.worker_pool import TooManyRestarts
from ray_ddpo.learner.optimization.optimizer_steps import NotFinite
from ray_ddpo.learner.round_data.round_buffer import TooManySetAside
from ray_ddpo.learner.weight_check import WeightsDidNotArrive

BROKE_OFF = (NotFinite, NothingMoves, RewardFailed, TooManyRestarts, TooManySetAside, WeightsDidNotArrive)
