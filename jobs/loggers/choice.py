"""From the names in the settings to loggers. Each logger's library is imported by that logger's thread, not here."""

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

# By name: the class, the package that it needs, and what to install for it.
BUILT_IN = {
    "tensorboard": ("jobs.loggers.tensorboard:TensorBoard", "tensorboard", "tensorboard"),
    "wandb": ("jobs.loggers.wandb:WeightsAndBiases", "wandb", "'orch[wandb]'"),
    "mlflow": ("jobs.loggers.mlflow:MLflow", "mlflow", "'orch[mlflow]'"),
}


def check_loggers(names: Iterable[str]) -> None:
    """Raises JobError for a built-in logger whose package is not installed, and for a name that is not a logger."""
    for name in names:
        if name not in BUILT_IN:
            find_logger(name)
        elif find_spec(BUILT_IN[name][1]) is None:
            _, package, install = BUILT_IN[name]
            raise JobError(
                f"loggers: {name!r} needs the package {package}, which is not installed here. Run: pip install "
                f'{install}; or take {name!r} out of "loggers"'
            )


def find_logger(name: str) -> type[Logger]:
    """The class of a built-in logger, or of the user's own, which "module:Class" names. Raises JobError."""
    what = f"loggers: {name!r}"
    logger = find_class(BUILT_IN[name][0] if name in BUILT_IN else name, what)
    if not issubclass(logger, Logger):
        raise JobError(
            f"{what} is not derived from jobs.loggers.Logger; allowed are {', '.join(BUILT_IN)} and "
            '"module:Class" with such a class'
        )
    return logger


def makers(settings: Settings, run_folder: Path) -> Makers:
    lock: LockKind = "flock" if settings.lock == "flock" else "soft"  # "auto": flock was not proven to hold
    place = Place(settings.name, run_folder / "logs", lock)
    return {name: partial(_make, name, place) for name in settings.loggers}


def _make(name: str, place: Place) -> Logger:
    return find_logger(name)(place)


def log_tests(settings: Settings, run_folder: Path, tests: Mapping[str, tuple[int, Mapping[str, float]]]) -> None:
    """Tell the run's loggers which models were tested. tests: by checkpoint file, the last step of its lineage
    (jobs.training.states.last_step) and the metrics. A logger that fails logs a warning; it raises nothing."""
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
    """What a session reports its training to. run_folder: None where there is no run, so nothing is logged."""
    if run_folder is None or not settings.loggers:
        return Observer()
    return Recorder(settings.name, run_folder / "checkpoints", settings.select_on, makers(settings, run_folder))
