"""Base model of every table and component: numbers are finite and bounded, keys are described by their docstrings."""

from typing import Any

from annotated_types import Le, Lt
from pydantic import BaseModel, ConfigDict, field_validator

LARGEST = 10**9  # absolute value of a number whose field has no upper bound of its own


class Bounded(BaseModel):
    """Model whose keys are known, typed and bounded. Attribute docstrings are the descriptions of its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="after")
    @classmethod
    def _has_a_size_that_a_run_can_use(cls, value: Any, info: Any) -> Any:
        bounds = cls.model_fields[info.field_name].metadata
        if any(isinstance(bound, (Le, Lt)) for bound in bounds):
            return value
        if isinstance(value, (int, float)) and abs(value) > LARGEST:
            raise ValueError(f"it must lie between {-LARGEST:,} and {LARGEST:,}")
        return value
