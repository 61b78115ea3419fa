"""Sources of prompts: a list that ships with the project, a file, or the user's function."""

import inspect
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from pydantic import Field, PrivateAttr, model_validator

from ray_ddpo.common.input_images import CONTENT, IMAGE, MASK, check_inputs, content_key, files_of, with_inputs
from ray_ddpo.common.prompt_files import Format, PromptFile
from ray_ddpo.common.prompt_metadata import check_text, json_value
from ray_ddpo.common.recipe.named_files import Weights
from ray_ddpo.common.recipe.registry import Component, Registry, import_object
from ray_ddpo.common.user_code.blame import blamed
from ray_ddpo.common.user_code.by_value import is_by_value, reference, source_of

PROMPTS: Registry = {
    "animals": "ray_ddpo.common.prompts:Animals",
    "texts": "ray_ddpo.common.prompts:Texts",
    "file": "ray_ddpo.common.prompts:File",
    "set": "ray_ddpo.common.prompt_set:PromptSet",
    "function": "ray_ddpo.common.prompts:PromptFunction",
    "preferences": "ray_ddpo.common.preference_prompts:Preferences",
}
PROMPT_LISTS = Path(__file__).parent / "prompt_lists"


@dataclass(frozen=True)
class Prompt:
    """An image's text, and metadata for its reward, in JSON's types."""

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse text that no tokenizer can read, and metadata that JSON cannot represent.

        Raises:
            ValueError: The text has an unpaired surrogate, or metadata has a value that neither file nor service can
                hold.
        """
        if isinstance(self.text, str):
            check_text(self.text, "the prompt")
        if isinstance(self.metadata, dict) and self.metadata:
            object.__setattr__(self, "metadata", json_value(self.metadata, "metadata"))

    @property
    def key(self) -> str:
        """Return what tells this prompt from others: its text and, if it has one, its input image's content."""
        return content_key(self.text, self.metadata)


def metadata_as_json(prompts: Sequence[Prompt]) -> list[str | None]:
    """Return each prompt's metadata as files store it; None if it has none."""
    return [json.dumps(prompt.metadata, ensure_ascii=False) if prompt.metadata else None for prompt in prompts]


def refuse_without_inputs(prompts: Sequence[Prompt], who: str) -> None:
    """Raise ValueError if a prompt has no input image, which `who` reads."""
    for prompt in prompts:
        if IMAGE + CONTENT not in prompt.metadata:  # not IMAGE, which may be a column that says something else
            raise ValueError(
                f"{who} reads each prompt's input image, and {prompt.text!r} has none: give prompts.image_column"
            )


def refuse_more_inputs(prompts: Sequence[Prompt], most: int, who: str) -> None:
    """Raise ValueError if a prompt has more input images than `who` reads."""
    for prompt in prompts:
        if (count := len(files_of(prompt.metadata, IMAGE))) > most:
            raise ValueError(
                f"{who} reads {most} input image{'s' * (most > 1)} a prompt, and {prompt.text!r} has {count}: give it "
                "fewer; families of FLUX.2 and Qwen-Image-Edit-Plus read several, as policy.max_input_images says"
            )


SamplePrompt = Callable[[np.random.Generator], Prompt]


class SampleGroups(ABC):
    """Function that samples one prompt, and has complete groups whose images differ in metadata."""

    @abstractmethod
    def __call__(self, generator: np.random.Generator) -> Prompt:
        """Sample one prompt."""

    @abstractmethod
    def group(self, run_seed: int, number: int) -> tuple[Prompt, ...]:
        """Return the prompts of a group, one per image: a pure function of the run's seed and the group's number.

        Args:
            number: the position of the group in the run, from 0.
        """


class GivenImages(ABC):
    """Images that a sampler reads, in place of denoising."""

    @abstractmethod
    def pixels(self, prompts: tuple[Prompt, ...], size: tuple[int, int]) -> UInt8[np.ndarray, "B H W 3"]:
        """Return the images of prompts, which their metadata names.

        Args:
            size: height and width in pixels.

        Raises:
            ValueError: An image cannot be read.
        """


class PromptSource(Component, ABC):
    """A component that samples prompts. They come from a given generator, so that a seed fixes their sequence."""

    @abstractmethod
    def load(self) -> SamplePrompt:
        """Return the function that samples one prompt.

        Raises:
            ValueError: The source is missing or empty.
        """

    @abstractmethod
    def listed(self) -> list[str] | None:
        """Return all prompts that can be sampled, in order; None if that cannot be known."""

    def held_out(self) -> list[str]:
        """Return prompts of the source that are never sampled, for evaluation."""
        return []

    def evaluated(self, texts: Sequence[str] = ()) -> list[Prompt]:
        """Return prompts with metadata for evaluation: `texts`, or the held-out ones, or all; none if unknown."""
        return [Prompt(text) for text in texts or self.held_out() or self.listed() or ()]

    def needs(self) -> tuple[Weights, ...]:
        """Return the files that `load` reads; none if the prompts ship with the project or are in the recipe."""
        return ()

    def check(self) -> None:
        """Check before a run starts what `load` does not read. Raise ValueError if the run would fail. By default nothing."""

    @property
    def input_columns(self) -> dict[str, str]:
        """Return the columns of the prompts' input images, `image` and `mask`; empty if prompts are texts alone."""
        return {}

    def input_contents(self) -> list[str]:
        """Return the SHA-256 of all input images and masks, in the order of the prompts; by default there are none."""
        return []

    @property
    def gives_images(self) -> bool:
        """Return whether the source gives images, which are then trained on in place of sampled ones."""
        return False

    def load_images(self) -> GivenImages:
        """Return the images of a source that `gives_images`.

        Raises:
            ValueError: The source is missing or empty.
        """
        raise NotImplementedError(f"{type(self).__name__} gives no images")


def _without(prompts: list[Prompt], left_out: tuple[str, ...]) -> list[Prompt]:
    """Return the prompts that are not left out. Raise ValueError if one does not exist, or if none would remain."""
    texts = {prompt.text for prompt in prompts}
    if unknown := [prompt for prompt in left_out if prompt not in texts]:
        raise ValueError(
            f"prompts.held_out_prompts has {unknown}, which is not among the {len(prompts)} prompts of the source"
        )
    remaining = [prompt for prompt in prompts if prompt.text not in left_out]
    if not remaining:
        raise ValueError(
            f"prompts.held_out_prompts has all {len(prompts)} prompts of the source: there is nothing to sample"
        )
    return remaining


def _rows_of(text: str, prompts: list[Prompt]) -> list[Prompt]:
    """Return the distinct prompts with this text. They may differ in metadata."""
    found: list[Prompt] = []
    for prompt in prompts:
        if prompt.text == text and prompt not in found:
            found.append(prompt)
    return found


def read_prompts(file: PromptFile, input_columns: Mapping[str, str] | None = None) -> list[Prompt]:
    """Return the prompts of a file with their metadata, in order.

    Args:
        file: the file.
        input_columns: columns of the paths of input images, which begin in the file's folder.

    Raises:
        ValueError: The file cannot be used. One line names the recipe's key, the file, and the line or row.
    """
    prompts = []
    for where, text, metadata in file.rows():
        try:
            if input_columns:
                metadata = with_inputs(metadata, input_columns, file.path.parent)
            prompts.append(Prompt(text, metadata))
        except ValueError as error:
            raise file.fault(str(error), where) from None
    return prompts


class PromptList(PromptSource):
    """Source that samples from a list of prompts."""

    @abstractmethod
    def sampled(self) -> list[Prompt]:
        """Return the prompts that are sampled in training, in order."""

    def listed(self) -> list[str]:
        return [prompt.text for prompt in self.sampled()]

    def load(self) -> SamplePrompt:
        prompts = self.sampled()
        return lambda generator: prompts[int(generator.integers(len(prompts)))]


class Animals(PromptList):
    """The 45 animals of the DDPO paper (section 6), by their names alone."""

    held_out_prompts: tuple[str, ...] = ()
    """Prompts that are held out: never sampled in training, used for evaluation."""

    def sampled(self) -> list[Prompt]:
        return _without(read_prompts(PromptFile(PROMPT_LISTS / "animals.txt", "prompts.path")), self.held_out_prompts)

    def held_out(self) -> list[str]:
        return list(self.held_out_prompts)


class Texts(PromptList):
    """A few prompts, in the recipe itself."""

    texts: tuple[str, ...] = Field(min_length=1)
    """The prompts."""

    def sampled(self) -> list[Prompt]:
        return [Prompt(text) for text in self.texts]


class File(PromptList):
    """File of prompts: text with one per line, JSONL, JSON, CSV, TSV or parquet. Further columns are metadata."""

    path: str
    """File of the prompts."""
    format: Format | None = None
    """Format of both files. By default it follows from the ending of each file's name."""
    column: str | None = None
    """Column of the prompts. By default the only one, or the one called `prompt`, `text` or `caption`."""
    held_out_prompts: tuple[str, ...] = ()
    """Prompts that are held out: never sampled in training, used for evaluation."""
    held_out_path: str | None = None
    """Second file, whose prompts are used for evaluation only."""
    image_column: str | None = None
    """Column with the path of the image that a prompt edits, or a list of paths. By default prompts are texts alone."""
    mask_column: str | None = None
    """Column with the path of the mask: white where the image may change."""

    @model_validator(mode="after")
    def _a_mask_is_of_an_image(self) -> "File":
        if self.mask_column is not None and self.image_column in (None, self.mask_column):
            raise ValueError(
                f"mask_column is {self.mask_column!r} and image_column {self.image_column!r}: a mask is of an image, so "
                "give the column of each"
            )
        return self

    @model_validator(mode="after")
    def _prompts_are_held_out_in_one_way(self) -> "File":
        if self.held_out_prompts and self.held_out_path is not None:
            raise ValueError(
                f"held_out_path is {self.held_out_path!r} and held_out_prompts has {len(self.held_out_prompts)} "
                "prompts: give one of them"
            )
        return self

    def needs(self) -> tuple[Weights, ...]:
        files = {"prompts.path": self.path, "prompts.held_out_path": self.held_out_path}
        paths = {key: Path(os.path.expanduser(file)).absolute() for key, file in files.items() if file is not None}
        return tuple(Weights(str(path.parent), (path.name,), key) for key, path in paths.items())

    @property
    def input_columns(self) -> dict[str, str]:
        columns = {IMAGE: self.image_column, MASK: self.mask_column}
        return {name: column for name, column in columns.items() if column is not None}

    def input_contents(self) -> list[str]:
        prompts = [*self._all(), *self._held_out()] if self.input_columns else []
        files = [file for prompt in prompts for name in self.input_columns for file in files_of(prompt.metadata, name)]
        return [content for _, content in files]

    def check(self) -> None:
        if self.input_columns:
            check_inputs([prompt.metadata for prompt in self._all()], "prompts.path")
            check_inputs([prompt.metadata for prompt in self._held_out()], "prompts.held_out_path")

    def _read(self, path: str, key: str) -> list[Prompt]:
        file = PromptFile(Path(os.path.expanduser(path)), key, self.format, self.column)
        return read_prompts(file, self.input_columns)

    def _all(self) -> list[Prompt]:
        return self._read(self.path, "prompts.path")

    def _held_out(self) -> list[Prompt]:
        """Return the prompts that are never sampled, each with its metadata; a prompt with several rows, with each."""
        if self.held_out_path is not None:
            return self._read(self.held_out_path, "prompts.held_out_path")
        every = self._all() if self.held_out_prompts else []
        return [prompt for text in dict.fromkeys(self.held_out_prompts) for prompt in _rows_of(text, every)]

    def sampled(self) -> list[Prompt]:
        return _without(self._all(), self.held_out_prompts)

    def held_out(self) -> list[str]:
        return [prompt.text for prompt in self._held_out()]

    def evaluated(self, texts: Sequence[str] = ()) -> list[Prompt]:
        held_out, every = self._held_out(), self._all()
        if not texts:
            return held_out or every
        rows = {text: _rows_of(text, held_out) or _rows_of(text, every) for text in texts}
        if self.input_columns and (unknown := [text for text in texts if not rows[text]]):
            raise ValueError(
                f"evaluation.prompts has {unknown}, which is no prompt of {self.path} and so has no input image: add it "
                "to prompts.held_out_path with its image"
            )
        found = [rows[text] or [Prompt(text)] for text in texts]
        return [prompt for rows in found for prompt in rows]


class PromptFunction(PromptSource):
    """Function of your own, called with a numpy Generator. It returns a text, or a pair of text and metadata.

    A function that no module holds, such as a lambda, is handed over by `PromptFunction.of`.
    """

    path: str = Field(pattern=r"^([\w.]+:\w+|<python>:.+)$")
    """The function, as `module:function`."""
    _given: Callable[..., Any] | None = PrivateAttr(default=None)

    @classmethod
    def of(cls, function: Callable[..., Any]) -> "PromptFunction":
        """Make a function's prompt source, by path if it can be imported. Raise ValueError if it takes no generator."""
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
