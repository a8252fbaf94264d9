"""The user's own job, as the command line needs it: checked before a launch, evaluated, exported.

Everything of torch is imported when it is called, never before.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import JobSpecError, OrchError
from orchestrator.settings.settings import Settings

if TYPE_CHECKING:
    from orchestrator.worker.trainer import Trainer


def check_job(settings: Settings, import_paths: Sequence[str], download: bool = False) -> list[str]:
    """Import the job and let it check what it needs. Lines for the user. Raises JobSpecError."""
    from jobs.imports import look_first_in

    look_first_in(import_paths)
    from jobs.errors import JobError
    from jobs.imports import brings_own_trainer

    with as_job_error(settings.job, JobError):
        if brings_own_trainer(settings.job):
            return []
        from jobs.training import opening  # imports torch

        return opening.check_job(settings.model_dump(mode="json"), download)


def checkpoint_bytes(settings: Settings) -> int | str:
    """About how large a checkpoint of this job is; or why that can't be told without training. After `check`."""
    from jobs.errors import JobError
    from jobs.imports import brings_own_trainer

    try:
        with apart_from_stdout():
            if brings_own_trainer(settings.job):
                return "the job brings a trainer of its own"
            from jobs.training.footprint import checkpoint_bytes

            return checkpoint_bytes(settings.model_dump(mode="json"))
    except Exception as error:  # the user's code; a node with a GPU may be what it needs, so it is tried there
        said = str(error) if isinstance(error, JobError) else f"{type(error).__name__}: {error}"
        return f"the model can't be made here: {' '.join(said.split())}"


@contextmanager
def apart_from_stdout() -> Iterator[None]:
    """What the user's code and its libraries print goes to standard error: standard output is orch's own."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@contextmanager
def as_job_error(job: str, own: type[Exception]) -> Iterator[None]:
    """Whatever the user's code raises is one clear error, and what it prints does not mix with our output."""
    try:
        with apart_from_stdout():
            yield
    except own as error:
        raise JobSpecError(str(error)) from error
    except OrchError:
        raise
    except Exception as error:
        raise JobSpecError(f"job {job}: {type(error).__name__}: {error}") from error


def import_ahead(job: str) -> threading.Thread:
    """Import the job's module, and with it torch, in the background: it takes seconds, in which the worker
    waits for sbatch, squeue and the database. What goes wrong here is raised when the job is opened. To be joined
    before that: torch's parts must not be imported by two threads at once."""

    def quietly() -> None:
        with suppress(BaseException):
            importlib.import_module(job.partition(":")[0])
            if "torch" in sys.modules:
                importlib.import_module("jobs.training.opening")

    thread = threading.Thread(target=quietly, name="import ahead", daemon=True)
    thread.start()
    return thread


def open_trainer(settings: Settings, cores: int, run_folder: Path) -> Trainer:
    """The settings' job, ready to train; its loggers write below run_folder. A job class that is no torch job brings
    its own trainer: a static method `open_trainer(settings, cores)` that returns a `worker.Trainer`."""
    module, _, name = settings.job.partition(":")
    own = getattr(getattr(importlib.import_module(module), name, None), "open_trainer", None)
    if own is not None:
        trainer: Trainer = own(settings.model_dump(mode="json"), cores)
        return trainer
    from jobs.training.opening import open_session

    return open_session(settings.model_dump(mode="json"), cores, run_folder=run_folder)


def verify_resume(
    settings: Settings,
    import_paths: Sequence[str],
    chunks: int,
    steps_per_epoch: int,
    interruptions: int,
    device: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Is resume exact for this job, here? What was found, as `orch verify-resume --json` prints it.

    say: is told how it goes on, a line at a time. Raises JobSpecError if the job can't be trained."""
    for line in check_job(settings, import_paths):
        say(line)
    from jobs.errors import JobError
    from jobs.imports import brings_own_trainer
    from jobs.verify_resume.check import as_json, verify
    from jobs.verify_resume.link import Trial

    if brings_own_trainer(settings.job):
        raise JobSpecError(
            f"job {settings.job}: it brings a trainer of its own (open_trainer), whose files orch can't read; "
            "verify-resume is for classes derived from jobs.job.Job"
        )
    plan = Trial(
        settings=settings.model_dump(mode="json"),
        import_paths=[*import_paths],
        cores=settings.cores_per_worker or len(os.sched_getaffinity(0)),
        device=device,
        chunks=chunks,
        epochs_per_chunk=2,  # so that an epoch's end lies within a chunk, whatever the settings say
        steps_per_epoch=steps_per_epoch,
        interruptions=interruptions,
    )
    with as_job_error(settings.job, JobError):
        return as_json(verify(plan, say))
