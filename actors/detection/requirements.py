"""What a GenEval prompt asks for: its metadata line, checked (Ghosh et al. 2023)."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Relation = Literal["left of", "right of", "above", "below"]
# The authors' names, in the authors' order.
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
EXAMPLE = '{"tag": "counting", "include": [{"class": "circle", "count": 2}]}'


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Included(_Line):
    """Objects that an image must show."""

    name: str = Field(alias="class", min_length=1)
    count: int = Field(ge=1)
    color: Literal[COLOURS] | None = None  # type: ignore[valid-type]
    position: tuple[Relation, Annotated[int, Field(ge=0)]] | None = None  # relative to an earlier entry of `include`


class Excluded(_Line):
    """Number of objects from which on an image is wrong."""

    name: str = Field(alias="class", min_length=1)
    count: int = Field(ge=1)


class Requirements(_Line):
    """Metadata of a GenEval prompt. All of `include` and none of `exclude` must hold."""

    tag: str  # the category, such as "counting", by which results are grouped
    include: tuple[Included, ...] = Field(min_length=1)
    exclude: tuple[Excluded, ...] = ()

    @model_validator(mode="after")
    def _positions_name_earlier_objects(self) -> "Requirements":
        for index, wanted in enumerate(self.include):
            if wanted.position is not None and wanted.position[1] >= index:
                raise ValueError(
                    f"include.{index}.position names the entry {wanted.position[1]}: it must be an earlier entry"
                )
        return self

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
        said = fault["msg"].removeprefix("Value error, ")
        shown = repr(prompt if len(prompt) <= 200 else f"{prompt[:200]}…")
        raise ValueError(
            f"prompt {shown} has metadata that the reward geneval cannot use: {place}: {said}; it reads GenEval's keys, "
            f"such as {EXAMPLE}"
        ) from None
