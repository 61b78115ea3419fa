"""What holds for every number in a recipe: it is finite, and of a size that a run can use."""

from typing import Any

from annotated_types import Le, Lt
from pydantic import BaseModel, ConfigDict, field_validator

LARGEST = 10**9  # of a number whose field has no upper bound of its own


class Bounded(BaseModel):
    """A table whose keys are known, typed and bounded."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="after")
    @classmethod
    def _has_a_size_that_a_run_can_use(cls, value: Any, info: Any) -> Any:
        bounds = cls.model_fields[info.field_name].metadata
        if any(isinstance(bound, (Le, Lt)) for bound in bounds):
            return value
        if isinstance(value, (int, float)) and abs(value) > LARGEST:
            raise ValueError(f"it must lie between {-LARGEST:,} and {LARGEST:,}")
        return value
