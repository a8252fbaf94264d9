"""What the settings say about training: the profiles of the cycle, and the metric that models are compared by."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from orchestrator.messages import one_line, shown

# A torch class such as "SGD", or a class to import such as "package.module:Class".
CLASS = re.compile(r"[A-Za-z_]\w*|[A-Za-z_][\w.]*:[A-Za-z_]\w*")
OWN_KEYS = {"lr": "learning_rate", "momentum": "momentum", "weight_decay": "weight_decay"}


def _not_a_bool(value: Any) -> Any:
    """Reject true and false, which Python and pydantic would accept as 1 and 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("bool_for_number", "input should be a number")
    return value


Number = Annotated[float, BeforeValidator(_not_a_bool)]
Line = Annotated[str, AfterValidator(one_line), Field(min_length=1, max_length=100)]


Times = Annotated[int, BeforeValidator(_not_a_bool), Field(ge=1, le=10**9)]


@dataclass(frozen=True, slots=True)
class GradientClip:
    """A limit for the gradients of a step: of their norm over all parameters, or of each value."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    norm: Annotated[Number, Field(gt=0, allow_inf_nan=False)] | None = None
    value: Annotated[Number, Field(gt=0, allow_inf_nan=False)] | None = None

    def __post_init__(self) -> None:
        if (self.norm is None) == (self.value is None):
            raise ValueError('give one of "norm" and "value", such as {"norm": 1.0}')


def _as_norm(clip: Any) -> Any:
    """Convert a number, as users write it, to the limit of the norm."""
    return {"norm": clip} if isinstance(clip, int | float) and not isinstance(clip, bool) else clip


@dataclass(frozen=True, slots=True)
class Profile:
    """One item of the cycle: the hyperparameters of a chunk. The launch checks the values that only torch can check."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Line
    learning_rate: Annotated[Number, Field(gt=0, allow_inf_nan=False)]
    momentum: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[Number, Field(ge=0, allow_inf_nan=False)] = 0.0
    optimizer: str | None = None  # None: the job's default
    optimizer_options: dict[str, Any] = field(default_factory=dict, hash=False)
    schedule: dict[str, Any] | None = field(default=None, hash=False)  # None: a constant learning rate
    gradient_clip: Annotated[GradientClip | None, BeforeValidator(_as_norm)] = None
    accumulate: Times = 1  # batches whose gradients are averaged for one optimizer step
    batch_size: Times | None = None  # None: max_batch_size
    epochs: Times | None = None  # of a chunk; None: epochs_per_chunk
    params: dict[str, Any] = field(default_factory=dict, hash=False)  # the job's own, as Job.profile.params

    @field_validator("optimizer")
    @classmethod
    def _check_optimizer(cls, name: str | None) -> str | None:
        return None if name is None else checked_class(name, '"SGD", "Adam", "AdamW"')

    @field_validator("optimizer_options")
    @classmethod
    def _check_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        for option, key in OWN_KEYS.items():
            if option in options:
                raise ValueError(f"{option!r} is the profile's own {key!r}; give it there")
        return options

    @field_validator("schedule")
    @classmethod
    def _check_schedule(cls, schedule: dict[str, Any] | None) -> dict[str, Any] | None:
        if schedule is None:
            return None
        _check_warmup(schedule.get("warmup"))
        if "name" not in schedule:
            if set(schedule) == {"warmup"}:  # then the learning rate stays constant
                return schedule
            raise ValueError('"name" is missing; it says which schedule, e.g. {"name": "StepLR", "step_size": 5}')
        checked_class(schedule["name"], '"StepLR", "OneCycleLR", "PiecewiseLinear"')
        if schedule.get("every", "step") not in ("step", "epoch"):
            raise ValueError(f'every: {shown(repr(schedule["every"]))}; allowed: "step" and "epoch"')
        _check_epochs(schedule.get("epochs"))
        return schedule


def checked_class(name: Any, examples: str) -> str:
    """Return `name` if it is a torch class name or "package.module:Class"; otherwise raise ValueError."""
    if not isinstance(name, str) or len(name) > 300 or not CLASS.fullmatch(name):
        raise ValueError(
            f'{shown(repr(name))} is not the name of a class; allowed: {examples}, ... and "package.module:Class"'
        )
    return name


def _check_epochs(epochs: Any) -> None:
    """Raise ValueError unless `epochs` is None, a positive number or, for PiecewiseLinear, an increasing list."""
    numbers = epochs if isinstance(epochs, list) else [] if epochs is None else [0, epochs]
    plain = all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers)
    if not plain or any(a >= b for a, b in pairwise(numbers)):
        allowed = "a number above 0, or an increasing list of numbers (PiecewiseLinear)"
        raise ValueError(f"epochs: {shown(repr(epochs))}; allowed: {allowed}")


def _check_warmup(warmup: Any) -> None:
    """Raise ValueError unless `warmup` is None, a number of epochs above 0, or {"steps": a whole number above 0}."""
    if warmup is None:
        return
    steps = isinstance(warmup, dict) and set(warmup) == {"steps"}
    value = warmup["steps"] if steps else warmup
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value <= 0 or (steps and not isinstance(value, int)):
        raise ValueError(
            f'warmup: {shown(repr(warmup))}; allowed: a number of epochs above 0, such as 0.5, and {{"steps": 100}}'
        )


MODES: Mapping[str, Literal["max", "min"]] = {"accuracy": "max", "loss": "min"}


@dataclass(frozen=True, slots=True)
class Metric:
    """The metric that ranks the entries of the board. Raises ValueError if it has no mode and none is known for it."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Line = "accuracy"
    mode: Literal["max", "min"] = None  # type: ignore[assignment]  # filled in below; None is never left

    def __post_init__(self) -> None:
        if self.mode is None:
            if self.name not in MODES:
                raise ValueError(
                    f'the metric "{shown(self.name)}" has no "mode"; add "mode": "min" if a lower value is '
                    'better, "max" if a higher one is'
                )
            object.__setattr__(self, "mode", MODES[self.name])

    def key(self, score: float | None) -> float:
        """Convert a score so that higher is better; -inf for a score that is None or not finite."""
        if score is None or not math.isfinite(score):
            return -math.inf
        return score if self.mode == "max" else -score

    def better(self, score: float | None, than: float | None) -> bool:
        """Is the score strictly better? A tie is not an improvement."""
        return self.key(score) > self.key(than)
