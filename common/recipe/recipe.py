"""The recipe: all tables of a run, read from TOML and checked against each other (no torch)."""

import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from ray_ddpo.common.reading import reading
from ray_ddpo.common.recipe.colocation import refuse_unshareable
from ray_ddpo.common.recipe.overrides import with_overrides
from ray_ddpo.common.recipe.registry import explain
from ray_ddpo.common.recipe.shipped import near_recipes, recipe_file
from ray_ddpo.common.recipe.tables import (
    MOST_IMAGES,
    AggregationTable,
    AlgorithmTable,
    CheckpointTable,
    EvaluationTable,
    GuardTable,
    LearnerTable,
    MediaTable,
    PolicyTable,
    PromptsTable,
    PushTable,
    RewardTable,
    RewardWorkersTable,
    RolloutsTable,
    RuntimeTable,
    SamplersTable,
    SamplingTable,
    StartFromTable,
    Table,
    TrackerTable,
)

RECIPE_FILE = "recipe.toml"  # in a run's folder
STORAGE_SCHEMES = ("file", "s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")  # those of pyarrow's filesystems
LONGEST_QUOTE = 100  # characters of a line that is no TOML
URI_WITH_A_USER = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/\s]*@")


class Recipe(Table):
    """Recipe of a whole run. `Recipe.load` reads it from TOML and applies the command line's overrides."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Name of the run and of its folder."""
    output_dir: str = "runs"
    """Folder or URI of all runs. The folder of this run is `output_dir/name`."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the run: of prompts, noise and initial weights."""
    rounds: int = Field(ge=1)
    """Rounds of the run: how often images are sampled, scored and learned from."""
    max_policy_lag: int = Field(default=0, ge=0)
    """Rounds by which the sampling policy may be older than the learner's. With 0, sampling and learning alternate."""
    start_from: StartFromTable | None = None
    """Earlier run whose weights this run starts from. By default the pretrained model's."""
    policy: PolicyTable
    """Model family and its keys."""
    prompts: PromptsTable
    """Source of the prompts."""
    sampling: SamplingTable
    """Denoising steps and guidance."""
    samplers: SamplersTable = SamplersTable()
    """Actors that generate images."""
    reward: RewardTable | None = None
    """The reward that is trained on. Give this or `[[rewards]]`."""
    rewards: tuple[RewardTable, ...] = ()
    """Several rewards that are trained on."""
    aggregation: AggregationTable = AggregationTable()
    """Aggregation of several rewards."""
    reward_workers: RewardWorkersTable = RewardWorkersTable()
    """Actors that score images."""
    algorithm: AlgorithmTable
    """Algorithm and its hyperparameters."""
    learner: LearnerTable
    """Optimizer and batch sizes."""
    runtime: RuntimeTable = RuntimeTable()
    """Device, threads and time limits."""
    checkpoint: CheckpointTable = CheckpointTable()
    """Checkpoints, for resuming a run."""
    rollouts: RolloutsTable = RolloutsTable()
    """Ledger of all images."""
    evaluation: EvaluationTable = EvaluationTable()
    """Held-out images and scorers."""
    guard: GuardTable = GuardTable()
    """Alarms if the reward is over-optimized."""
    push: PushTable = PushTable()
    """Upload to the Hugging Face hub."""
    media: MediaTable = MediaTable()
    """Images for wandb and TensorBoard."""
    trackers: tuple[TrackerTable, ...] = ()
    """Further destinations of metrics."""

    @property
    def images_per_round(self) -> int:
        """Return the images of a round."""
        return self.sampling.batch_size * self.sampling.batches_per_round

    @property
    def kept_lag(self) -> int:
        """Return the most rounds that a version is behind the learner while the learner keeps it.

        Rounds in flight need versions up to `max_policy_lag` behind, and rounds of the replay buffer older ones.
        """
        return self.max_policy_lag + self.learner.replay_rounds

    @property
    def all_rewards(self) -> tuple[RewardTable, ...]:
        """Return the rewards that are trained on, from `[reward]` or `[[rewards]]`."""
        return self.rewards or ((self.reward,) if self.reward else ())

    @property
    def scorers(self) -> tuple[RewardTable, ...]:
        """Return the scorers of an evaluation, which are not trained on: those of its suite, and its own.

        One of `evaluation.scorers` replaces the suite's of its name. A reward stands for the suite's of its name.
        """
        own = {table.called: table for table in self.evaluation.scorers}
        trained_on = {table.called for table in self.all_rewards}
        of_suite = [table for table in self.suite_scorers if table.called not in trained_on]
        return (*(own.pop(table.called, table) for table in of_suite), *own.values())

    @property
    def suite_scorers(self) -> tuple[RewardTable, ...]:
        """Return the scorers of the suite that evaluations follow; none if there is no suite."""
        followed = self.evaluation.followed
        return tuple(RewardTable.model_validate(table) for table in (followed.scorers if followed else ()))

    @property
    def held_out_sampling(self) -> SamplingTable:
        """Return the sampling settings of images that are not trained on: those of `[sampling]` and `[evaluation]`."""
        plain: dict[str, Any] = {
            "shared_prefix": False,
            "solver": "first_order",
            "cache_interval": 1,
            "backprop_steps": None,
        }
        return self.sampling.model_copy(update=plain | self.evaluation.own_sampling)

    @model_validator(mode="after")
    def _one_way_of_giving_rewards(self) -> "Recipe":
        """Refuse recipes without a reward, with both ways of giving rewards, or with rewards of one name."""
        if self.reward is not None and self.rewards:
            raise ValueError(
                "the recipe has both [reward] and [[rewards]]: it must have one of them; write [[rewards]] for each, or "
                "replace the list by --rewards '[{ name = … }]'"
            )
        if not self.all_rewards:
            raise ValueError("the recipe has no reward: it needs a table [reward], or several [[rewards]]")
        names = [reward.called for reward in (*self.all_rewards, *self.evaluation.scorers)]
        if len(set(names)) < len(names):
            raise ValueError(f"rewards and evaluation.scorers are called {names}: give a label to those of one name")
        if not any(reward.weight or reward.floor is not None for reward in self.all_rewards):
            raise ValueError(f"every weight of {names} is 0 and none has a floor: there is nothing to learn")
        if self.aggregation.kind == "win_rate" and self.prompts.images_per_prompt < 2:
            raise ValueError(
                f"aggregation.kind is 'win_rate' and prompts.images_per_prompt {self.prompts.images_per_prompt}: "
                "a group needs at least 2 images of one prompt"
            )
        return self

    @model_validator(mode="after")
    def _batches_fit_together(self) -> "Recipe":
        """Refuse batch sizes that do not divide one another."""
        group, step = self.prompts.images_per_prompt, self.learner.images_per_step
        tasks, parts = self.sampling.batches_per_round, self.learner.parts_per_round
        if tasks % parts:
            raise ValueError(
                f"a round has sampling.batches_per_round = {tasks} tasks, "
                f"which learner.parts_per_round = {parts} does not divide"
            )
        if self.images_per_round > MOST_IMAGES:
            raise ValueError(
                f"a round has sampling.batch_size × batches_per_round = {self.images_per_round} images, and it may have "
                f"{MOST_IMAGES:,}"
            )
        images = self.images_per_round // parts
        which = "a round has sampling.batch_size × batches_per_round" + " / learner.parts_per_round" * (parts > 1)
        if images % group:
            raise ValueError(f"{which} = {images} images, which prompts.images_per_prompt = {group} does not divide")
        if images % step:
            raise ValueError(
                f"{which} = {images} images, which an optimizer step's "
                f"learner.batch_size × gradient_accumulation_steps = {step} does not divide"
            )
        if step % self.learner.world_size:
            raise ValueError(
                f"an optimizer step has learner.batch_size × gradient_accumulation_steps = {step} images, "
                f"which learner.world_size = {self.learner.world_size} does not divide"
            )
        return self

    @model_validator(mode="after")
    def _roles_on_one_gpu_take_turns(self) -> "Recipe":
        """Refuse a colocated learner that cannot take turns with the samplers, or has no GPU in common with them."""
        refuse_unshareable(self.learner, self.samplers, self.max_policy_lag)
        return self

    @model_validator(mode="after")
    def _groups_can_share_a_prefix(self) -> "Recipe":
        """Refuse a shared prefix without groups, or with tasks of different numbers of groups.

        Tasks with equal numbers of groups compute a group's prefix in batches of one size, and so with the same bits.
        """
        group, task = self.prompts.images_per_prompt, self.sampling.batch_size
        if not self.sampling.shared_prefix:
            return self
        if group == 1:
            raise ValueError(
                "sampling.shared_prefix is true and prompts.images_per_prompt 1: a group of one image has nobody to share "
                "a prefix with; give images_per_prompt, or shared_prefix = false"
            )
        if task % group and group % task:
            raise ValueError(
                f"sampling.shared_prefix is true, prompts.images_per_prompt {group} and sampling.batch_size {task}: tasks "
                "would hold parts of groups; give a batch_size that images_per_prompt divides, or that divides it"
            )
        return self

    @model_validator(mode="after")
    def _the_guard_can_see(self) -> "Recipe":
        """Refuse a guard that lacks the score, the evaluations or the pretrained model it needs."""
        known = ["reward", *(table.called for table in (*self.all_rewards, *self.scorers))]
        if self.guard.best_by not in known:
            raise ValueError(f"guard.best_by is {self.guard.best_by!r}: it must be one of {known}")
        if self.guard.on_alarm != "continue" and not self.evaluation.every:
            raise ValueError(
                f"guard.on_alarm is {self.guard.on_alarm!r} and evaluation.every 0: the guard judges evaluations, so give "
                "the rounds between two of them"
            )
        if self.guard.max_kl_nats is not None and self.policy.table().get("train") == "full":
            raise ValueError(
                f"guard.max_kl_nats is {self.guard.max_kl_nats:g} and policy.train 'full': the pretrained model is the network "
                'with its adapters switched off, so a KL to it needs policy.train = "lora"'
            )
        return self

    @field_validator("output_dir", mode="after")
    @classmethod
    def _can_hold_a_run(cls, output_dir: str) -> str:
        scheme, separator, _ = output_dir.partition("://")
        if separator and scheme not in STORAGE_SCHEMES:
            raise ValueError(f"runs are kept in a folder, or at a URI that begins with one of {list(STORAGE_SCHEMES)}")
        if not output_dir.strip() or not output_dir.isprintable():
            raise ValueError("it must name a folder or URI, without control characters")
        return output_dir

    @classmethod
    def parse(cls, tables: dict[str, Any], where: str = "") -> "Recipe":
        """Check a recipe's tables.

        Args:
            tables: as TOML gives them.
            where: the file that they come from, as an error names it.

        Raises:
            ValueError: One line names every key at fault. It shows no password.
        """
        which = f"the recipe {where}".rstrip()
        if shown := list(_holding_a_user(tables)):
            raise ValueError(
                f"{which} cannot be used: {', '.join(shown)} holds a URI with a user's name or password, and a run keeps its "
                "recipe where others read it: leave it out, keys and tokens come from the environment"
            )
        try:
            return cls.model_validate(tables)
        except ValidationError as error:
            raise ValueError(f"{which} cannot be used: {explain(error, cls)}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str], overrides: list[str] | None = None, **keys: Any) -> "Recipe":
        """Read a recipe's TOML file and apply overrides.

        Args:
            path: the file, or the name of a shipped recipe, such as `demo` or `tiny/grpo`.
            overrides: `--section.key`, value and so on, as on the command line.
            keys: the same from Python, tables as dictionaries: `rounds=20, learner={"learning_rate": 1e-3}`.

        Raises:
            ValueError: There is no such recipe, or it cannot be used.
        """
        path = recipe_file(path)
        if not path.is_file():
            raise ValueError(_no_recipe(path))
        with reading(path):
            content = path.read_bytes()
        if b"\0" in content:
            raise ValueError(f"{path} is no recipe, it is no text in UTF-8: give the path of a TOML file")
        with reading(path):
            text = content.decode("utf-8-sig")  # some editors begin a file with a byte order mark
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        recipe = cls.from_toml(text, str(path), overrides or [])
        return cls.parse(_with_keys(recipe.model_dump(), keys), str(path)) if keys else recipe

    @classmethod
    def from_toml(cls, text: str, where: str, overrides: list[str]) -> "Recipe":
        """Read a recipe's text and apply overrides; errors name the file `where`."""
        try:
            tables = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            line = re.search(r"at line (\d+)", str(error))
            quoted = repr(text.split("\n")[int(line[1]) - 1].strip()[:LONGEST_QUOTE]) if line else ""
            raise ValueError(f"the recipe {where} is not TOML: {error}{': ' if quoted else ''}{quoted}") from error
        return cls.parse(with_overrides(tables, overrides, cls), where)

    def run_path(self) -> str:
        """Return the run's folder, a path or a URI.

        Raises:
            ValueError: The path is relative inside a submitted job, where it would lie in Ray's temporary copy.
        """
        if "://" in self.output_dir:
            return f"{self.output_dir.rstrip('/')}/{self.name}"
        if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and not os.path.isabs(self.output_dir):
            raise ValueError(
                f"output_dir is {self.output_dir!r}, which inside a submitted job lies in a throw-away copy of the "
                "working directory: give --output_dir an absolute path on storage that all nodes see, or a URI (s3://…)"
            )
        return os.path.join(self.output_dir, self.name)


def _no_recipe(path: Path) -> str:
    """Return why there is no recipe at a path, and which recipes may be meant."""
    if (path / RECIPE_FILE).is_file():
        return f"there is no recipe at {path}, it is a folder: give the recipe in it, {path / RECIPE_FILE}"
    place = f"{path}, it is a folder" if path.is_dir() else path
    near = near_recipes(path)
    hint = f"; did you mean {' or '.join(near)}?" if near else ", such as demo or tiny/grpo"
    names = "the name of a shipped recipe (`ddpo config recipes` lists them)"
    return f"there is no recipe at {place}: give the path of a TOML file, or {names}{hint}"


def _holding_a_user(value: Any, key: str = "") -> Iterator[str]:
    """Yield the keys whose text contains scheme://user@ or scheme://user:password@."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _holding_a_user(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _holding_a_user(inner, key)
    elif isinstance(value, str) and URI_WITH_A_USER.search(value):
        yield key


def _with_keys(tables: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    """Return the tables with other values in them. A table that names another component has none of the former's keys."""
    result = dict(tables)
    for key, value in keys.items():
        before = tables.get(key)
        if isinstance(value, dict) and isinstance(before, dict) and value.get("name") in (None, before.get("name")):
            value = _with_keys(before, value)
        result[key] = value
    return result
