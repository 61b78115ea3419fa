"""Where prompts come from: a list that ships with the project, a text file, or a function of the user's."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from common.blame import blamed
from common.named_files import Weights
from common.reading import reading
from common.registry import Entry, Room, import_object

PROMPTS: Room = {
    "animals": "common.prompts:Animals",
    "texts": "common.prompts:Texts",
    "file": "common.prompts:File",
    "function": "common.prompts:Function",
}
PROMPT_LISTS = Path(__file__).parent / "prompt_lists"


@dataclass(frozen=True)
class Prompt:
    """What a picture is asked to show, and whatever its reward needs to know besides."""

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a text that no tokenizer can read. ValueError: it has half of a character."""
        if isinstance(self.text, str) and not self.text.isascii():
            try:
                self.text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"the prompt {self.text!r} is no text that can be encoded: {error.reason}") from error


Draw = Callable[[np.random.Generator], Prompt]


class PromptSource(Entry, ABC):
    """Entry of the room of prompts. Prompts are drawn from a generator given, so a seed fixes their sequence."""

    @abstractmethod
    def load(self) -> Draw:
        """The function that draws one prompt. ValueError: the source is missing or empty."""

    @abstractmethod
    def listed(self) -> list[str] | None:
        """All prompts that are drawn from, in order; None where only drawing tells."""

    def held_out(self) -> list[str]:
        """Prompts of the source that are never drawn, for evaluation."""
        return []

    def needs(self) -> tuple[Weights, ...]:
        """Return the files that `load` reads; none where the prompts ship with the project or stand in the recipe."""
        return ()


def _read_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"prompts.path is {str(path)!r}: there is no such file")
    with reading(f"prompts.path {str(path)!r}"):
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"prompts.path is {str(path)!r}: the file has no prompts; it needs one a line")
    return prompts


def _without(prompts: list[str], left_out: tuple[str, ...]) -> list[str]:
    """ValueError: a prompt to be left out is not there, or none would be left."""
    unknown = [prompt for prompt in left_out if prompt not in prompts]
    if unknown:
        raise ValueError(
            f"prompts.leave_out has {unknown}, which is not among the {len(prompts)} prompts of the source"
        )
    left = [prompt for prompt in prompts if prompt not in left_out]
    if not left:
        raise ValueError(f"prompts.leave_out has all {len(prompts)} prompts of the source: there is nothing to draw")
    return left


def _draw_from(prompts: list[str]) -> Draw:
    return lambda generator: Prompt(prompts[int(generator.integers(len(prompts)))])


class Animals(PromptSource):
    """The 45 animals of the DDPO paper (section 6), by their bare names."""

    leave_out: tuple[str, ...] = ()  # never drawn: for evaluation

    def listed(self) -> list[str]:
        return _without(_read_lines(PROMPT_LISTS / "animals.txt"), self.leave_out)

    def held_out(self) -> list[str]:
        return list(self.leave_out)

    def load(self) -> Draw:
        return _draw_from(self.listed())


class Texts(PromptSource):
    """A few prompts, in the recipe itself."""

    texts: tuple[str, ...] = Field(min_length=1)

    def listed(self) -> list[str]:
        return list(self.texts)

    def load(self) -> Draw:
        return _draw_from(self.listed())


class File(PromptSource):
    """A text file with one prompt a line; empty lines are passed over."""

    path: str
    leave_out: tuple[str, ...] = ()  # never drawn: for evaluation

    def needs(self) -> tuple[Weights, ...]:
        path = Path(self.path).expanduser().absolute()
        return (Weights(str(path.parent), (path.name,), "prompts.path"),)

    def listed(self) -> list[str]:
        return _without(_read_lines(Path(os.path.expanduser(self.path))), self.leave_out)

    def held_out(self) -> list[str]:
        return list(self.leave_out)

    def load(self) -> Draw:
        return _draw_from(self.listed())


class Function(PromptSource):
    """`path` is module:function; the function takes a numpy Generator and returns a text, or (text, metadata)."""

    path: str = Field(pattern=r"^[\w.]+:\w+$")

    def user_modules(self) -> dict[str, str]:
        return {**super().user_modules(), "path": self.path.partition(":")[0]}

    def listed(self) -> None:
        return None

    def load(self) -> Draw:
        function = import_object(self.path, "prompts.path")

        def draw(generator: np.random.Generator) -> Prompt:
            with blamed(f"prompts.path is {self.path!r}: calling it"):
                drawn = function(generator)
            text, metadata = drawn if isinstance(drawn, tuple) else (drawn, {})
            if not isinstance(text, str) or not isinstance(metadata, dict):
                raise ValueError(
                    f"{self.path} returned {drawn!r}: a prompt is a text, or a text and a dict of metadata"
                )
            return Prompt(text, metadata)

        return draw
