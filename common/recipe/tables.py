"""The tables of a recipe: their keys, typed and bounded, each checked by itself (no torch)."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from ray_ddpo.common.recipe.bounds import LARGEST, Bounded

MOST_ACTORS = 10_000  # of one role
MOST_IMAGES = 1_000_000  # of a round, or of an evaluation
PLACES = 4  # decimal places of an amount that Ray counts
RAYS_OWN = ("CPU", "GPU", "memory", "object_store_memory", "bundle")


class Table(Bounded):
    """A table of the recipe: its keys are known, typed and bounded."""


class ComponentTable(Bounded):
    """A table that names a choice in a registry. Its other keys belong to the class chosen, which checks them itself."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)
    name: str

    def table(self) -> dict[str, Any]:
        """The name and the chosen class's own keys, as `registry.build` takes them."""
        return {"name": self.name, **(self.model_extra or {})}


class PolicyTable(ComponentTable):
    """The model family."""


class AlgorithmTable(ComponentTable):
    """The algorithm."""


class TrackerTable(ComponentTable):
    """One tracker."""


class PromptsTable(ComponentTable):
    images_per_prompt: int = Field(default=1, ge=1)  # a group; 1: every image samples its prompt


class SamplingTable(Table):
    num_steps: int = Field(default=50, ge=2, le=1000)
    guidance_scale: float = Field(default=5.0, ge=0)  # up to 1: one forward pass instead of two; FLUX is told it
    negative_prompt: str | None = None  # what guidance leads away from; none: as diffusers has it without one
    # DDIM's η, or flow matching's noise level a; 0 would leave no noise, so no action and no log_prob.
    eta: float = Field(default=1.0, gt=0, le=1)
    batch_size: int = Field(default=8, ge=1)  # images a task
    batches_per_round: int = Field(default=4, ge=1)  # tasks a round
    timestep_fraction: float = Field(
        default=1.0, gt=0, le=1
    )  # of an image's steps, sampled from its seed, that are learned from
    skip_last_steps: int = Field(default=0, ge=0)  # not learned from: the nearly clean ones are ill-conditioned
    # So many neighbouring steps are sampled with noise and learned from, the others without; none: all steps have noise.
    sde_window: int | None = Field(default=None, ge=1)
    sde_window_order: Literal["random", "sliding"] = (
        "random"  # where it stands: re-sampled, or one step later each time
    )
    sde_window_rounds: int = Field(default=1, ge=1)  # for which it stays where it is
    latents_dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # how a path is stored, and so scored

    @property
    def is_guided(self) -> bool:
        """Whether classifier-free guidance runs the network with and without the prompt, as diffusers decides it."""
        return self.guidance_scale > 1

    def trained_steps(self, stochastic_steps: int) -> int:
        """How many of an image's steps with noise are kept and learned from; at least one."""
        if self.sde_window is not None:
            return self.sde_window
        return max(1, round(self.timestep_fraction * (stochastic_steps - self.skip_last_steps)))

    @model_validator(mode="after")
    def _window_fits(self) -> "SamplingTable":
        if self.sde_window is not None and self.timestep_fraction != 1:
            raise ValueError(
                f"sde_window is {self.sde_window} and timestep_fraction {self.timestep_fraction}: a recipe learns either from a "
                "window of steps, "
                "the same for a round, or from a fraction of them, each image's own"
            )
        if self.sde_window is not None and self.sde_window > self.num_steps - self.skip_last_steps:
            raise ValueError(
                f"sde_window {self.sde_window} is longer than num_steps {self.num_steps} less skip_last_steps "
                f"{self.skip_last_steps}"
            )
        return self

    @model_validator(mode="after")
    def _steps_are_left_to_learn_from(self) -> "SamplingTable":
        if self.skip_last_steps >= self.num_steps - 1:
            raise ValueError(
                f"skip_last_steps {self.skip_last_steps} of num_steps {self.num_steps} leaves too few to learn from"
            )
        return self


class RoleTable(Table):
    """What one actor of a role asks of the cluster."""

    num_cpus: float = Field(default=1, ge=0, le=MOST_ACTORS)
    num_gpus: float = Field(default=0, ge=0, le=MOST_ACTORS)
    resources: dict[str, float] = {}
    accelerator_type: str | None = None

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
    """A role whose number may change while the run goes on."""

    count: int = Field(default=1, ge=1, le=MOST_ACTORS)  # at the start
    min: int = Field(
        default=1, ge=1, le=MOST_ACTORS
    )  # so many must be loaded before the run starts; the others join it
    max: int | None = Field(default=None, ge=1)  # `ddpo scale` goes no higher; none: no limit

    @model_validator(mode="after")
    def _count_lies_between(self) -> "ElasticTable":
        if self.count < self.min or (self.max is not None and self.count > self.max):
            raise ValueError(f"count {self.count} must lie between min {self.min} and max {self.max}")
        return self


class SamplersTable(ElasticTable):
    straggler_factor: float = Field(
        default=4.0, gt=1
    )  # × its peers' time: then a task is sampled a second time elsewhere


class RewardPoolTable(ElasticTable):
    """Reward workers that are all alike."""

    batch_size: int = Field(default=64, ge=1)  # images a scoring batch, cut from a task in order
    timeout_seconds: float = Field(default=600.0, gt=0)  # for one scoring batch
    attempts: int = Field(default=3, ge=1)  # at a scoring batch that fails, before it is halved to find the image
    cache: int = Field(default=0, ge=0)  # scores a worker remembers by image; of rewards independent of their batch


class RewardTable(ComponentTable):
    # What it is called in metrics and rows; none: its name.
    label: str | None = Field(default=None, pattern=r"^\w[\w-]*$")
    weight: float = 1.0
    floor: float | None = None  # images below it rank under all others, whatever the other rewards say
    workers: RewardPoolTable | None = None  # of its own; none: those of [reward_workers]

    @property
    def called(self) -> str:
        """The label, else the name; of module:Class the class's."""
        return self.label or self.name.rpartition(":")[2]


class AggregationTable(Table):
    # Of several rewards: as they are; each less its mean over its deviation; advantages of each; win rates in a group.
    kind: Literal["sum", "z_score", "advantages", "win_rate"] = "sum"


class RewardWorkersTable(RewardPoolTable):
    """Those of all rewards that have none of their own; and of the whole run."""

    max_dropped: int = Field(default=32, ge=0)  # images of the whole run; one more ends it


class LearnerTable(RoleTable):
    batch_size: int = Field(ge=1)  # images that enter an optimizer step at once
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    # Transitions a forward pass: memory and speed, not mathematics; "auto": the most that the device holds, found at the start.
    micro_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"]
    inner_epochs: int = Field(default=1, ge=1)
    parts_per_round: int = Field(
        default=1, ge=1
    )  # learned from in task order, each while the tasks after it are sampled
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"  # in 8 bits a quarter of the memory; needs bitsandbytes
    learning_rate: float = Field(default=3e-4, gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    adam_epsilon: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    # Of a step, from the policy that sampled: then no more inner epochs.
    max_kl_nats: float | None = Field(default=None, gt=0)
    # How far sampler's and learner's log_prob may lie apart under the same weights; none: 1e-4 in float32, else 1e-2.
    log_prob_tolerance: float | None = Field(default=None, gt=0)
    # Processes that share every optimizer step; each has this table's resources.
    world_size: int = Field(default=1, ge=1, le=MOST_ACTORS)
    shard_optimizer_state: bool = (
        False  # each keeps a part of its state, and sends the others the weights that it has moved
    )

    @property
    def images_per_step(self) -> int:
        """Images an optimizer step learns from."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def images_per_rank(self) -> int:
        """Of these, a rank's own."""
        return self.images_per_step // self.world_size


class RuntimeTable(Table):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(default=1, ge=1, le=1024)  # of torch, in every process that computes
    deterministic: bool = True
    tf32: bool = False  # GPUs compute float32's convolutions and matrix products in TF32: faster, 10 bits of mantissa
    ready_seconds: float = Field(default=600.0, gt=0)  # until an actor has its place and has loaded its model
    watchdog_seconds: float = Field(default=1800.0, gt=0)  # without anything done: the run ends with a dump
    max_restarts: int = Field(default=100, ge=0)  # of actors, before a round is done


class RolloutsTable(Table):
    keep: bool = True  # the ledger: a parquet row an image
    images_every: int = Field(default=0, ge=0)  # rounds whose rows hold their image; 0: none does


class MediaTable(Table):
    """What wandb and TensorBoard are shown of rounds, beside their metrics."""

    every: int = Field(default=10, ge=0)  # rounds between two that are shown; the last one is too; 0: none is
    images: int = Field(default=8, ge=0)  # of such a round, the first ones

    def is_due(self, round: int, rounds: int) -> bool:
        """Whether this round is shown, in a run of so many."""
        return self.every > 0 and (round % self.every == 0 or round == rounds - 1)


class CheckpointTable(Table):
    every: int = Field(default=10, ge=1)  # rounds
    keep: int = Field(default=2, ge=1)


class EvaluationTable(Table):
    every: int = Field(default=0, ge=0)  # rounds between two evaluations while it trains; 0: only in the report
    prompts: tuple[str, ...] = ()  # none: those that the prompt source leaves out, else all of it, in order
    images: int = Field(default=64, ge=2, le=MOST_IMAGES)
    batch_size: int = Field(default=16, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    split: Literal["evaluation", "tuning"] = "evaluation"  # choose a recipe's numbers on "tuning" images only
    scorers: tuple[RewardTable, ...] = ()  # looked at beside the reward, never trained on
    workers: RewardPoolTable = RewardPoolTable()  # that hold the scorers while it trains
    average_decay: float | None = Field(
        default=None, gt=0, lt=1
    )  # of the versions' moving average, sampled with as well
    saved_images: int = Field(default=8, ge=0)  # of each evaluation that are kept, the first ones

    def is_due(self, policy_version: int, rounds: int) -> bool:
        """Whether this version is evaluated in a run of so many rounds: every so often, and at the end."""
        return self.every > 0 and (policy_version % self.every == 0 or policy_version == rounds)


class GuardTable(Table):
    """From where on an evaluation's findings are an alarm: the reward may be fooled. Shares are of the pretrained model's."""

    scorer_fall: float = Field(default=0.5, gt=0)  # of a scorer's mean, in standard deviations of its scores before
    certainty: float = Field(default=3.0, ge=0)  # and in paired standard errors
    dark_share: float = Field(default=0.5, ge=0, le=1)  # of pixels that are nearly black, over the pretrained model's
    sharpness: float = Field(default=0.1, ge=0)  # share that must be left; 0: not watched, so with the next two
    entropy: float = Field(default=0.5, ge=0)
    diversity: float = Field(default=0.25, ge=0)  # between images of one prompt
    max_kl_nats: float | None = Field(default=None, gt=0)  # of a step, to the pretrained model; none: not watched
    patience: int = Field(default=1, ge=1)  # evaluations in a row with an alarm, before on_alarm is done
    # Go on with a warning; end the run; or end it with the best version's weights in place of the last.
    on_alarm: Literal["continue", "stop", "roll_back"] = "continue"
    best_by: str = "reward"  # whose mean over the evaluation tells the best version: "reward", a reward, or a scorer


class StartFromTable(Table):
    """An earlier run whose weights this one starts from, as `ddpo train RECIPE --from RUN[@ROUND]` fills it in."""

    run: str = Field(min_length=1)  # its folder
    round: Annotated[int, Field(ge=1)] | Literal["best"] | None = None  # so many rounds done; none: its last weights
    fingerprint: str | None = None  # of these weights; filled in when the run begins


class PushTable(Table):
    """Whether the weights are published on the Hugging Face hub when the run has ended, and how; `ddpo push` goes by it too."""

    repo: str | None = Field(default=None, pattern=r"^[\w.-]+/[\w.-]+$")  # owner/name; none: nothing is published
    private: bool = False
    revision: str | None = Field(default=None, min_length=1)  # a branch, made where it is not there; none: main
    version: Literal["last", "best"] = "last"  # the run's own weights, or those under best/
    license: str | None = Field(default=None, min_length=1)  # none: that of policy.model, where it is known
    # Its hub name, where policy.model is a folder.
    base_model: str | None = Field(default=None, pattern=r"^[\w.-]+/[\w.-]+$")
