"""TRL's last DDPOConfig, and the sizes that follow from a config and the number of accelerate's processes."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

TRL_VERSION = "0.23.1"  # the last with DDPOConfig
DTYPES = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}
WANDB_KEYS = ("entity", "group", "tags")  # arguments of wandb.init that our tracker has too
PROJECT_KEYS = {"project_dir", "total_limit", "automatic_checkpoint_naming"}  # a run's checkpoints always have names


class DDPOConfig(BaseModel):
    """Fields of trl/trainer/ddpo_config.py with their types and defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    exp_name: str = "ddpo"  # TRL: the running script's name, and that of its example is ddpo.py
    run_name: str = ""
    seed: int = 0
    log_with: str | None = None
    tracker_kwargs: dict[str, Any] = {}
    accelerator_kwargs: dict[str, Any] = {}
    project_kwargs: dict[str, Any] = {}
    tracker_project_name: str = "trl"
    logdir: str = "logs"
    num_epochs: int = 100
    save_freq: int = 1
    num_checkpoint_limit: int = 5
    mixed_precision: Literal["no", "fp16", "bf16"] = "fp16"
    allow_tf32: bool = True
    resume_from: str = ""
    sample_num_steps: int = 50
    sample_eta: float = 1.0
    sample_guidance_scale: float = 5.0
    sample_batch_size: int = 1
    sample_num_batches_per_epoch: int = 2
    train_batch_size: int = 1
    train_use_8bit_adam: bool = False
    train_learning_rate: float = 3e-4
    train_adam_beta1: float = 0.9
    train_adam_beta2: float = 0.999
    train_adam_weight_decay: float = 1e-4
    train_adam_epsilon: float = 1e-8
    train_gradient_accumulation_steps: int = 1
    train_max_grad_norm: float = 1.0
    train_num_inner_epochs: int = 1
    train_cfg: bool = True
    train_adv_clip_max: float = 5.0
    train_clip_range: float = 1e-4
    train_timestep_fraction: float = 1.0
    per_prompt_stat_tracking: bool = False
    per_prompt_stat_tracking_buffer_size: int = 16
    per_prompt_stat_tracking_min_count: int = 16
    async_reward_computation: bool = False
    max_workers: int = 2
    negative_prompts: str | None = ""  # TRL's annotation forbids None, and its trainer takes it
    push_to_hub: bool = False


@dataclass(frozen=True)
class TrlRun:
    """A TRL run: a config with the number of accelerate's processes."""

    config: DDPOConfig
    processes: int

    @property
    def images(self) -> int:
        """Return the images of a round, which TRL calls an epoch."""
        return self.config.sample_batch_size * self.config.sample_num_batches_per_epoch * self.processes

    @property
    def images_per_step(self) -> int:
        """Return the images of an optimizer step."""
        return self.config.train_batch_size * self.config.train_gradient_accumulation_steps * self.processes

    @property
    def trained_steps(self) -> int:
        """Return the number of trained steps of an image. TRL truncates where a recipe rounds."""
        return int(self.config.sample_num_steps * self.config.train_timestep_fraction)

    @property
    def timestep_fraction(self) -> float:
        """Return the timestep_fraction that gives a recipe as many steps."""
        fraction, steps = self.config.train_timestep_fraction, self.config.sample_num_steps
        same = self.trained_steps > 0 and round(steps * fraction) == self.trained_steps
        return fraction if same else self.trained_steps / max(steps, 1)

    @property
    def transitions(self) -> int:
        """Return the transitions of an optimizer step."""
        return self.images_per_step * self.trained_steps

    @property
    def micro_batch_size(self) -> int:
        """Return the largest divisor of an optimizer step's transitions up to twice TRL's batch."""
        largest = min(2 * self.config.train_batch_size, self.transitions)
        return next((size for size in range(largest, 0, -1) if self.transitions % size == 0), 1)

    @property
    def name(self) -> str:
        """Return the run's name with the characters allowed in a folder's name."""
        wanted = self.config.run_name or self.config.exp_name
        return re.sub(r"[^A-Za-z0-9._-]+", "-", wanted).strip("._-") or "ddpo"

    @property
    def advantages(self) -> str:
        """Return the kind of advantages.

        With a buffer smaller than min_count, TRL uses statistics of the full round.
        """
        config = self.config
        full = config.per_prompt_stat_tracking_min_count <= config.per_prompt_stat_tracking_buffer_size
        return "per_prompt" if config.per_prompt_stat_tracking and full else "round"

    @property
    def trackers(self) -> list[dict[str, Any]] | None:
        """Return [[trackers]]; None if TRL logged nowhere, or to a tracker that a recipe does not have."""
        config = self.config
        if config.log_with == "tensorboard":
            return [{"name": "tensorboard"}]
        if config.log_with != "wandb":
            return None
        known = {key: value for key, value in self.wandb_kwargs.items() if key in WANDB_KEYS and value is not None}
        return [{"name": "wandb", "project": config.tracker_project_name, **known}]

    @property
    def wandb_kwargs(self) -> dict[str, Any]:
        """Return the arguments that accelerate passed to wandb.init."""
        kwargs = self.config.tracker_kwargs.get("wandb") if self.config.log_with == "wandb" else None
        return kwargs if isinstance(kwargs, dict) else {}
