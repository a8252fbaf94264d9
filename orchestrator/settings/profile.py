"""One entry of the cycle as the settings file has it. What needs torch to be checked, the job checks at launch."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import Annotated, Any

from pydantic import Field, field_validator

from orchestrator.settings.explain import shown
from orchestrator.settings.fields import Line, Positive, Strict

# A name of torch's own, or a class to import.
CLASS = re.compile(r"[A-Za-z_]\w*|[A-Za-z_][\w.]*:[A-Za-z_]\w*")
OWN_KEYS = {"lr": "learning_rate", "momentum": "momentum", "weight_decay": "weight_decay"}
LOGGERS = ("tensorboard", "wandb", "mlflow")
EVERY = ("step", "epoch")


class ProfileSettings(Strict):
    """One entry of the cycle."""

    name: Annotated[Line, Field(min_length=1, max_length=100)]
    learning_rate: Positive
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    optimizer: str | None = None
    optimizer_options: dict[str, Any] = Field({})
    schedule: dict[str, Any] | None = None

    @field_validator("optimizer")
    @classmethod
    def _a_class(cls, name: str | None) -> str | None:
        return None if name is None else checked_class(name, '"SGD", "Adam", "AdamW"')

    @field_validator("optimizer_options")
    @classmethod
    def _said_once(cls, options: dict[str, Any]) -> dict[str, Any]:
        for option, key in OWN_KEYS.items():
            if option in options:
                raise ValueError(f"{option!r} is the profile's own {key!r}; give it there")
        return options

    @field_validator("schedule")
    @classmethod
    def _a_schedule(cls, schedule: dict[str, Any] | None) -> dict[str, Any] | None:
        if schedule is None:
            return None
        if "name" not in schedule:
            raise ValueError('"name" is missing; it says which schedule, e.g. {"name": "StepLR", "step_size": 5}')
        checked_class(schedule["name"], '"StepLR", "OneCycleLR", "PiecewiseLinear"')
        if schedule.get("every", EVERY[0]) not in EVERY:
            raise ValueError(f'every: {shown(repr(schedule["every"]))}; allowed are "step" and "epoch"')
        _check_epochs(schedule.get("epochs"))
        return schedule


def checked_class(name: Any, examples: str) -> str:
    """Raises ValueError unless it could name a class of torch's, or one to import."""
    if not isinstance(name, str) or len(name) > 300 or not CLASS.fullmatch(name):
        raise ValueError(f'{shown(repr(name))} names no class; allowed are {examples}, ... and "package.module:Class"')
    return name


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


def _check_epochs(epochs: Any) -> None:
    """A positive number, or (PiecewiseLinear) a list of numbers from 0 on that rises."""
    numbers = epochs if isinstance(epochs, list) else [] if epochs is None else [0, epochs]
    plain = all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers)
    if not plain or any(a >= b for a, b in pairwise(numbers)):
        allowed = "a number above 0, or a list of numbers that rises (PiecewiseLinear)"
        raise ValueError(f"epochs: {shown(repr(epochs))}; allowed is {allowed}")
