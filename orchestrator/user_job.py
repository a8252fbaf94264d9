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

from orchestrator import checkpoints
from orchestrator.errors import JobSpecError, OrchError, RunError
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from orchestrator.run import Run
    from orchestrator.worker import Trainer


def check(settings: Settings, import_paths: Sequence[str], download: bool = False) -> list[str]:
    """Import the job and let it check what it needs. Lines for the user. Raises JobSpecError."""
    sys.path[:0] = [p for p in import_paths if p not in sys.path]
    from jobs.job import JobError
    from jobs.training import find_class, load_job

    with _as_job_error(settings.job, JobError):
        if hasattr(find_class(settings.job), "open_trainer"):
            return []
        return load_job(settings.model_dump(mode="json")).prepare(download)


def checkpoint_bytes(settings: Settings) -> int | None:
    """About how large a checkpoint of this job is; None where that can't be told without training. After `check`."""
    from jobs.footprint import checkpoint_bytes

    try:
        with apart_from_stdout():
            return checkpoint_bytes(settings.model_dump(mode="json"))
    except Exception:  # the user's code: what is wrong with it is said where it is needed
        return None


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


def import_ahead(job: str) -> None:
    """Import the job's module, and with it torch, in the background: it takes seconds, in which the worker
    waits for sbatch, squeue and the database. What goes wrong here is raised when the job is opened."""

    def quietly() -> None:
        with suppress(BaseException):
            importlib.import_module(job.partition(":")[0])
            if "torch" in sys.modules:
                importlib.import_module("jobs.training")

    threading.Thread(target=quietly, name="import ahead", daemon=True).start()


def open_trainer(settings: Settings, cores: int) -> Trainer:
    """The settings' job, ready to train. A job class that is no torch job brings its own trainer: a static
    method `open_trainer(settings, cores)` that returns a `worker.Trainer`."""
    module, _, name = settings.job.partition(":")
    own = getattr(getattr(importlib.import_module(module), name, None), "open_trainer", None)
    if own is not None:
        trainer: Trainer = own(settings.model_dump(mode="json"), cores)
        return trainer
    from jobs.training import open_session

    return open_session(settings.model_dump(mode="json"), cores)


def evaluator(run: Run) -> Callable[[Path], dict[str, float]]:
    """A function from a checkpoint's file to its metrics on the test set."""
    sys.path[:0] = [p for p in run.leaderboard.reader.run_row()["import_paths"] if p not in sys.path]
    from jobs.job import JobError
    from jobs.training import open_session

    with _as_job_error(run.settings.job, JobError):
        session = open_session(run.settings.model_dump(mode="json"), len(os.sched_getaffinity(0)))
        session.feed("test")

    def evaluate(path: Path) -> dict[str, float]:
        with _as_job_error(run.settings.job, JobError):
            return session.evaluate_file(path, "test")

    return evaluate


def export_entry(run: Run, rank: int, out: Path) -> dict[str, Any]:
    """Write the weights of the entry of this rank to out, and what it is beside it. Raises RunError."""
    from jobs.training import export

    if out.suffix == ".json":
        raise RunError(f"--out {out}: .json is for the description beside it; allowed is another ending, such as .pt")
    entries = run.board()["entries"]
    if rank > len(entries):
        raise RunError(f"--rank {rank}: the board of {run.name} has {len(entries)} entries")
    entry: dict[str, Any] = entries[rank - 1]
    source = checkpoints.verify(run.folder / "checkpoints", entry["file"], entry["sha256"])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        checkpoints.publish(out, lambda target: export(source, target))
        text = json.dumps({"run": run.name, "job": run.settings.job, **entry}, indent=2)
        checkpoints.publish(out.with_suffix(".json"), lambda target: target.write(text.encode()))
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
    from jobs.resume_link import Plan
    from jobs.training import find_class

    if hasattr(find_class(settings.job), "open_trainer"):
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
