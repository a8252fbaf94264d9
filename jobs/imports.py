"""Find the user's modules and the classes named in settings. Does not import torch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from typing import Any

from jobs.errors import JobError


def look_first_in(folders: Iterable[str]) -> None:
    """Prepend these folders to sys.path; folders already on it keep their position."""
    sys.path[:0] = [folder for folder in folders if folder not in sys.path]


def find_class(spec: str, what: str) -> type[Any]:
    """Return the class named by "module:Class". what: prefix of the error message, such as "job mine:Mine".
    Raises JobError if importing the module raises any error, or if the module has no such class."""
    module_name, _, class_name = spec.partition(":")
    try:
        named = getattr(importlib.import_module(module_name), class_name, None)
    except (Exception, SystemExit) as error:  # a user's module can raise anything when it is imported
        raise JobError(f"{what}: {module_name} can't be imported: {type(error).__name__}: {error}") from error
    if not isinstance(named, type):
        raise JobError(f"{what}: {module_name} has no class {class_name}")
    return named


def brings_own_trainer(spec: str) -> bool:
    """Return whether the job's class defines the static method `open_trainer`. Raises JobError like find_class."""
    return hasattr(find_class(spec, f"job {spec}"), "open_trainer")
