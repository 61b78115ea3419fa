"""TRL's last DDPOConfig, the sizes that follow from it, and the recipe key for each of its fields."""

import re
from collections.abc import Callable
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
    def images_per_process(self) -> int:
        """Return the images of an optimizer step that one process took."""
        return self.images_per_step // self.processes

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
        """Return the largest divisor of a process's transitions of an optimizer step up to twice TRL's batch.

        So it divides a rank's too, with any number of ranks that divides the processes.
        """
        transitions = self.transitions // self.processes
        largest = min(2 * self.config.train_batch_size, transitions)
        return next((size for size in range(largest, 0, -1) if transitions % size == 0), 1)

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


@dataclass(frozen=True)
class Counterpart:
    """The counterpart of one field. `says` is printed unless `quiet`; {run.…} and {config.…} in it are filled in."""

    key: str = ""  # of the recipe; empty: no counterpart
    # None: the field's value. If the function returns None, no key is written.
    value: Callable[[TrlRun], Any] | None = None
    says: str = ""  # how the two differ, or why there is no counterpart
    quiet: Callable[[TrlRun], bool] = lambda run: False

    def value_of(self, field: str, run: TrlRun) -> Any:
        """Return the value of the key; None if no key is written."""
        if not self.key:
            return None
        return self.value(run) if self.value else getattr(run.config, field)


COUNTERPARTS = {
    "exp_name": Counterpart(
        "name",
        lambda run: None if run.config.run_name else run.name,
        "it names the run's folder, so it may have letters, digits and . _ - only",
        lambda run: run.config.run_name != "" or run.name == run.config.exp_name,
    ),
    "run_name": Counterpart(
        "name",
        lambda run: run.name if run.config.run_name else None,
        "it names the run's folder, so it may have letters, digits and . _ - only",
        lambda run: run.config.run_name in ("", run.name),
    ),
    "seed": Counterpart("seed"),
    "log_with": Counterpart(
        "trackers",
        lambda run: run.trackers,
        "a recipe has no such tracker, only wandb and tensorboard; every run writes metrics.jsonl and Ray's metrics",
        lambda run: run.config.log_with in (None, "wandb", "tensorboard"),
    ),
    "tracker_kwargs": Counterpart(
        "trackers",
        lambda run: run.trackers if run.wandb_kwargs else None,
        "of these a recipe knows wandb's entity, group and tags",
        lambda run: (
            run.config.log_with is None
            or not run.config.tracker_kwargs
            or (set(run.config.tracker_kwargs) == {"wandb"} and set(run.wandb_kwargs) <= set(WANDB_KEYS))
        ),
    ),
    "accelerator_kwargs": Counterpart(
        says="they are for accelerate, which the learner does without",
        quiet=lambda run: not run.config.accelerator_kwargs,
    ),
    "project_kwargs": Counterpart(
        "output_dir",
        lambda run: run.config.project_kwargs.get("project_dir"),
        "project_dir is output_dir and total_limit is checkpoint.keep; the others are not needed, because a run writes "
        "only to <output_dir>/<name>",
        lambda run: set(run.config.project_kwargs) <= PROJECT_KEYS,
    ),
    "tracker_project_name": Counterpart(
        "trackers",
        lambda run: run.trackers if run.config.log_with == "wandb" else None,
        "TensorBoard's files are in the run's folder",
        lambda run: run.config.log_with != "tensorboard" or run.config.tracker_project_name == "trl",
    ),
    "logdir": Counterpart(),  # TRL's trainer reads it nowhere
    "num_epochs": Counterpart("rounds"),
    "save_freq": Counterpart("checkpoint.every"),
    "num_checkpoint_limit": Counterpart(
        "checkpoint.keep",
        lambda run: run.config.project_kwargs.get("total_limit") or run.config.num_checkpoint_limit,
        "TRL's trainer reads it nowhere, and keeps as many as project_kwargs.total_limit says: that is taken",
        lambda run: not run.config.project_kwargs.get("total_limit"),
    ),
    "mixed_precision": Counterpart(
        "policy.dtype",
        lambda run: DTYPES[run.config.mixed_precision],
        "TRL stores latents in half precision too, but scores them before they are rounded, so its first ratios are "
        "not 1; here they are stored and scored in float32 (sampling.latents_dtype)",
        lambda run: run.config.mixed_precision == "no",
    ),
    "allow_tf32": Counterpart(
        says="float32 stays float32: its matrix products are not rounded to TF32; runtime.tf32 = true computes as TRL "
        "does",
        quiet=lambda run: not run.config.allow_tf32 or run.config.mixed_precision != "no",  # half precision has none
    ),
    "resume_from": Counterpart(
        says="no key: `ddpo train RECIPE --resume auto` resumes from the run's newest checkpoint; TRL's are not read",
        quiet=lambda run: run.config.resume_from == "",
    ),
    "sample_num_steps": Counterpart("sampling.num_steps"),
    "sample_eta": Counterpart("sampling.eta"),
    "sample_guidance_scale": Counterpart(
        "sampling.guidance_scale",
        lambda run: max(1.0, run.config.sample_guidance_scale),
        "below 1 TRL samples without guidance, which a recipe calls 1",
        lambda run: run.config.sample_guidance_scale >= 1,
    ),
    "sample_batch_size": Counterpart("sampling.batch_size"),
    "sample_num_batches_per_epoch": Counterpart(
        "sampling.batches_per_round",
        lambda run: run.config.sample_num_batches_per_epoch * run.processes,
        "{config.sample_num_batches_per_epoch} batches of each of {run.processes} processes, {run.images} images in "
        "all",
        lambda run: run.processes == 1,
    ),
    "train_batch_size": Counterpart(
        "learner.batch_size",
        says="a forward pass takes learner.micro_batch_size = {run.micro_batch_size} transitions, the largest divisor "
        "of a process's {run.images_per_process} images × {run.trained_steps} steps of an optimizer step up to twice "
        "TRL's {config.train_batch_size}; it changes memory and speed, not the result",
    ),
    "train_use_8bit_adam": Counterpart(
        says="AdamW keeps its state in float32: for a LoRA a few megabytes; learner.optimizer = 'adamw_8bit' keeps 8 "
        "bits",
        quiet=lambda run: not run.config.train_use_8bit_adam,
    ),
    "train_learning_rate": Counterpart("learner.learning_rate"),
    "train_adam_beta1": Counterpart("learner.adam_beta1"),
    "train_adam_beta2": Counterpart("learner.adam_beta2"),
    "train_adam_weight_decay": Counterpart("learner.weight_decay"),
    "train_adam_epsilon": Counterpart("learner.adam_epsilon"),
    "train_gradient_accumulation_steps": Counterpart(
        "learner.gradient_accumulation_steps",
        lambda run: run.config.train_gradient_accumulation_steps * run.processes,
        "an optimizer step takes what {run.processes} processes took together, {run.images_per_step} images. "
        "TRL meant the mean of their gradients and did not take it: each process learned from its own images alone",
        lambda run: run.processes == 1,
    ),
    "train_max_grad_norm": Counterpart("learner.max_grad_norm"),
    "train_num_inner_epochs": Counterpart("learner.inner_epochs"),
    "train_cfg": Counterpart(
        says="the learner scores with the guidance that the sampler sampled with; without it no ratio is 1 before an "
        "update",
        quiet=lambda run: run.config.train_cfg or run.config.sample_guidance_scale <= 1,
    ),
    "train_adv_clip_max": Counterpart("algorithm.advantage_clip"),
    "train_clip_range": Counterpart("algorithm.clip_range"),
    "train_timestep_fraction": Counterpart(
        "sampling.timestep_fraction",
        lambda run: run.timestep_fraction,
        "{run.trained_steps} of {config.sample_num_steps} steps: TRL shuffles an image's steps and takes the first, "
        "others in each inner epoch; here the image's seed chooses them once, and only they travel to the learner",
        lambda run: run.config.train_timestep_fraction == 1,
    ),
    "per_prompt_stat_tracking": Counterpart(
        "algorithm.advantages.kind",
        lambda run: run.advantages,
        "a buffer of {config.per_prompt_stat_tracking_buffer_size} never holds a min_count of "
        "{config.per_prompt_stat_tracking_min_count}, so TRL takes the whole round's statistics each time: kind = "
        "'round'",
        lambda run: not run.config.per_prompt_stat_tracking or run.advantages == "per_prompt",
    ),
    "per_prompt_stat_tracking_buffer_size": Counterpart(
        "algorithm.advantages.buffer_size",
        lambda run: run.config.per_prompt_stat_tracking_buffer_size if run.advantages == "per_prompt" else None,
    ),
    "per_prompt_stat_tracking_min_count": Counterpart(
        "algorithm.advantages.min_count",
        lambda run: run.config.per_prompt_stat_tracking_min_count if run.advantages == "per_prompt" else None,
    ),
    "async_reward_computation": Counterpart(),  # always so: reward workers score while samplers sample
    "max_workers": Counterpart(
        "reward_workers.count", lambda run: run.config.max_workers if run.config.async_reward_computation else None
    ),
    "negative_prompts": Counterpart("sampling.negative_prompt", lambda run: run.config.negative_prompts or None),
    "push_to_hub": Counterpart(
        says="a run sends its weights nowhere; lora/ in its folder is what diffusers loads and the hub takes",
        quiet=lambda run: not run.config.push_to_hub,
    ),
}
