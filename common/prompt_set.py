"""Sets of prompts that ship with the program, with metadata for the rewards that read text and judge objects."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ray_ddpo.common.prompt_files import PromptFile
from ray_ddpo.common.prompts import PROMPT_LISTS, Prompt, PromptList, read_prompts

SetName = Literal["words", "shapes"]
Split = Literal["train", "test"]


class PromptSet(PromptList):
    """Set of prompts that ships: words to write, for the reward `ocr`, or shapes to draw, for the reward `geneval`.

    Its training prompts are sampled. Its test prompts are other prompts, held out for evaluation.
    """

    set: SetName
    """Name of the set."""

    def sampled(self) -> list[Prompt]:
        return shipped_prompts(self.set, "train")

    def held_out(self) -> list[str]:
        return [prompt.text for prompt in shipped_prompts(self.set, "test")]

    def evaluated(self, texts: Sequence[str] = ()) -> list[Prompt]:
        held_out = shipped_prompts(self.set, "test")
        if not texts:
            return held_out
        known = {prompt.text: prompt for prompt in (*self.sampled(), *held_out)}
        return [known.get(text, Prompt(text)) for text in texts]


def shipped_file(name: SetName, split: Split) -> Path:
    """Return the file of one half of a set."""
    return PROMPT_LISTS / f"{name}_{split}.jsonl"


def shipped_prompts(name: SetName, split: Split) -> list[Prompt]:
    """Return one half of a set, with metadata."""
    return read_prompts(PromptFile(shipped_file(name, split), "prompts.set"))
