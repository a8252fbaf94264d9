"""Find the user's modules and the classes named in settings. Does not import torch."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from jobs.errors import JobError
from orchestrator.messages import described

# Modules that a file of the same name in the user's folder must not hide: orch's packages, Python's own modules and the
# libraries that orch imports. A random.py or a torch.py, for example, would break torch or Python itself.
ORCH = frozenset({"jobs", "orchestrator"})
LIBRARIES = frozenset({
    "torch", "torchvision", "numpy", "PIL", "submitit", "cloudpickle", "sqlalchemy", "filelock", "pydantic",
    "pydantic_core", "typer", "click", "rich", "psutil", "psycopg", "sklearn", "scipy", "tensorboard", "tenacity",
    "wandb", "mlflow",
})  # fmt: skip
_users_folders: list[str] = []  # those that look_first_in has prepended to sys.path


class _NotHidden:
    """Finds the modules above outside the user's folders."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if path is not None or not _is_taken(name):
            return None
        return PathFinder.find_spec(name, [folder for folder in sys.path if folder not in _users_folders])


def _is_taken(name: str) -> bool:
    return name in ORCH or name in LIBRARIES or name in sys.stdlib_module_names


def look_first_in(folders: Iterable[str]) -> None:
    """Prepend these folders to sys.path; folders already on it keep their position. Modules there hide installed ones
    of the same name, except those that orch and Python need."""
    new = [folder for folder in folders if folder not in sys.path]
    sys.path[:0] = new
    _users_folders.extend(new)
    if _NotHidden not in sys.meta_path:
        place = sys.meta_path.index(PathFinder) if PathFinder in sys.meta_path else len(sys.meta_path)
        sys.meta_path.insert(place, _NotHidden)


def start_in(folders: Sequence[str]) -> None:
    """Make the folder of the launch the working folder, wherever this process was started from."""
    with suppress(OSError):  # the folder does not exist any more
        os.chdir(folders[0] if folders else ".")


@contextmanager
def working_folder_kept() -> Iterator[None]:
    """Undo a change of the working folder by user code in the block, so that relative paths keep their meaning."""
    had = None
    with suppress(OSError):  # it has been deleted
        had = os.getcwd()
    try:
        yield
    finally:
        if had is not None:
            with suppress(OSError):
                os.chdir(had)


def find_class(spec: str, what: str) -> type[Any]:
    """Return the class named by "module:Class". what: prefix of the error message, such as "job mine:Mine".
    Raises JobError if importing the module raises any error, or if the module has no such class."""
    module_name, _, class_name = spec.partition(":")
    try:
        with working_folder_kept():
            named = getattr(importlib.import_module(module_name), class_name, None)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a user's module can raise anything when it is imported
        advice = _rename(module_name) or _rename(getattr(error, "name", None))
        raise JobError(f"{what}: {module_name} can't be imported: {described(error)}{advice}") from error
    if not isinstance(named, type):
        raise JobError(f"{what}: {module_name} has no class {class_name}{_rename(module_name)}")
    return named


def _rename(module: str | None) -> str:
    """Return an advice if a file of the user has the name of a module that orch or Python needs; else ""."""
    name = (module or "").partition(".")[0]
    folders = [folder for folder in _users_folders if folder in sys.path]
    paths = [Path(folder, file) for folder in folders for file in (name, f"{name}.py")]
    found = next((path for path in paths if name and path.exists()), None)
    if found is None or not _is_taken(name):
        return ""
    whose = "orch has a package" if name in ORCH else "Python or a library of orch has a module"
    return f". {found} can't be imported, because {whose} named {name}, which is used instead; rename {found.name}"


def brings_own_trainer(spec: str) -> bool:
    """Return whether the job's class defines the static method `open_trainer`. Raises JobError like find_class."""
    return hasattr(find_class(spec, f"job {spec}"), "open_trainer")
