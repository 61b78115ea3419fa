"""Base model of every table and component: numbers are finite and bounded, keys are described by their docstrings."""

from typing import Any

from annotated_types import Le, Lt
from pydantic import BaseModel, ConfigDict, field_validator

from ray_ddpo.common.recipe.allowed_values import allowed, counts

LARGEST = 10**9  # absolute value of a number whose field has no upper bound of its own


class Bounded(BaseModel):
    """Model whose keys are known, typed and bounded. Attribute docstrings are the descriptions of its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_truth_value_in_the_place_of_a_number(cls, value: Any, info: Any) -> Any:
        field = cls.model_fields[info.field_name]
        given = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(each, bool) for each in given) and counts(field.annotation):
            raise ValueError(f"it must be {allowed(field.annotation, field.metadata)}")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _has_a_size_that_a_run_can_use(cls, value: Any, info: Any) -> Any:
        bounds = cls.model_fields[info.field_name].metadata
        if any(isinstance(bound, (Le, Lt)) for bound in bounds):
            return value
        if isinstance(value, (int, float)) and abs(value) > LARGEST:
            raise ValueError(f"it must lie between {-LARGEST:,} and {LARGEST:,}")
        return value


class Table(Bounded):
    """Table of the recipe whose keys are known, typed and bounded."""


def default_values(model: BaseModel) -> dict[str, Any]:
    """Return the default of each field that has one, by name. Those of tables within are returned by their fields."""
    found: dict[str, Any] = {}
    for name, field in type(model).model_fields.items():
        value, default = (
            getattr(model, name),
            None if field.is_required() else field.get_default(call_default_factory=True),
        )
        if isinstance(value, BaseModel) and (field.is_required() or isinstance(default, BaseModel)):
            found[name] = default_values(value)
        elif not field.is_required():
            found[name] = default
    return found
