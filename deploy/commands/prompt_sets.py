"""ddpo prompts: list the prompt sets that there are, and fetch those that others have published, as JSONL."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from ray_ddpo.common.prompt_set import SetName, shipped_prompts
from ray_ddpo.common.prompts import Prompt
from ray_ddpo.common.published_prompts import PUBLISHED, Row
from ray_ddpo.common.suite_prompts import trained_on


def list_sets() -> Iterator[str]:
    """Yield one line a set, and how to use it."""
    for name in get_args(SetName):
        counts = ", ".join(f"{split} {len(shipped_prompts(name, split))}" for split in ("train", "test"))
        yield f'{name:<10} ships      {counts}: [prompts] name = "set", set = "{name}"'
    for name, published in PUBLISHED.items():
        pins = ", ".join(f"{split} ({file.pin})" for split, file in published.files.items())
        yield f"{name:<10} published  {published.about}; licence: {published.licence}; {pins}: ddpo prompts {name}"


def fetch_set(name: str, output: Path) -> Iterator[str]:
    """Download a published set, one JSONL file a split, and yield a line for each file.

    Args:
        name: of the set.
        output: folder of the files `NAME_train.jsonl` and `NAME_test.jsonl`.

    Raises:
        ValueError: there is no such set, its files are there already, or a file cannot be had or is another one.
    """
    if name in get_args(SetName):
        raise ValueError(f'{name!r} ships, so there is nothing to fetch: [prompts] name = "set", set = "{name}"')
    if name not in PUBLISHED:
        raise ValueError(f"{name!r} is no published set of prompts: there are {list(PUBLISHED)}")
    targets = {split: output / f"{name}_{split}.jsonl" for split in PUBLISHED[name].files}
    if there := [str(path) for path in targets.values() if path.exists()]:
        raise ValueError(f"{there[0]} is there already: remove the file, or give another --output")
    downloaded = {split: _checked(file.download()) for split, file in PUBLISHED[name].files.items()}
    train = [row["prompt"] for row in downloaded.get("train", ())]
    output.mkdir(parents=True, exist_ok=True)
    for split, rows in downloaded.items():
        targets[split].write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        both = len(trained_on([row["prompt"] for row in rows], train)) if split == "test" else 0
        overlap = f"; {both} of them are in train, too" if both else ""
        yield f"{targets[split]}: {len(rows)} prompts ({PUBLISHED[name].files[split].pin}){overlap}"


def _checked(rows: list[Row]) -> list[Row]:
    """Check that each row is a prompt with metadata, as a run reads it. Raise ValueError if one is not."""
    for row in rows:
        Prompt(row["prompt"], {key: value for key, value in row.items() if key != "prompt"})
    return rows
