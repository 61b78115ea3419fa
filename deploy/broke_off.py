"""What a run breaks off with where it cannot go on: one line and exit code 1, and the last checkpoint is whole."""

from actors.inquiry import RewardFailed
from actors.ray_rollout_stream import NothingMoves
from actors.worker_pool import TooManyRestarts
from learner.optimizer_steps import NotFinite
from learner.round_buffer import TooManySetAside
from learner.weight_check import WeightsDidNotArrive

BROKE_OFF = (NotFinite, NothingMoves, RewardFailed, TooManyRestarts, TooManySetAside, WeightsDidNotArrive)
