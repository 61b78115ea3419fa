"""The table `[sampling]`, and the keys of `[evaluation]` that sample held-out images otherwise."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ray_ddpo.common.recipe.bounds import Table

Solver = Literal["first_order", "dpmsolver++"]  # of deterministic steps
FlowSampler = Literal["flow", "dance", "cps"]  # the stochastic samplers of a flow
Steps = Annotated[int, Field(ge=1)]


class SamplingTable(Table):
    """Denoising steps, guidance and noise of sampling, and the transitions that are trained on."""

    num_steps: int = Field(default=50, ge=2, le=1000)
    """Denoising steps per image."""
    guidance_scale: float = Field(default=5.0, ge=0)
    """Scale of classifier-free guidance. Up to 1 the network runs once a step, not twice. For FLUX it is an input."""
    negative_prompt: str | None = None
    """Prompt that guidance leads away from. By default the empty one of diffusers."""
    eta: float = Field(default=1.0, gt=0, le=2)
    """Noise of a step: DDIM's η, or the noise level of a flow's sampler. Without noise there is no log-prob."""
    sde: FlowSampler | None = None
    """Stochastic sampler of a flow-matching family: Flow-SDE (`flow`, the default), Dance-SDE (`dance`) or CPS (`cps`)."""
    deterministic: bool = False
    """Take all steps without noise, in training too. For algorithms that learn from no log-prob."""
    batch_size: int = Field(default=8, ge=1)
    """Images per task: one call of a sampler."""
    batches_per_round: int = Field(default=4, ge=1)
    """Tasks per round. A round has `batch_size` × `batches_per_round` images."""
    timestep_fraction: float = Field(default=1.0, gt=0, le=1)
    """Fraction of an image's steps that are trained on. They are sampled from the image's seed."""
    skip_first_steps: int = Field(default=0, ge=0)
    """First steps that are not trained on."""
    skip_last_steps: int = Field(default=0, ge=0)
    """Last steps that are not trained on. The nearly clean ones are ill-conditioned."""
    sde_window: int | None = Field(default=None, ge=1)
    """Consecutive steps that are stochastic and trained on; others are deterministic. By default all are stochastic."""
    sde_window_order: Literal["random", "sliding"] = "random"
    """Position of the window: sampled at random (`random`), or later at each move (`sliding`)."""
    sde_window_rounds: int = Field(default=1, ge=1)
    """Rounds between two moves of the window."""
    sde_window_stride: int = Field(default=1, ge=0)
    """Steps by which a sliding window moves. 0: it stays at its first place."""
    sde_window_end: Literal["wrap", "stop"] = "wrap"
    """What a sliding window does after its last place: begin again (`wrap`), or stay there (`stop`)."""
    sde_window_decay: float = Field(default=0.0, ge=0)
    """Rate k of the decay of `sde_window_rounds`: a sliding window stays ⌈rounds · exp(−k · distance)⌉ rounds."""
    sde_window_decay_from: int = Field(default=0, ge=0)
    """Step from which the distance of that decay counts. Windows that start earlier stay for all rounds."""
    shared_prefix: bool = False
    """Let the images of a group share their initial noise and the deterministic steps before the window."""
    solver: Solver = "first_order"
    """Solver of the deterministic steps: the schedule's own (`first_order`), or DPM-Solver++(2M) (`dpmsolver++`)."""
    cache_interval: int = Field(default=1, ge=1, le=1000)
    """Deterministic steps per run of the network. The steps between extrapolate its output. 1: no cache."""
    kl_reward: float = Field(default=0.0, ge=0)
    """Coefficient of the trajectory's KL to the pretrained model, in nats, which is subtracted from the reward."""
    backprop_steps: Steps | tuple[Steps, Steps] | None = None
    """Last steps that a reward's gradient is propagated through. A range samples the number from each image's seed.

    Algorithms on differentiable rewards need it. `sampling.deterministic`, `sde_window` and `eta` decide which steps have noise.
    """
    thumbnails: bool = False
    """Send each image, reduced to 16 × 16 pixels, to the driver. `algorithm.diversity` of gardo needs it."""
    latents_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Dtype in which a trajectory's latents are stored. Log-probs are computed from the rounded latents."""

    @property
    def is_guided(self) -> bool:
        """Return whether guidance runs the network with and without the prompt, by the same rule as diffusers."""
        return self.guidance_scale > 1

    @property
    def is_fast(self) -> bool:
        """Return whether deterministic steps have a cache or a solver of higher order."""
        return self.cache_interval > 1 or self.solver != "first_order"

    @property
    def trains_no_steps(self) -> bool:
        """Return whether one step of a trajectory is kept, only to prove which weights sampled it."""
        return self.sde_window is None and (self.is_fast or self.deterministic)

    @property
    def backprop_range(self) -> tuple[int, int]:
        """Return the fewest and the most last steps that gradients are propagated through."""
        assert self.backprop_steps is not None, "only algorithms on differentiable rewards ask"
        given = self.backprop_steps
        return (given, given) if isinstance(given, int) else given

    def trained_steps(self, stochastic_steps: int) -> int:
        """Return how many of an image's stochastic steps are trained on; at least one."""
        if self.sde_window is not None:
            return self.sde_window
        if self.trains_no_steps:
            return 1
        candidates = stochastic_steps - self.skip_first_steps - self.skip_last_steps
        return max(1, round(self.timestep_fraction * candidates))

    @model_validator(mode="after")
    def _steps_are_left_to_learn_from(self) -> "SamplingTable":
        """Refuse a window beside a fraction of steps or longer than the steps, and last steps that are nearly all."""
        if self.sde_window is not None and self.timestep_fraction != 1:
            raise ValueError(
                f"sde_window is {self.sde_window} and timestep_fraction {self.timestep_fraction}: a recipe learns either "
                "from a window of steps, the same for a round, or from a fraction of them, each image's own"
            )
        skipped = f"skip_first_steps {self.skip_first_steps} and " if self.skip_first_steps else ""
        skipped += f"skip_last_steps {self.skip_last_steps}"
        left = self.num_steps - self.skip_first_steps - self.skip_last_steps
        if self.sde_window is not None and self.sde_window > left:
            raise ValueError(f"sde_window {self.sde_window} is longer than num_steps {self.num_steps} less {skipped}")
        if left <= 1:
            raise ValueError(f"{skipped} of num_steps {self.num_steps} leaves too few to learn from")
        return self

    @model_validator(mode="after")
    def _a_moving_window_slides(self) -> "SamplingTable":
        """Refuse keys of a sliding window without one, and a decay of rounds at a place that is never left."""
        names = ("sde_window_stride", "sde_window_end", "sde_window_decay", "sde_window_decay_from")
        given = [name for name in names if getattr(self, name) != type(self).model_fields[name].default]
        if given and (self.sde_window is None or self.sde_window_order != "sliding"):
            raise ValueError(
                f"{given[0]} is {getattr(self, given[0])!r}, and there is no window that slides: give sde_window and "
                'sde_window_order = "sliding", or leave the key out'
            )
        if len(given) > 1 and not self.sde_window_stride:
            key = next(name for name in given if name != "sde_window_stride")
            raise ValueError(
                f"{key} is {getattr(self, key)!r} and sde_window_stride 0, with which the window never leaves its first "
                "place: give a stride, or leave the key out"
            )
        if self.sde_window_decay_from and not self.sde_window_decay:
            raise ValueError(
                f"sde_window_decay_from is {self.sde_window_decay_from} and sde_window_decay 0: nothing decays; give "
                "sde_window_decay, or leave the key out"
            )
        return self

    @model_validator(mode="after")
    def _deterministic_steps_can_be_shared_and_solved(self) -> "SamplingTable":
        """Refuse a prefix without a window that it ends at, and a cache of outputs beside a solver of second order."""
        if self.shared_prefix and self.sde_window is None:
            raise ValueError(
                "shared_prefix is true and there is no sde_window: every step is stochastic, so there is no prefix to "
                "share; give sde_window"
            )
        _refuse_cache_beside_solver(self.cache_interval, self.solver)
        return self

    @model_validator(mode="after")
    def _deterministic_steps_have_no_noise_to_choose(self) -> "SamplingTable":
        """Refuse deterministic sampling beside keys of stochastic or trained steps."""
        if self.deterministic and (self.sde_window is not None or self.sde is not None):
            key = "sde_window" if self.sde_window is not None else "sde"
            raise ValueError(
                f"deterministic is true and {key} {getattr(self, key)!r}: a deterministic trajectory has no stochastic "
                "steps; give one of the two"
            )
        skipped = [key for key in ("skip_first_steps", "skip_last_steps") if getattr(self, key)]
        if skipped and self.trains_no_steps:
            why = "deterministic is true" if self.deterministic else "there is a cache or a solver and no sde_window"
            raise ValueError(
                f"{skipped[0]} is {getattr(self, skipped[0])} and {why}: no step of such a trajectory is trained on, so "
                "there are none to leave out; leave the key out"
            )
        return self

    @model_validator(mode="after")
    def _the_learner_can_repeat_the_last_steps(self) -> "SamplingTable":
        """Refuse a range from more steps to fewer, and steps that the learner cannot repeat image by image."""
        if self.backprop_steps is None:
            return self
        least, most = self.backprop_range
        if least > most:
            raise ValueError(
                f"backprop_steps is {list(self.backprop_range)}: give a number of last steps, or the fewest and the most of "
                "them, in this order"
            )
        taken = {"solver": self.solver != "first_order", "cache_interval": self.cache_interval > 1}
        for key in [key for key, is_set in {**taken, "shared_prefix": self.shared_prefix}.items() if is_set]:
            raise ValueError(
                f"backprop_steps is {self.backprop_steps} and {key} {getattr(self, key)!r}: the learner repeats the last "
                f"steps one by one, as the schedule takes them; leave {key} out"
            )
        return self


class HeldOutSampling(Table):
    """Settings of sampling that held-out images may have of their own."""

    num_steps: int | None = Field(default=None, ge=2, le=1000)
    """Denoising steps of held-out images. By default `sampling.num_steps`."""
    solver: Solver = "first_order"
    """Solver of held-out images, as `sampling.solver`. With `dpmsolver++` all their steps are deterministic."""
    cache_interval: int = Field(default=1, ge=1, le=1000)
    """Steps of held-out images per run of the network. Above 1, all steps are deterministic."""

    @model_validator(mode="after")
    def _has_one_way_to_save_network_calls(self) -> "HeldOutSampling":
        _refuse_cache_beside_solver(self.cache_interval, self.solver)
        return self

    @property
    def own_sampling(self) -> dict[str, int | str]:
        """Return the settings of sampling that this table gives, without those that are as by default."""
        given = {"num_steps": self.num_steps, "solver": self.solver, "cache_interval": self.cache_interval}
        return {key: value for key, value in given.items() if value not in (None, "first_order", 1)}


def _refuse_cache_beside_solver(cache_interval: int | None, solver: str | None) -> None:
    """Raise ValueError if both are set, because the solver extrapolates between the network's outputs itself."""
    if (cache_interval or 1) > 1 and solver == "dpmsolver++":
        raise ValueError(
            f"cache_interval is {cache_interval} and solver {solver!r}, which extrapolates between the network's "
            "outputs itself: give one of the two; with the solver, fewer num_steps save as much"
        )
