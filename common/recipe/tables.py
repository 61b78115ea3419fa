"""The tables of a recipe: their keys with type, bounds, default and meaning, each table checked by itself (no torch).

`ddpo config`, docs/configuration.md and the JSON schema are made from the attribute docstrings below.
"""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from ray_ddpo.common.recipe.bounds import LARGEST, Bounded, Table
from ray_ddpo.common.recipe.learning_rates import LearningRates
from ray_ddpo.common.recipe.sampling_table import HeldOutSampling
from ray_ddpo.common.recipe.sampling_table import SamplingTable as SamplingTable  # imported from here by others
from ray_ddpo.common.suites import SUITES, Suite, SuiteName

MOST_ACTORS = 10_000  # of one role
MOST_IMAGES = 1_000_000  # of a round, or of an evaluation
PLACES = 4  # decimal places of an amount that Ray counts
RAYS_OWN = ("CPU", "GPU", "memory", "object_store_memory", "bundle")


class ComponentTable(Bounded):
    """Table that names a component of a registry. Its other keys belong to the component, which checks them itself."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)
    name: str
    """Name of a component in the registry, or `module:Class` with a class of your own."""

    def table(self) -> dict[str, Any]:
        """Return the name and the component's own keys, as `registry.build` takes them."""
        return {"name": self.name, **(self.model_extra or {})}


class PolicyTable(ComponentTable):
    """Model family and the keys of its policy."""


class AlgorithmTable(ComponentTable):
    """Algorithm and its hyperparameters."""


class TrackerTable(ComponentTable):
    """Tracker: a destination of metrics. `jsonl`, `terminal` and `ray` are always on."""


class PromptsTable(ComponentTable):
    """Source of the prompts, and the number of images sampled for each."""

    images_per_prompt: int = Field(default=1, ge=1)
    """Images sampled for each prompt of a round: the group size. With 1, every image samples its own prompt."""


class RoleTable(Table):
    """Resources that one actor of a role asks the cluster for."""

    num_cpus: float = Field(default=1, ge=0, le=MOST_ACTORS)
    """CPU cores of each actor, as Ray counts them."""
    num_gpus: float = Field(default=0, ge=0, le=MOST_ACTORS)
    """GPUs of each actor: a fraction of one, or a whole number. With 0, the actor computes on the CPU."""
    resources: dict[str, float] = {}
    """Custom resources of Ray that each actor needs, by name."""
    accelerator_type: str | None = None
    """GPU type that the node must have, as Ray names it (`A100`, `H100`, …). By default any."""

    @field_validator("num_gpus", mode="after")
    @classmethod
    def _is_a_share_of_one_gpu_or_whole_ones(cls, num_gpus: float) -> float:
        if num_gpus > 1 and num_gpus != int(num_gpus):
            raise ValueError("above 1 it must be a whole number, Ray takes a fraction of one GPU only")
        return num_gpus

    @field_validator("num_cpus", "num_gpus", "resources", mode="after")
    @classmethod
    def _can_be_counted(cls, asked: float | dict[str, float]) -> float | dict[str, float]:
        for amount in asked.values() if isinstance(asked, dict) else [asked]:
            if not 0 <= amount <= LARGEST or round(amount, PLACES) != amount:
                raise ValueError(f"an amount must be from 0 to {LARGEST:,}, with at most {PLACES} decimal places")
        return asked

    @field_validator("resources", mode="after")
    @classmethod
    def _has_other_names_than_rays(cls, resources: dict[str, float]) -> dict[str, float]:
        if own := sorted(name for name in resources if name in RAYS_OWN or not name.strip()):
            raise ValueError(f"{own} cannot be asked for here: num_cpus and num_gpus are keys of their own")
        return resources


class ElasticTable(RoleTable):
    """Resources and number of a role whose number may change during a run."""

    count: int = Field(default=1, ge=1, le=MOST_ACTORS)
    """Actors at the start of the run."""
    min: int = Field(default=1, ge=1, le=MOST_ACTORS)
    """Actors that must be loaded before the run starts. The others join it later. `ddpo scale` goes no lower."""
    max: int | None = Field(default=None, ge=1)
    """Most actors that `ddpo scale` accepts. By default there is no limit."""

    @model_validator(mode="after")
    def _count_lies_between(self) -> "ElasticTable":
        if self.count < self.min or (self.max is not None and self.count > self.max):
            raise ValueError(f"count {self.count} must lie between min {self.min} and max {self.max}")
        return self


class SamplersTable(ElasticTable):
    """Samplers: the actors that generate images."""

    straggler_factor: float = Field(default=4.0, gt=1)
    """Multiple of the median task time after which a task is sampled a second time on another sampler."""


class RewardPoolTable(ElasticTable):
    """Pool of reward workers that are all alike."""

    batch_size: int = Field(default=64, ge=1)
    """Images per scoring batch. Batches are cut from a task in order."""
    timeout_seconds: float = Field(default=600.0, gt=0)
    """Seconds that one scoring batch may take."""
    attempts: int = Field(default=3, ge=1)
    """Attempts at a scoring batch that fails. After them the batch is halved until the failing image is found."""
    cache: int = Field(default=0, ge=0)
    """Scores that a worker caches by image, for rewards that do not depend on the rest of the batch. 0: no cache."""


class RewardTable(ComponentTable):
    """Reward that is trained on, or scorer that is only evaluated."""

    label: str | None = Field(default=None, pattern=r"^\w[\w-]*$")
    """Name of the reward in metrics and rows. By default its `name`. Two rewards of one name need labels."""
    weight: float = 1.0
    """Factor of this reward in the aggregation. With a negative weight, a lower score is better."""
    floor: float | None = None
    """Lowest acceptable score. Images below it rank under all others, whatever the other rewards say."""
    frames: Literal["mean", "minimum", "last"] = "mean"
    """Score of a video family's clip from the scores of its frames: their mean, their minimum, or the last frame's."""
    scored_frames: int | None = Field(default=None, ge=1)
    """Frames of a clip that are scored, at equal distances. By default all."""
    workers: RewardPoolTable | None = None
    """Reward workers of this reward alone. By default those of `[reward_workers]` score it."""

    @property
    def called(self) -> str:
        """Return the label, else the name; of `module:Class`, the class's."""
        return self.label or self.name.rpartition(":")[2]

    @model_validator(mode="after")
    def _the_last_frame_is_one(self) -> "RewardTable":
        if self.frames == "last" and self.scored_frames is not None:
            raise ValueError(f"frames is 'last' and scored_frames {self.scored_frames}: give one of the two")
        return self


class AggregationTable(Table):
    """Aggregation of several rewards into one learning signal."""

    kind: Literal["sum", "z_score", "advantages", "win_rate"] = "sum"
    """Weighted sum of the rewards (`sum`), their z-scores, their advantages (GDPO) or their win rates in a group."""


class RewardWorkersTable(RewardPoolTable):
    """Pool of reward workers that scores all rewards without workers of their own."""

    max_dropped: int = Field(default=32, ge=0)
    """Images of the whole run that may be dropped because they cannot be scored. One more ends the run."""


class LearnerTable(RoleTable, LearningRates):
    """Optimizer, batch sizes and ranks of the learner."""

    batch_size: int = Field(ge=1)
    """Images per gradient accumulation step. An optimizer step has `batch_size` × `gradient_accumulation_steps`."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Batches whose gradients are accumulated before an optimizer step."""
    micro_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Transitions per forward pass. It changes memory and speed, not the mathematics.

    `auto`: the largest number that fits on the device, found at the start.
    """
    inner_epochs: int = Field(default=1, ge=1)
    """Passes over the images of a round."""
    replay_rounds: int = Field(default=0, ge=0, le=1000)
    """Earlier rounds whose images are trained on again with each round, by the log-probs of the policy that sampled them."""
    parts_per_round: int = Field(default=1, ge=1)
    """Parts of a round that are learned from in task order, each while later tasks are still being sampled."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw_8bit` keeps the optimizer state in 8 bits, a quarter of the memory. It needs bitsandbytes."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """Weight decay of AdamW."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's first moment."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of AdamW's second moment."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Term added to AdamW's denominator."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Norm to which gradients are clipped."""
    max_kl_nats: float | None = Field(default=None, gt=0)
    """KL in nats per step from the sampling policy above which no more inner epochs are run. By default no limit."""
    log_prob_tolerance: float | None = Field(default=None, gt=0)
    """Largest accepted |sampler's − learner's log-prob| under equal weights. By default 1e-4 in float32, else 1e-2."""
    world_size: int = Field(default=1, ge=1, le=MOST_ACTORS)
    """Ranks: processes that share every optimizer step. Each has the resources of this table."""
    shard_optimizer_state: bool = False
    """Shard the optimizer state: each rank updates a part of the weights and broadcasts it to the others."""
    shard_weights: bool = False
    """Shard weights, gradients and optimizer state: a rank gathers a block at a time. No effect with one rank."""
    offload_weights: bool = False
    """Keep a rank's shard of weights, gradients and optimizer state in the host's memory. Needs `shard_weights`."""
    colocated: bool = False
    """Let each rank share its GPU with one sampler, in turns, so that equal GPUs are all busy without lag.

    Needs `samplers.count` = `world_size`, `max_policy_lag` = 0, and `num_gpus` of both that are shares of one GPU.
    """

    @property
    def images_per_step(self) -> int:
        """Return the images per optimizer step."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def images_per_rank(self) -> int:
        """Return the images of an optimizer step that one rank computes."""
        return self.images_per_step // self.world_size


class RuntimeTable(Table):
    """Device, threads, determinism and limits of every process."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the actors. `auto`: the GPU where the actor has one, else the CPU."""
    threads: int = Field(default=1, ge=1, le=1024)
    """Threads of torch in every process that computes."""
    deterministic: bool = True
    """Use deterministic kernels only, so that a run can be repeated bit by bit."""
    tf32: bool = False
    """Let GPUs compute float32 convolutions and matrix products in TF32: faster, with 10 bits of mantissa."""
    ready_seconds: float = Field(default=600.0, gt=0)
    """Seconds in which an actor must be placed and have loaded its model."""
    watchdog_seconds: float = Field(default=1800.0, gt=0)
    """Seconds without any progress after which the run ends and writes the stacks of its processes."""
    max_restarts: int = Field(default=100, ge=0)
    """Actor restarts that are allowed between two completed rounds."""


class RolloutsTable(Table):
    """Ledger: a parquet file per round with a row per image."""

    keep: bool = True
    """Write the ledger. `ddpo replay` needs it."""
    images_every: int = Field(default=0, ge=0)
    """Rounds between two whose rows hold the images too. 0: no rows hold images."""


class MediaTable(Table):
    """Images and tables of rounds for wandb and TensorBoard, beside their metrics."""

    every: int = Field(default=10, ge=0)
    """Rounds between two that are shown. The last round is always shown. 0: no round is shown."""
    images: int = Field(default=8, ge=0)
    """Images of such a round that are shown: the first ones."""

    def is_due(self, round_index: int, rounds: int) -> bool:
        """Return whether this round of a run of `rounds` is shown."""
        return self.every > 0 and (round_index % self.every == 0 or round_index == rounds - 1)


class CheckpointTable(Table):
    """Checkpoints of the learner, which `--resume auto` continues from."""

    every: int = Field(default=10, ge=1)
    """Rounds between two checkpoints."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept."""


class EvaluationTable(HeldOutSampling):
    """Held-out images: their prompts, seeds, scorers, and when they are sampled during training."""

    every: int = Field(default=0, ge=0)
    """Rounds between two evaluations during training. The last round is always evaluated. 0: only in the report."""
    suite: SuiteName | Literal["none"] = "none"
    """Suite whose prompts, number of images, scorers and rule of the mean evaluations follow."""
    prompts_from: str = Field(default="prompts", min_length=1)
    """Folder of the files that `ddpo prompts` wrote, for the suites whose prompts do not ship."""
    prompts: tuple[str, ...] = ()
    """Prompts to evaluate. By default those that the prompt source holds out, else all of its prompts, in order."""
    images: int | None = Field(default=None, ge=2, le=MOST_IMAGES)
    """Images per evaluation, in turn over the prompts, or at equal distances if fewer. By default all of the suite, or 64."""
    batch_size: int = Field(default=16, ge=1)
    """Images per evaluation task."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the held-out images."""
    split: Literal["evaluation", "tuning"] = "evaluation"
    """Set of held-out seeds. Choose hyperparameters on `tuning` only, so that `evaluation` stays unseen."""
    scorers: tuple[RewardTable, ...] = ()
    """Rewards that are evaluated and never trained on."""
    workers: RewardPoolTable = RewardPoolTable()
    """Reward workers that hold the scorers during training."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights that is evaluated too. By default there is none."""
    saved_images: int = Field(default=8, ge=0)
    """Images of each evaluation that are kept in the run's folder: the first ones."""

    @model_validator(mode="after")
    def _a_suite_has_its_prompts(self) -> "EvaluationTable":
        if self.prompts and self.followed:
            raise ValueError(
                f"suite is {self.suite!r} and prompts has {len(self.prompts)}: a suite has its own prompts; leave prompts "
                'out, or give suite = "none"'
            )
        return self

    @property
    def followed(self) -> Suite | None:
        """Return the suite that evaluations follow; None if there is none."""
        return SUITES.get(self.suite)

    def is_due(self, policy_version: int, rounds: int) -> bool:
        """Return whether this version is evaluated in a run of `rounds`: every so often, and at the end."""
        return self.every > 0 and (policy_version % self.every == 0 or policy_version == rounds)


class GuardTable(Table):
    """Guard: thresholds beyond which an evaluation raises an alarm, because the reward may be over-optimized."""

    max_scorer_drop: float = Field(default=0.5, gt=0)
    """Drop of a scorer's mean, in standard deviations of the pretrained model's scores, above which an alarm is raised."""
    certainty: float = Field(default=3.0, ge=0)
    """Drop in paired standard errors that is needed besides."""
    dark_share: float = Field(default=0.5, ge=0, le=1)
    """Increase of the share of nearly black pixels over the pretrained model's that raises an alarm."""
    sharpness: float = Field(default=0.1, ge=0)
    """Share of the pretrained model's sharpness below which an alarm is raised. 0: not monitored."""
    edge_density: float = Field(default=0.5, ge=0)
    """Share of the pretrained model's pixels on edges below which an alarm is raised. 0: not monitored."""
    entropy: float = Field(default=0.6, ge=0)
    """Share of the pretrained model's grey-level entropy below which an alarm is raised. 0: not monitored."""
    diversity: float = Field(default=0.25, ge=0)
    """Share of the pretrained model's diversity within a prompt below which an alarm is raised. 0: not monitored."""
    saturation: float = Field(default=0.95, ge=0, le=1)
    """Share of images with the best possible reward from which an alarm is raised. 0: not monitored."""
    max_kl_nats: float | None = Field(default=None, gt=0)
    """KL in nats per step to the pretrained model above which an alarm is raised. By default not monitored."""
    patience: int = Field(default=1, ge=1)
    """Consecutive evaluations with an alarm before `on_alarm` takes effect."""
    on_alarm: Literal["continue", "stop", "roll_back"] = "continue"
    """Warn and continue, stop the run, or stop it and restore the best version's weights (`roll_back`)."""
    best_by: str = "reward"
    """Score whose mean over an evaluation tells the best version: `reward`, one of the rewards, or a scorer."""


class StartFromTable(Table):
    """Earlier run whose weights this run starts from. `ddpo train RECIPE --from RUN[@ROUND]` fills it in."""

    run: str = Field(min_length=1)
    """Folder of the earlier run."""
    round: Annotated[int, Field(ge=1)] | Literal["best"] | None = None
    """Rounds that the weights were trained on, or `best`. By default the run's last weights."""
    fingerprint: str | None = None
    """Fingerprint of these weights. It is filled in at the start of the run."""


class PushTable(Table):
    """Upload of the trained weights to the Hugging Face hub, at the end of the run or by `ddpo push`."""

    repo: str | None = Field(default=None, pattern=r"^[\w.-]+/[\w.-]+$")
    """Repository, `owner/name`. By default nothing is uploaded."""
    private: bool = False
    """Create the repository as a private one."""
    revision: str | None = Field(default=None, min_length=1)
    """Branch, created if it does not exist. By default `main`."""
    version: Literal["last", "best"] = "last"
    """Weights to upload: the run's last ones, or those under `best/`."""
    license: str | None = Field(default=None, min_length=1)
    """License on the model card. By default that of `policy.model`, if it is known."""
    base_model: str | None = Field(default=None, pattern=r"^[\w.-]+/[\w.-]+$")
    """Hub name of the pretrained model on the model card, if `policy.model` is a folder."""
