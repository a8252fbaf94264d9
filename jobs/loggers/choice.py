"""From the names in the settings to loggers. Their libraries are imported by their own threads, not here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jobs.errors import JobError
from jobs.loggers.logger import Logger, Place
from jobs.loggers.observer import Observer, Unobserved
from jobs.loggers.recorder import Recorder, tell_tests
from orchestrator.records import LockKind

# Class, package that it needs, and what installs that.
BUILT_IN = {
    "tensorboard": ("jobs.loggers.tensorboard:TensorBoard", "tensorboard", "tensorboard"),
    "wandb": ("jobs.loggers.wandb:WeightsAndBiases", "wandb", "'orch[wandb]'"),
    "mlflow": ("jobs.loggers.mlflow:MLflow", "mlflow", "'orch[mlflow]'"),
}


def check_loggers(names: Iterable[str]) -> None:
    """Raises JobError for a logger that can't work here: an extra that is not installed, a class that is none."""
    for name in names:
        if name in BUILT_IN:
            _, package, install = BUILT_IN[name]
            if find_spec(package) is None:
                raise JobError(
                    f"loggers: {name!r} needs the package {package}, which is not installed here. Say: pip install "
                    f'{install}; or take {name!r} out of "loggers"'
                )
        else:
            find_logger(name)


def find_logger(name: str) -> type[Logger]:
    """The class of a built-in logger, or of the user's own, which "module:Class" names. Raises JobError."""
    spec = BUILT_IN[name][0] if name in BUILT_IN else name
    module_name, _, class_name = spec.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name or " ", None)
    except (Exception, SystemExit) as error:  # whatever the user's module does on import
        raise JobError(
            f"loggers: {name!r}: {module_name} can't be imported: {type(error).__name__}: {error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Logger)):
        raise JobError(
            f"loggers: {name!r} is no logger: {module_name} has no class {class_name!r} that is derived from "
            f'jobs.loggers.Logger; allowed are {", ".join(BUILT_IN)} and "module:Class" with such a class'
        )
    return found


def makers(settings: Mapping[str, Any], run_folder: Path) -> dict[str, Callable[[], Logger]]:
    lock: LockKind = "flock" if settings["lock"] == "flock" else "soft"  # "auto": it was not proven that flock holds
    place = Place(settings["name"], run_folder / "logs", lock)
    return {name: partial(_make, name, place) for name in settings["loggers"]}


def _make(name: str, place: Place) -> Logger:
    return find_logger(name)(place)


def log_tests(
    settings: Mapping[str, Any], run_folder: Path, tests: Mapping[str, tuple[int, Mapping[str, float]]]
) -> None:
    """Tell the run's loggers that models were tested. tests: by a checkpoint's file, the last step of its lineage
    (jobs.training.states.last_step), and the metrics. A logger that fails says so; nothing is raised for it."""
    if tests:
        tell_tests(settings["name"], run_folder / "checkpoints", makers(settings, run_folder), tests)


def observer(settings: Mapping[str, Any], run_folder: Path | None) -> Observer:
    """What a session tells of its training. run_folder: None where there is no run, and so nothing to log."""
    if run_folder is None or not settings["loggers"]:
        return Unobserved()
    files = run_folder / "checkpoints"
    return Recorder(settings["name"], files, settings["select_on"], makers(settings, run_folder))
