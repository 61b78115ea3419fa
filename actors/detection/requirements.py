"""What a GenEval prompt asks for: its metadata line, checked (Ghosh et al. 2023)."""

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

Relation = Literal["left of", "right of", "above", "below"]
# The authors' names, in the authors' order.
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
EXTRA = "Extra inputs are not permitted"  # in pydantic's words
EXAMPLE = '{"tag": "counting", "include": [{"class": "circle", "count": 2}]}'


Count = Annotated[int, Field(ge=1, strict=True)]  # true is no number


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")  # a misspelt key would not be asked for


class Included(_Line):
    """Objects that an image must show."""

    name: str = Field(alias="class", min_length=1)
    count: Count
    color: Literal[COLOURS] | None = None  # type: ignore[valid-type]
    position: tuple[Relation, Annotated[int, Field(ge=0)]] | None = None  # relative to an earlier entry of `include`


class Excluded(_Line):
    """Number of objects from which on an image is wrong."""

    name: str = Field(alias="class", min_length=1)
    count: Count


class Requirements(_Line):
    """Metadata of a GenEval prompt. All of `include` and none of `exclude` must hold."""

    model_config = ConfigDict(extra="ignore")  # a prompt may have metadata for other rewards

    tag: str  # the category, such as "counting", by which results are grouped
    include: tuple[Included, ...] = Field(min_length=1)
    exclude: Annotated[tuple[Excluded, ...], BeforeValidator(lambda given: given or ())] = ()  # null in tables

    @model_validator(mode="before")
    @classmethod
    def _no_key_is_misspelt(cls, given: dict[str, Any]) -> dict[str, Any]:
        for key in given.keys() - set(cls.model_fields):
            if near := difflib.get_close_matches(key.lower(), ("include", "exclude"), n=1, cutoff=0.8):
                raise ValueError(f"{key!r} is not a key of GenEval, {near[0]!r} is")
        return given

    @model_validator(mode="after")
    def _positions_name_earlier_objects(self) -> "Requirements":
        for index, wanted in enumerate(self.include):
            if wanted.position is not None and wanted.position[1] >= index:
                raise ValueError(
                    f"include.{index}.position names the entry {wanted.position[1]}: it must be an earlier entry"
                )
        return self

    @model_validator(mode="after")
    def _can_be_met(self) -> "Requirements":
        """Refuse a class twice, whose objects cannot be told apart, and a count that is excluded."""
        names = [wanted.name for wanted in self.include]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(
                f"include names the class {twice[0]!r} twice: every entry counts all objects of its class, so none can "
                "be of another colour or place; give each class once"
            )
        for wanted in self.include:
            for excluded in self.exclude:
                if excluded.name == wanted.name and excluded.count <= wanted.count:
                    raise ValueError(
                        f"exclude forbids {excluded.count} or more of {wanted.name!r}, and include asks for "
                        f"{wanted.count}: no image is right"
                    )
        return self

    @property
    def most(self) -> int:
        """The highest count that decides."""
        return max(each.count for each in (*self.include, *self.exclude))

    @property
    def classes(self) -> set[str]:
        """Names of all objects that decide."""
        return {wanted.name for wanted in (*self.include, *self.exclude)}


def requirements(prompt: str, metadata: Mapping[str, Any]) -> Requirements:
    """Return what a prompt asks for. Raise ValueError, with the prompt and the key, if its metadata do not say it."""
    try:
        return Requirements.model_validate(dict(metadata))
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"])) or "the line"
        said = fault["msg"].removeprefix("Value error, ").replace(EXTRA, "this is not a key that is known")
        came = "" if fault["type"] in ("missing", "value_error", "extra_forbidden") else f" is {fault['input']!r:.60}"
        shown = repr(prompt if len(prompt) <= 200 else f"{prompt[:200]}…")
        raise ValueError(
            f"prompt {shown} has metadata that the reward geneval cannot use: {place}{came}: {said}; it reads GenEval's keys, "
            f"such as {EXAMPLE}"
        ) from None
