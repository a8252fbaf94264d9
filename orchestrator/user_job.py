"""The user's own job, as the command line needs it: checked before a launch, evaluated, exported.

Everything of torch is imported when it is called, never before.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import DamagedCheckpointError, JobSpecError, OrchError, RunError
from orchestrator.files import atomic, checkpoints
from orchestrator.imports import look_first_in
from orchestrator.messages import counted
from orchestrator.settings.settings import Settings

if TYPE_CHECKING:
    from orchestrator.run import Run
    from orchestrator.worker import Trainer


def check(settings: Settings, import_paths: Sequence[str], download: bool = False) -> list[str]:
    """Import the job and let it check what it needs. Lines for the user. Raises JobSpecError."""
    look_first_in(import_paths)
    from jobs.errors import JobError
    from jobs.named import brings_own_trainer

    with _as_job_error(settings.job, JobError):
        if brings_own_trainer(settings.job):
            return []
        from jobs import opening  # imports torch

        return opening.check(settings.model_dump(mode="json"), download)


def checkpoint_bytes(settings: Settings) -> int | str:
    """About how large a checkpoint of this job is; or why that can't be told without training. After `check`."""
    from jobs.errors import JobError
    from jobs.named import brings_own_trainer

    try:
        with apart_from_stdout():
            if brings_own_trainer(settings.job):
                return "the job brings a trainer of its own"
            from jobs.footprint import checkpoint_bytes

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
def _as_job_error(job: str, own: type[Exception]) -> Iterator[None]:
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
                importlib.import_module("jobs.opening")

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
    from jobs.opening import open_session

    return open_session(settings.model_dump(mode="json"), cores, run_folder=run_folder)


def evaluator(run: Run) -> Callable[[Path], dict[str, float]]:
    """A function from a checkpoint's file to its metrics on the test set."""
    look_first_in(run.leaderboard.reader.run_row()["import_paths"])
    from jobs.job import JobError
    from jobs.opening import open_session

    with _as_job_error(run.settings.job, JobError):
        session = open_session(run.settings.model_dump(mode="json"), len(os.sched_getaffinity(0)))
        session.feed("test")

    def evaluate(path: Path) -> dict[str, float]:
        with _as_job_error(run.settings.job, JobError):
            return session.evaluate_file(path, "test")

    return evaluate


@contextmanager
def logged(run: Run, evaluate: Callable[[Path], dict[str, float]]) -> Iterator[Callable[[Path], dict[str, float]]]:
    """`evaluator`'s function, whose results go to the run's loggers at the end."""
    from jobs.loggers.choice import log_tests
    from jobs.states import last_step

    tests: dict[str, tuple[int, dict[str, float]]] = {}

    def evaluate_and_keep(path: Path) -> dict[str, float]:
        metrics = evaluate(path)
        with suppress(FileNotFoundError):  # it left the board meanwhile, and its test is not recorded either
            tests[path.name] = (last_step(path), metrics)
        return metrics

    try:
        yield evaluate_and_keep
    finally:
        with apart_from_stdout():
            log_tests(run.settings.model_dump(mode="json"), run.folder, tests)


def export_entry(run: Run, rank: int, out: Path) -> dict[str, Any]:
    """Write the weights of the entry of this rank to out, and what it is beside it. Raises RunError."""
    from jobs.errors import JobError
    from jobs.states import export

    if out.suffix == ".json":
        raise RunError(f"--out {out}: .json is for the description beside it; allowed is another ending, such as .pt")
    entries = run.board()["entries"]
    if rank > len(entries):
        raise RunError(f"--rank {rank}: the board of {run.name} has {counted(len(entries), 'entry', 'entries')}")
    entry: dict[str, Any] = entries[rank - 1]
    try:
        source = checkpoints.verify(run.folder / "checkpoints", entry["file"], entry["sha256"])
    except DamagedCheckpointError as error:
        raise RunError(f"{error}. `orch repair {run.name}` takes it off the board; or choose another --rank") from error
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic.publish(out, lambda target: export(source, target))
        text = json.dumps({"run": run.name, "job": run.settings.job, **entry}, indent=2)
        atomic.publish(out.with_suffix(".json"), lambda target: target.write(text.encode()))
    except JobError as error:  # a job with a loop of its own may keep what is no model
        raise JobSpecError(f"job {run.settings.job}: {error}") from error
    except OSError as error:
        raise RunError(f"--out {out}: {error.strerror or error}") from error
    return entry


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
    for line in check(settings, import_paths):
        say(line)
    from jobs import resume_check
    from jobs.job import JobError
    from jobs.named import brings_own_trainer
    from jobs.resume_link import Plan

    if brings_own_trainer(settings.job):
        raise JobSpecError(
            f"job {settings.job}: it brings a trainer of its own (open_trainer), whose files orch can't read; "
            "verify-resume is for classes derived from jobs.job.Job"
        )
    plan = Plan(
        settings=settings.model_dump(mode="json"),
        import_paths=[*import_paths],
        cores=settings.cores_per_worker or len(os.sched_getaffinity(0)),
        device=device,
        chunks=chunks,
        epochs_per_chunk=2,  # so that an epoch's end lies within a chunk, whatever the settings say
        steps_per_epoch=steps_per_epoch,
        interruptions=interruptions,
    )
    with _as_job_error(settings.job, JobError):
        return resume_check.as_json(resume_check.verify(plan, say))
