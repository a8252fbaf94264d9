"""What every part of the settings is made of: objects without unknown keys, and values within bounds."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from orchestrator.messages import one_line, shown
from orchestrator.records import CLASS

# Upper bounds are there for mistakes, not for ambition: nothing that is reckoned from them overflows.
MOST = 10**9
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Size = Annotated[float, Field(gt=0, le=MOST, allow_inf_nan=False)]
Lifetime = Annotated[float, Field(ge=0.001, le=100 * 365 * 86400, allow_inf_nan=False)]  # seconds; 100 years
Count = Annotated[int, Field(ge=1, le=MOST)]
Line = Annotated[str, AfterValidator(one_line)]
Word = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(one_line)]  # of an #SBATCH line
FilePath = Annotated[str, Field(max_length=4096), AfterValidator(one_line)]


class Strict(BaseModel):
    """Unknown keys are mistakes, and true is no number."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python and pydantic take true for 1."""
        if isinstance(value, bool) and info.field_name in cls.model_fields:
            kinds = _kinds(cls.model_fields[info.field_name].annotation)
            if kinds & {int, float} and bool not in kinds:
                raise PydanticCustomError("bool_for_number", "input should be a number")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """Every type that is named in it."""
    inner = get_args(annotation)
    return {annotation} if not inner else set().union(*(_kinds(part) for part in inner))


LOGGERS = ("tensorboard", "wandb", "mlflow")


def checked_logger(name: str) -> str:
    """Raises ValueError unless it is a built-in logger's name, or could name a class to import."""
    if name not in LOGGERS and not (len(name) <= 300 and ":" in name and CLASS.fullmatch(name)):
        allowed = f'{", ".join(LOGGERS)} and "package.module:Class"'
        raise ValueError(f"{shown(repr(name))} is no logger; allowed are {allowed}")
    return name


def checked_loggers(names: list[str]) -> list[str]:
    """Raises ValueError if one is named twice: it would write everything twice."""
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{shown(repr(name))} is named {names.count(name)} times; name each logger once")
    return names
