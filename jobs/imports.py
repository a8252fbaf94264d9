"""Where the user's own modules are found, and the classes that settings name. Imports no torch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from typing import Any

from jobs.errors import JobError


def look_first_in(folders: Iterable[str]) -> None:
    """Search for modules in these folders before all others; folders that are searched already keep their place."""
    sys.path[:0] = [folder for folder in folders if folder not in sys.path]


def find_class(spec: str, what: str) -> type[Any]:
    """The class that "module:Class" names. what: the start of an error's message, such as "job mine:Mine".
    Raises JobError if the module can't be imported, whatever it raises, or has no such class."""
    module_name, _, class_name = spec.partition(":")
    try:
        named = getattr(importlib.import_module(module_name), class_name, None)
    except (Exception, SystemExit) as error:  # a user's module can raise anything when it is imported
        raise JobError(f"{what}: {module_name} can't be imported: {type(error).__name__}: {error}") from error
    if not isinstance(named, type):
        raise JobError(f"{what}: {module_name} has no class {class_name}")
    return named


def brings_own_trainer(spec: str) -> bool:
    """Whether the job's class has a static method `open_trainer` of its own. Raises JobError as find_class does."""
    return hasattr(find_class(spec, f"job {spec}"), "open_trainer")
