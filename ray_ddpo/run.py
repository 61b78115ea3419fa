"""Run: what a training run has left, for a script or a notebook."""

import io
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from PIL import Image

from ray_ddpo.common.run_storage.ledger import Ledger
from ray_ddpo.common.run_storage.run_folder import RunFolder
from ray_ddpo.deploy.commands.report.report import logged_rounds, report
from ray_ddpo.deploy.driver.components import NOTHING_GIVEN, Given
from ray_ddpo.handed_over import PromptsArgument, RewardArgument, components_given


class Run:
    """A training run's folder. `train` returns one; `Run("runs/demo")` opens that of an earlier process.

    Attributes:
        folder: an absolute path or a URI.
    """

    def __init__(self, folder: str | os.PathLike[str], given: Given = NOTHING_GIVEN) -> None:
        self._folder = RunFolder(os.fspath(folder))
        self._folder.refuse_if_no_run()
        self._given = given
        self.folder = self._folder.location

    def __repr__(self) -> str:
        return f"Run({self.folder!r})"

    @property
    def metrics(self) -> list[dict[str, float]]:
        """A list of dictionaries, one for each round, for `pandas.DataFrame(run.metrics)`. A number that is not finite is NaN."""
        return logged_rounds(self._folder)

    @property
    def lora(self) -> str:
        """The LoRA's folder, which a pipeline of diffusers takes: `pipeline.load_lora_weights(run.lora)`.

        Raises:
            ValueError: the run has not ended yet, or trains the whole network.
        """
        if not self._folder.storage.exists("lora"):
            raise ValueError(
                f"{self.folder} has no lora/: the run has not ended, or its recipe has policy.train 'full'"
            )
        return self._folder.lora.location

    def images(self, round_index: int) -> list[Image.Image]:
        """Return the images of a round, in the order of the ledger's rows.

        Args:
            round_index: the round, counted from 0.

        Raises:
            ValueError: the run has no such round, or did not keep its images (`rollouts.images_every`).
        """
        recipe = self._folder.load_recipe([])
        ledger = Ledger(self._folder.storage, recipe.rollouts)
        if round_index in ledger.rounds() and not ledger.wants_images(round_index):
            every = recipe.rollouts.images_every
            raise ValueError(
                f"round {round_index} has no images: rollouts.images_every is {every}; train with "
                'Recipe.load(…, rollouts={"images_every": 1}) to keep those of every round'
            )
        column = ledger.read(round_index, ("pixels",)).column("pixels").to_pylist()
        return [Image.open(io.BytesIO(png)) for png in column]

    def report(
        self,
        *,
        reward: RewardArgument | Mapping[str, RewardArgument] | None = None,
        prompts: PromptsArgument | None = None,
    ) -> str:
        """Sample held-out images before and after training, score them, and write the page `report/report.html`.

        Args:
            reward: the function or object that the run was trained with, if another process trained and no module holds it.
            prompts: the same of its prompts.

        Returns:
            What the report says, in a few lines, and the paths of its files.
        """
        given, again = self._given, components_given(reward=reward, prompts=prompts)
        if reward is not None:
            names = [table.called for table in self._folder.load_recipe([]).all_rewards]
            # A single reward is the run's, even if the function has another name by now.
            is_single = len(names) == 1 and not isinstance(reward, Mapping)
            rewards = dict(zip(names, again.rewards.values(), strict=True)) if is_single else again.rewards
            given = replace(given, rewards=rewards)
        if prompts is not None:
            given = replace(given, prompts=again.prompts)
        return report(self.folder, [], given)

    def _repr_markdown_(self) -> str:
        """Show the last round in a notebook."""
        rounds = self.metrics
        last: dict[str, Any] = rounds[-1] if rounds else {}
        return f"`{self!r}`: {len(rounds)} rounds, mean reward {last.get('reward/mean', float('nan')):.4g}"
