"""The prompts of suites: those that ship, and those in the files that `ddpo prompts` wrote."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from ray_ddpo.common.prompt_set import PromptSet
from ray_ddpo.common.prompts import File, Prompt, PromptSource
from ray_ddpo.common.recipe.tables import EvaluationTable
from ray_ddpo.common.suites import Suite


def suite_source(suite: Suite, folder: Path, key: str) -> PromptSource:
    """Return the source of a suite's prompts.

    Args:
        suite: the suite.
        folder: the folder of the files that `ddpo prompts` wrote.
        key: what names this folder, in a recipe or on the command line.

    Raises:
        ValueError: the published prompts were not fetched into `folder`.
    """
    if suite.shipped is not None:
        return PromptSet(set=suite.shipped)
    path = folder / f"{suite.published}_test.jsonl"
    if not path.is_file():
        raise ValueError(
            f"the suite {suite.name} needs {path}, which is not there: fetch it with ddpo prompts {suite.published} "
            f"--output {folder}, or say with {key} where it is"
        )
    return File(path=str(path))


def followed_prompts(table: EvaluationTable) -> list[Prompt]:
    """Return the prompts of the suite that `[evaluation]` follows. Raise ValueError if they were not fetched."""
    assert table.followed is not None, "no suite is followed"
    folder = Path(os.path.expanduser(table.prompts_from))
    return suite_source(table.followed, folder, "evaluation.prompts_from").evaluated()


def prompts_sha256(prompts: Sequence[Prompt]) -> str:
    """Return the SHA-256 of prompts and metadata: results of other prompts cannot be compared."""
    told = [[prompt.text, prompt.metadata] for prompt in prompts]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def trained_on(test: Iterable[str], train: Iterable[str]) -> list[str]:
    """Return the test prompts that are training prompts too."""
    known = set(train)
    return [text for text in test if text in known]
