"""Check the user's job before a launch, open it, and verify that it resumes exactly.

The jobs package and torch are imported only inside functions.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.errors import JobSpecError, OrchError
from orchestrator.messages import described
from orchestrator.settings.settings import Settings

if TYPE_CHECKING:
    from jobs.data.download import Fetch
    from jobs.training.trying import Tried
    from orchestrator.worker.trainer import Trainer


def check_job(settings: Settings, import_paths: Sequence[str], fetch: Fetch | None = None) -> list[str]:
    """Import the job and check that its requirements are met. fetch: first fetch missing files. Returns lines for the
    user. Raises JobSpecError."""
    from jobs.imports import brings_own_trainer, look_first_in

    look_first_in(import_paths)
    with as_job_error(settings.job):
        if brings_own_trainer(settings.job):
            return []
        from jobs.training import opening  # imports torch

        return opening.check_job(settings, fetch)


def prepare(
    settings: Settings,
    import_paths: Sequence[str],
    *,
    brought: Sequence[Path],
    stand_in: bool,
    sha256: str | None,
    say: Callable[[str], None],
) -> list[str]:
    """Fetch the data and weights that the job needs. brought: files that the user has carried here. stand_in: make
    artificial data instead. sha256: expected checksum of the data's archive. say: called with lines about progress.
    Returns lines for the user. Raises JobSpecError."""
    from jobs.data.download import Fetch

    return check_job(settings, import_paths, Fetch(tuple(brought), stand_in, sha256, say))


def data_source(settings: Settings) -> dict[str, Any]:
    """Return where the job's data come from, as JSON values; {} if unknown. Call check_job first.

    Raises JobSpecError.
    """
    from jobs.imports import brings_own_trainer

    with as_job_error(settings.job):
        if brings_own_trainer(settings.job):
            return {}
        from jobs.training.opening import load_job

        return dict(load_job(settings).data_source())


def try_job(settings: Settings) -> Tried | None:
    """Train the job for a few steps in this process; see jobs.training.trying. None for a job with its own trainer.
    Call check_job first. Raises JobSpecError if the job fails."""
    from jobs.imports import brings_own_trainer

    with as_job_error(settings.job, " (found by training a few steps here; --no-try launches without this)"):
        if brings_own_trainer(settings.job):
            return None
        from jobs.training.trying import try_job

        return try_job(settings)


def checkpoint_bytes(settings: Settings) -> int | str:
    """Estimate a checkpoint's size in bytes, or return the reason why this is impossible. Call check_job first."""
    from jobs.errors import JobError
    from jobs.imports import brings_own_trainer

    try:
        with apart_from_stdout():
            if brings_own_trainer(settings.job):
                return "the job uses its own trainer"
            from jobs.training.footprint import checkpoint_bytes

            return checkpoint_bytes(settings)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's code may need a GPU that only compute nodes have
        reason = str(error) if isinstance(error, JobError) else described(error)
        return f"the model can't be created here: {' '.join(reason.split())}"


@contextmanager
def apart_from_stdout() -> Iterator[None]:
    """Redirect stdout to stderr inside the block, where the user's code may print: stdout is for orch's own output."""
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
def as_job_error(job: str, hint: str = "", in_this_process: bool = True) -> Iterator[None]:
    """Turn any error of the user's code in the block into a JobSpecError, and redirect the code's output to stderr.
    hint: added to the message. in_this_process: False if only other processes run the code; then SystemExit comes from
    a signal to this one."""
    from jobs.errors import JobError

    try:
        with apart_from_stdout():
            yield
    except JobError as error:
        raise JobSpecError(f"{error}{hint}") from error
    except (OrchError, KeyboardInterrupt):
        raise
    except BaseException as error:  # the user's code may even call sys.exit()
        if not isinstance(error, Exception) and not in_this_process:
            raise
        raise JobSpecError(f"job {job}: {described(error)}{_place(error, job)}{hint}") from error


def _place(error: BaseException, job: str) -> str:
    """Return where in the user's files an error was raised, innermost; "" if not in any."""
    module = sys.modules.get(job.partition(":")[0])
    folder = os.path.dirname(os.path.abspath(getattr(module, "__file__", None) or os.sep))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if folder != os.sep and os.path.dirname(os.path.abspath(frame.filename)) == folder:
            return f" ({frame.filename}, line {frame.lineno}, in {frame.name})"
    return ""


def import_ahead(job: str) -> threading.Thread:
    """Import the job's module and torch in a background thread. This takes seconds, during which the worker waits for
    sbatch, squeue and the database. Errors are ignored here, because opening the job raises them again.

    Join the thread before opening the job: two threads must not import torch's modules at the same time.
    """
    from jobs.imports import working_folder_kept

    def quietly() -> None:
        with suppress(BaseException), working_folder_kept():
            importlib.import_module(job.partition(":")[0])
            if "torch" in sys.modules:
                importlib.import_module("jobs.training.opening")

    thread = threading.Thread(target=quietly, name="import ahead", daemon=True)
    thread.start()
    return thread


def open_trainer(settings: Settings, cores: int, run_folder: Path) -> Trainer:
    """Open the job named in the settings; the job's loggers write below run_folder. A job class that does not inherit
    from jobs.job.Job needs a static method `open_trainer(settings: Settings, cores: int)` that returns a Trainer."""
    from jobs.imports import brings_own_trainer, find_class

    if brings_own_trainer(settings.job):
        trainer: Trainer = find_class(settings.job, f"job {settings.job}").open_trainer(settings, cores)
        return trainer
    from jobs.training.opening import open_session

    return open_session(settings, cores, run_folder=run_folder)


def verify_resume(
    settings: Settings,
    import_paths: Sequence[str],
    *,
    chunks: int,
    steps_per_epoch: int,
    interruptions: int,
    device: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Test whether this job resumes exactly on this machine. Returns the data of `orch verify-resume --json`. say:
    called with a line for the user at each stage. Raises JobSpecError if the job can't be trained."""
    for line in check_job(settings, import_paths):
        say(line)
    from jobs.imports import brings_own_trainer
    from jobs.verify_resume.check import as_json, verify
    from jobs.verify_resume.link import Trial

    if brings_own_trainer(settings.job):
        raise JobSpecError(
            f"job {settings.job} uses its own trainer (open_trainer), whose files orch can't read; "
            "verify-resume only works for classes that inherit from jobs.job.Job"
        )
    trial = Trial(
        settings=settings,
        import_paths=[*import_paths],
        cores=settings.cores_per_worker or len(os.sched_getaffinity(0)),
        device=device,
        chunks=chunks,
        epochs_per_chunk=2,  # regardless of the settings, so that an epoch ends inside a chunk
        steps_per_epoch=steps_per_epoch,
        interruptions=interruptions,
    )
    with as_job_error(settings.job, in_this_process=False):
        return as_json(verify(trial, say))
