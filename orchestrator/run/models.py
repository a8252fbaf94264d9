"""Test and export the models on a run's leaderboard."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from orchestrator.errors import DamagedCheckpointError, JobSpecError, RunError, StaleClaimError
from orchestrator.files import checkpoints, exports
from orchestrator.messages import counted
from orchestrator.run.run import Run
from orchestrator.worker.user_job import apart_from_stdout, as_job_error

log = logging.getLogger("orch")


def test_models(run: Run, again: bool, now: float) -> None:
    """Test the models on the board, record their test metrics, and send the metrics to the run's loggers.

    Entries with test metrics are skipped unless `again`. Raises JobSpecError.
    """
    from jobs.imports import look_first_in
    from jobs.loggers.choice import log_tests
    from jobs.training.opening import open_session
    from jobs.training.states import last_step

    reader, job = run.leaderboard.reader, run.settings.job
    look_first_in(run.leaderboard.run_state.row()["import_paths"])
    with as_job_error(job):
        session = open_session(run.settings, len(os.sched_getaffinity(0)), run_folder=run.folder, logs=False)
        session.feed("test")
    tests: dict[str, tuple[int, dict[str, float]]] = {}
    try:
        for entry in reader.entries():
            if entry["test_metrics"] is not None and not again:
                continue
            path = checkpoints.verify(run.folder / "checkpoints", entry["file"], entry["sha256"])
            with as_job_error(job):
                metrics = session.evaluate_file(path, "test")
            with suppress(FileNotFoundError):  # the entry has left the board, and its file is deleted
                tests[path.name] = (last_step(path), metrics)
            try:
                run.leaderboard.board.record_test(entry["checkpoint"], entry["sha256"], metrics, now)
            except StaleClaimError:
                log.warning("checkpoint %s left the board during its test", entry["checkpoint"])
    finally:
        with apart_from_stdout():
            log_tests(run.settings, run.folder, tests)


def export_entry(run: Run, rank: int, out: Path) -> dict[str, Any]:
    """Write the weights of the entry with this rank to out, and a description to a .json file beside it. Returns the
    entry. Raises RunError, also if this would replace a file that orch did not write, or JobSpecError if the checkpoint
    contains no model."""
    from jobs.errors import JobError
    from jobs.training.states import export

    to = exports.destination(out)
    entries = run.board()["entries"]
    if rank > len(entries):
        raise RunError(f"--rank {rank}: the board of {run.name} has {counted(len(entries), 'entry', 'entries')}")
    entry: dict[str, Any] = entries[rank - 1]
    try:
        source = checkpoints.verify(run.folder / "checkpoints", entry["file"], entry["sha256"])
    except DamagedCheckpointError as error:
        advice = f"Run `orch repair {run.name}` to take this entry off the board, or choose another --rank"
        raise RunError(f"{error}. {advice}") from error
    about = {"run": run.name, "job": run.settings.job, "data": run.data_source(), **entry}
    try:
        exports.write(to, lambda target: export(source, target, lambda: _names_of_weights(run)), about)
    except JobError as error:  # a custom train_chunk may return a state without a model
        raise JobSpecError(f"job {run.settings.job}: {error}") from error
    return entry


def _names_of_weights(run: Run) -> Collection[str] | None:
    """Return the names in the state_dict of the job's model; None if the model can't be created here."""
    from jobs.imports import look_first_in
    from jobs.training.opening import load_job

    look_first_in(run.leaderboard.run_state.row()["import_paths"])
    try:
        with apart_from_stdout():
            return load_job(run.settings).model().state_dict().keys()
    except Exception as error:  # the user's code may need data or a GPU that only compute nodes have
        log.info("the model can't be created here: %s", error)
        return None
