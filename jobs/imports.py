"""Where the user's own modules are found, and the classes that settings name. Imports no torch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from typing import Any

from jobs.errors import JobError


def look_first_in(folders: Iterable[str]) -> None:
    """Modules are searched in these folders before all others; those that are searched already stay where they are."""
    sys.path[:0] = [folder for folder in folders if folder not in sys.path]


def find_class(spec: str) -> Any:
    """What "module:Class" names. Raises JobError if the module can't be imported or has no such class."""
    module_name, _, class_name = spec.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except (Exception, SystemExit) as error:  # whatever the user's module does on import
        raise JobError(f"job {spec}: {module_name} can't be imported: {type(error).__name__}: {error}") from error
    if not isinstance(found, type):
        raise JobError(f"job {spec}: {module_name} has no class {class_name}")
    return found


def brings_own_trainer(spec: str) -> bool:
    """Is it no torch job, but one whose class has a static method `open_trainer`? Raises JobError as find_class."""
    return hasattr(find_class(spec), "open_trainer")
