"""Where prompts come from: a list that ships with the project, a file, or a function of the user's."""

import inspect
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, PrivateAttr, model_validator

from ray_ddpo.common.prompt_files import Format, PromptFile
from ray_ddpo.common.recipe.named_files import Weights
from ray_ddpo.common.recipe.registry import Component, Registry, import_object
from ray_ddpo.common.user_code.blame import blamed
from ray_ddpo.common.user_code.by_value import is_by_value, reference, source_of

PROMPTS: Registry = {
    "animals": "ray_ddpo.common.prompts:Animals",
    "texts": "ray_ddpo.common.prompts:Texts",
    "file": "ray_ddpo.common.prompts:File",
    "function": "ray_ddpo.common.prompts:Function",
}
PROMPT_LISTS = Path(__file__).parent / "prompt_lists"


@dataclass(frozen=True)
class Prompt:
    """What an image is asked to show, and whatever its reward needs to know besides: values that JSON has."""

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a text that no tokenizer can read, and metadata that JSON has no value for.

        Raises:
            ValueError: the text has half of a character, or the metadata is named that no file and no service could hold.
        """
        if isinstance(self.text, str):
            _check_text(self.text, "the prompt")
        if isinstance(self.metadata, dict) and self.metadata:
            object.__setattr__(self, "metadata", _json_value(self.metadata, "metadata"))


def metadata_as_json(prompts: Sequence[Prompt]) -> list[str | None]:
    """Return each prompt's metadata as files hold it; None where it has none."""
    return [json.dumps(prompt.metadata, ensure_ascii=False) if prompt.metadata else None for prompt in prompts]


def _check_text(text: str, what: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} {text!r} is no text that can be encoded: {error.reason}") from error


def _json_value(value: Any, place: str) -> Any:
    """Return the value as JSON gives it back: tuples as lists, numpy's numbers as Python's. ValueError: JSON has none."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, dict):
        if other := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"{place} has the key {other[0]!r}: a key must be a text")
        for key in value:
            _check_text(key, f"a key of {place}")
        return {key: _json_value(item, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item, f"{place}.{index}") for index, item in enumerate(value)]
    if isinstance(value, str):
        _check_text(value, place)
    elif not (value is None or isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))):
        kind = "" if isinstance(value, float) else f", of type {type(value).__name__}"
        raise ValueError(
            f"{place} is {str(value)[:40]!r}{kind}: a prompt's metadata is what JSON holds: texts, finite numbers, true, "
            "false, null, lists and objects"
        )
    return value


SamplePrompt = Callable[[np.random.Generator], Prompt]


class PromptSource(Component, ABC):
    """Component of the registry of prompts. Prompts are sampled from a generator given, so a seed fixes their sequence."""

    @abstractmethod
    def load(self) -> SamplePrompt:
        """The function that samples one prompt. ValueError: the source is missing or empty."""

    @abstractmethod
    def listed(self) -> list[str] | None:
        """All prompts that are sampled from, in order; None where only sampling tells."""

    def held_out(self) -> list[str]:
        """Prompts of the source that are never sampled, for evaluation."""
        return []

    def evaluated(self, texts: Sequence[str] = ()) -> list[Prompt]:
        """Return prompts for evaluation with metadata: `texts`, else those held out, else all; none if only sampling tells."""
        return [Prompt(text) for text in texts or self.held_out() or self.listed() or ()]

    def needs(self) -> tuple[Weights, ...]:
        """Return the files that `load` reads; none where the prompts ship with the project or stand in the recipe."""
        return ()


def _without(prompts: list[Prompt], left_out: tuple[str, ...]) -> list[Prompt]:
    """ValueError: a prompt to be left out is not there, or none would be left."""
    texts = {prompt.text for prompt in prompts}
    unknown = [prompt for prompt in left_out if prompt not in texts]
    if unknown:
        raise ValueError(
            f"prompts.leave_out has {unknown}, which is not among the {len(prompts)} prompts of the source"
        )
    left = [prompt for prompt in prompts if prompt.text not in left_out]
    if not left:
        raise ValueError(f"prompts.leave_out has all {len(prompts)} prompts of the source: there is nothing to sample")
    return left


def _texts(prompts: list[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


def _draw_from(prompts: list[Prompt]) -> SamplePrompt:
    return lambda generator: prompts[int(generator.integers(len(prompts)))]


def _rows_of(text: str, prompts: list[Prompt]) -> list[Prompt]:
    """Return the prompts of a text, which may have several rows; those that are equal once."""
    found: list[Prompt] = []
    for prompt in prompts:
        if prompt.text == text and prompt not in found:
            found.append(prompt)
    return found


def read_prompts(file: PromptFile) -> list[Prompt]:
    """Return the prompts of a file with their metadata, in order.

    Raises:
        ValueError: the file cannot be used. One line names the recipe's key, the file, and the line or row.
    """
    prompts = []
    for where, text, metadata in file.rows():
        try:
            prompts.append(Prompt(text, metadata))
        except ValueError as error:
            raise file.fault(str(error), where) from None
    return prompts


class Animals(PromptSource):
    """The 45 animals of the DDPO paper (section 6), by their bare names."""

    leave_out: tuple[str, ...] = ()  # never sampled: for evaluation

    def _prompts(self) -> list[Prompt]:
        return _without(read_prompts(PromptFile(PROMPT_LISTS / "animals.txt", "prompts.path")), self.leave_out)

    def listed(self) -> list[str]:
        return _texts(self._prompts())

    def held_out(self) -> list[str]:
        return list(self.leave_out)

    def load(self) -> SamplePrompt:
        return _draw_from(self._prompts())


class Texts(PromptSource):
    """A few prompts, in the recipe itself."""

    texts: tuple[str, ...] = Field(min_length=1)

    def listed(self) -> list[str]:
        return list(self.texts)

    def load(self) -> SamplePrompt:
        return _draw_from([Prompt(text) for text in self.texts])


class File(PromptSource):
    """A file of prompts: text with one a line, JSONL, JSON, CSV, TSV or parquet. Columns beside the prompt are metadata."""

    path: str
    format: Format | None = None  # how both files are read; none: by the ending of each file's name
    column: str | None = None  # that has the prompts; none: the only one, or the one called prompt, text or caption
    leave_out: tuple[str, ...] = ()  # never sampled: for evaluation
    held_out_path: str | None = None  # a second file, of prompts for evaluation

    @model_validator(mode="after")
    def _prompts_are_held_out_in_one_way(self) -> "File":
        if self.leave_out and self.held_out_path is not None:
            raise ValueError(
                f"held_out_path is {self.held_out_path!r} and leave_out has {len(self.leave_out)} prompts: give one of them"
            )
        return self

    def needs(self) -> tuple[Weights, ...]:
        files = {"prompts.path": self.path, "prompts.held_out_path": self.held_out_path}
        paths = {key: Path(file).expanduser().absolute() for key, file in files.items() if file is not None}
        return tuple(Weights(str(path.parent), (path.name,), key) for key, path in paths.items())

    def _read(self, path: str, key: str) -> list[Prompt]:
        return read_prompts(PromptFile(Path(os.path.expanduser(path)), key, self.format, self.column))

    def _all(self) -> list[Prompt]:
        return self._read(self.path, "prompts.path")

    def _held_out(self) -> list[Prompt]:
        """Return the prompts that are never sampled, each with its metadata; a prompt of several rows with each of them."""
        if self.held_out_path is not None:
            return self._read(self.held_out_path, "prompts.held_out_path")
        every = self._all() if self.leave_out else []
        return [prompt for text in dict.fromkeys(self.leave_out) for prompt in _rows_of(text, every)]

    def listed(self) -> list[str]:
        return _texts(_without(self._all(), self.leave_out))

    def held_out(self) -> list[str]:
        return _texts(self._held_out())

    def evaluated(self, texts: Sequence[str] = ()) -> list[Prompt]:
        held_out, every = self._held_out(), self._all()
        if not texts:
            return held_out or every
        found = [_rows_of(text, held_out) or _rows_of(text, every) or [Prompt(text)] for text in texts]
        return [prompt for rows in found for prompt in rows]

    def load(self) -> SamplePrompt:
        return _draw_from(_without(self._all(), self.leave_out))


class Function(PromptSource):
    """`path` is module:function; the function takes a numpy Generator and returns a text, or (text, metadata).

    A function that no module holds, such as a lambda, is handed over by `Function.of`.
    """

    path: str = Field(pattern=r"^([\w.]+:\w+|<python>:.+)$")
    _given: Callable[..., Any] | None = PrivateAttr(default=None)

    @classmethod
    def of(cls, function: Callable[..., Any]) -> "Function":
        """Make the prompt source of a Python function. If its module can be imported, only its path is kept.

        Raises:
            ValueError: the function takes no generator.
        """
        try:
            inspect.signature(function).bind(None)
        except TypeError:
            raise ValueError(
                f"prompts= is a function that takes {inspect.signature(function)}: it is called with a numpy Generator, so that "
                "the seed fixes the prompts: def sample(generator): return texts[generator.integers(len(texts))]"
            ) from None
        source = cls(path=reference(function))
        if is_by_value(source.path):
            source._given = function
        return source

    def user_modules(self) -> dict[str, str]:
        return {**super().user_modules(), **({} if is_by_value(self.path) else {"path": self.path.partition(":")[0]})}

    def user_texts(self) -> dict[str, str]:
        return {**super().user_texts(), **({"path": source_of(self._given)} if self._given else {})}

    def listed(self) -> None:
        return None

    def load(self) -> SamplePrompt:
        missing = self._given is None and is_by_value(self.path)
        function = self._given or (None if missing else import_object(self.path, "prompts.path"))
        who = f"prompts={self.path.partition(':')[2]}" if self._given else f"prompts.path is {self.path!r}"

        def sample(generator: np.random.Generator) -> Prompt:
            if function is None:  # not earlier: images of other prompts can be sampled without
                raise ValueError(
                    f"{who}: this function was handed to train() by a Python program, and no file holds it: hand it over again "
                    "with train(…, prompts=…, resume=True)"
                )
            with blamed(f"{who}: calling it"):
                sampled = function(generator)
            text, metadata = sampled if isinstance(sampled, tuple) else (sampled, {})
            if not isinstance(text, str) or not isinstance(metadata, dict):
                raise ValueError(
                    f"{self.path} returned {sampled!r}: a prompt is a text, or a text and a dict of metadata"
                )
            return Prompt(text, metadata)

        return sample
