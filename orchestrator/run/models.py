"""Test and export the models on a run's leaderboard."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from orchestrator.errors import DamagedCheckpointError, JobSpecError, RunError, StaleClaimError
from orchestrator.files import checkpoints
from orchestrator.files.atomic import publish
from orchestrator.messages import counted
from orchestrator.run.run import Run
from orchestrator.worker.user_job import apart_from_stdout, as_job_error

log = logging.getLogger("orch")


def test_models(
    run: Run, evaluate: Callable[[Path], dict[str, float]], again: bool, now: float
) -> list[dict[str, Any]]:
    """Read the test set for the entries of the board, and record that it was. Entries that were tested
    before are not read again unless asked for."""
    for entry in run.leaderboard.reader.entries():
        if entry["test_metrics"] is None or again:
            path = checkpoints.verify(run.folder / "checkpoints", entry["file"], entry["sha256"])
            metrics = evaluate(path)
            try:
                run.leaderboard.board.record_test(entry["checkpoint"], entry["sha256"], metrics, now)
            except StaleClaimError:
                log.warning("checkpoint %s left the board while it was tested", entry["checkpoint"])
    return list(run.board()["entries"])


def evaluator(run: Run) -> Callable[[Path], dict[str, float]]:
    """A function from a checkpoint's file to its metrics on the test set."""
    from jobs.imports import look_first_in

    look_first_in(run.leaderboard.run_state.row()["import_paths"])
    from jobs.errors import JobError
    from jobs.training.opening import open_session

    with as_job_error(run.settings.job, JobError):
        session = open_session(run.settings.model_dump(mode="json"), len(os.sched_getaffinity(0)))
        session.feed("test")

    def evaluate(path: Path) -> dict[str, float]:
        with as_job_error(run.settings.job, JobError):
            return session.evaluate_file(path, "test")

    return evaluate


@contextmanager
def logged(run: Run, evaluate: Callable[[Path], dict[str, float]]) -> Iterator[Callable[[Path], dict[str, float]]]:
    """`evaluator`'s function, whose results go to the run's loggers at the end."""
    from jobs.loggers.choice import log_tests
    from jobs.training.states import last_step

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
    from jobs.training.states import export

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
        publish(out, lambda target: export(source, target))
        text = json.dumps({"run": run.name, "job": run.settings.job, **entry}, indent=2)
        publish(out.with_suffix(".json"), lambda target: target.write(text.encode()))
    except JobError as error:  # a job with a loop of its own may keep what is no model
        raise JobSpecError(f"job {run.settings.job}: {error}") from error
    except OSError as error:
        raise RunError(f"--out {out}: {error.strerror or error}") from error
    return entry
