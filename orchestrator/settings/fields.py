"""The types of settings: objects that refuse unknown keys, and values with generous limits that catch typos."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from orchestrator.messages import one_line

MOST = 10**9  # small enough that no number computed from such values overflows
Size = Annotated[float, Field(gt=0, le=MOST, allow_inf_nan=False)]
Lifetime = Annotated[float, Field(ge=0.001, le=100 * 365 * 86400, allow_inf_nan=False)]  # seconds; 100 years
Count = Annotated[int, Field(ge=1, le=MOST)]
Word = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(one_line)]  # fits in an #SBATCH line
FilePath = Annotated[str, Field(max_length=4096), AfterValidator(one_line)]


class Strict(BaseModel):
    """An object in the settings. Unknown keys, and true or false instead of a number, are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bool_for_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false for numbers: Python and pydantic would accept them as 1 and 0."""
        if isinstance(value, bool) and info.field_name in cls.model_fields:
            types = _types_in(cls.model_fields[info.field_name].annotation)
            if types & {int, float} and bool not in types:
                raise PydanticCustomError("bool_for_number", "input should be a number")
        return value


def _types_in(annotation: Any) -> set[Any]:
    """Return every type named in an annotation."""
    inner = get_args(annotation)
    return {annotation} if not inner else set().union(*(_types_in(part) for part in inner))
