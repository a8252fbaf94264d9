"""Create loggers from the names in the settings. Each logger's library is imported later, in that logger's thread."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from jobs.errors import JobError
from jobs.imports import find_class
from jobs.loggers.logger import Logger, Place, Series
from jobs.loggers.observer import Observer
from jobs.loggers.recorder import Channels, Makers, Recorder, series_of_tested
from orchestrator.records import LockKind
from orchestrator.settings.settings import Settings

# Built-in loggers by name: the class, the package it needs, and what to pass to `pip install`.
BUILT_IN = {
    "tensorboard": ("jobs.loggers.tensorboard:TensorBoard", "tensorboard", "tensorboard"),
    "wandb": ("jobs.loggers.wandb:WeightsAndBiases", "wandb", "'orch[wandb]'"),
    "mlflow": ("jobs.loggers.mlflow:MLflow", "mlflow", "'orch[mlflow]'"),
}


def check_loggers(names: Iterable[str]) -> None:
    """Raise JobError unless each name is a built-in logger whose package is installed, or a user's logger class."""
    for name in names:
        if name not in BUILT_IN:
            find_logger(name)
        elif find_spec(BUILT_IN[name][1]) is None:
            _, package, install = BUILT_IN[name]
            raise JobError(
                f"loggers: {name!r} needs the package {package}, which is not installed here. Run: pip install "
                f'{install}; or remove {name!r} from "loggers"'
            )


def find_logger(name: str) -> type[Logger]:
    """Return the class of a logger: a built-in one, or the user's own ("module:Class"). Raises JobError."""
    what = f"loggers: {name!r}"
    logger = find_class(BUILT_IN[name][0] if name in BUILT_IN else name, what)
    if not issubclass(logger, Logger):
        raise JobError(
            f"{what} is not derived from jobs.loggers.Logger; allowed: {', '.join(BUILT_IN)} and "
            '"module:Class", where Class is derived from it'
        )
    return logger


def makers(settings: Settings, run_folder: Path) -> Makers:
    lock: LockKind = "flock" if settings.lock == "flock" else "soft"  # "auto": flock was not tested at launch
    place = Place(settings.name, run_folder / "logs", lock)
    return {name: partial(_make, name, place) for name in settings.loggers}


def _make(name: str, place: Place) -> Logger:
    return find_logger(name)(place)


def log_tests(settings: Settings, run_folder: Path, tests: Mapping[str, tuple[int, Mapping[str, float]]]) -> None:
    """Report test results to the run's loggers. tests: for each checkpoint file, the last step of its lineage
    (jobs.training.states.last_step) and the metrics. If a logger fails, a warning is logged and no error is raised."""
    channels = Channels(makers(settings, run_folder))
    for file, (step, metrics) in tests.items():
        series = series_of_tested(settings.name, run_folder / "checkpoints", file, step)
        if series is not None:
            channels.put(partial(_report_test, series=series, metrics=metrics))
    channels.close()


def _report_test(logger: Logger, series: Series, metrics: Mapping[str, float]) -> None:
    logger.begin(series)
    logger.judge(True)  # only models on the board are tested
    logger.test(series.step, metrics)
    logger.end()


def observer(settings: Settings, run_folder: Path | None) -> Observer:
    """Return the observer for a session's training. run_folder: None if there is no run, so nothing is logged."""
    if run_folder is None or not settings.loggers:
        return Observer()
    return Recorder(settings.name, run_folder / "checkpoints", settings.select_on, makers(settings, run_folder))
