"""Runs that take milliseconds: the leaderboard, files and worker loop are real; the trainer follows a script."""

from __future__ import annotations

import copy
import json
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import sqlalchemy

from orchestrator.cluster.host import host_name, this_process
from orchestrator.cluster.inline import InlineJob, InlineQueue
from orchestrator.files.run_folder import FOLDERS, SETTINGS_NAME
from orchestrator.leaderboard.chains import JobStart
from orchestrator.leaderboard.leaderboard import Leaderboard
from orchestrator.records import EpochResult, Finished, Interrupted, Started, Work
from orchestrator.run.run import Run
from orchestrator.settings.loading import freeze
from orchestrator.settings.settings import Settings
from orchestrator.worker.loop import JobLoop
from orchestrator.worker.trainer import Ending, StopFlag, Trainer
from tests.support.storage import Storage, do_not_wait_for_the_disk

ROOT = Path(__file__).parents[2]
CUT = "cut"  # in a script, instead of a score: the chunk is interrupted
CYCLE = ["a", "b", "a", "c"]


class Scripted(Trainer):
    """Returns the script's scores one after another, whatever it trains; after the last score it sets the stop flag."""

    def __init__(self, script: Sequence[float | str], stop: StopFlag, size_bytes: int = 0) -> None:
        self.script = list(script)
        self.stop = stop
        self.size_bytes = size_bytes
        self.state: dict[str, Any] = {}

    def train(
        self, work: Work, should_stop: Callable[[], bool], on_epoch: Callable[[EpochResult], None]
    ) -> Finished | Interrupted:
        source = work.suspended or work.parent
        self.state = json.loads(source.read_bytes()) if source else {"epochs": 0, "line": []}
        step = self.script.pop(0)
        if not self.script:
            self.stop.reason = "the end of its script"
        if step == CUT:
            return Interrupted(1)
        assert isinstance(step, float)
        first = self.state["epochs"] + 1
        metrics = {"accuracy": step, "train_loss": 1 - step}
        results = tuple(EpochResult(first + i, 0.5, metrics) for i in range(work.epochs))
        self.state = {"epochs": first + work.epochs - 1, "line": [*self.state["line"], step]}
        return Finished(step, self.state["epochs"], results, 0.5 * work.epochs)

    def save(self, target: IO[bytes]) -> None:
        target.write(json.dumps(self.state).encode().ljust(self.size_bytes))


def make_run(storage: Storage, folder: Path, **changes: Any) -> Run:
    """Make a run without jobs."""
    rates = {"a": 0.1, "b": 0.01, "c": 0.001}
    place = {"database": storage.url, "database_schema": f"test_{secrets.token_hex(6)}"} if storage.url else {}
    profiles = [{"name": name, "learning_rate": rates[name]} for name in CYCLE]
    values = {"num_models": 3, "training_profiles": profiles, "executor": "local", "stop_after_stale_cycles": None}
    settings = Settings.model_validate({"name": folder.name} | values | place | changes)
    for part in FOLDERS:
        (folder / part).mkdir(parents=True)
    frozen = freeze(settings)
    (folder / SETTINGS_NAME).write_text(frozen + "\n")
    now = time.time()
    where = (folder, settings.database, settings.database_schema)
    deadline = now + settings.total_lifetime
    Leaderboard.create(*where, settings=settings, import_paths=[str(ROOT)], now=now, deadline=deadline)
    run = opened(folder)
    devices = [None] * settings.workers
    run.leaderboard.chains.close(run.leaderboard.chains.add_workers(devices, now), "lost", "never submitted", now)
    return run


def opened(folder: Path) -> Run:
    run = Run.open(folder)
    if run.leaderboard.database.file:  # no test with these runs simulates a power cut
        sqlalchemy.event.listen(run.leaderboard.database._engine, "connect", do_not_wait_for_the_disk)
    return run


def work(run: Run, script: Sequence[float | str], size_bytes: int = 0, worker_id: int = 0) -> Ending | None:
    """Run one job of a worker; its trainer follows the script."""
    if not script:
        return None
    chains, now = run.leaderboard.chains, time.time()
    (job,) = chains.relink([worker_id], now, 10**6)
    start = JobStart(job.token, worker_id, str(job.job_id), host_name(), *this_process())
    started = chains.start(start, now, 10**6, successor=False)
    assert isinstance(started, Started), started
    stop = StopFlag()
    trainer = Scripted(script, stop, size_bytes)
    of_the_job = copy.copy(run)
    of_the_job._queue = InlineQueue()
    loop = JobLoop(of_the_job, InlineJob(run.settings, job.token), lambda: trainer, time.time, stop)
    return loop.work(started)


def lose(run: Run) -> None:
    """Delete the database, as when a file system is purged or a server is reinstalled."""
    database = run.leaderboard.database
    if database.file:
        database.file.unlink()
    else:
        database.drop(schema_too=True)
        database.release_connection()


def board_of(run: Run) -> list[dict[str, Any]]:
    """Return what a repair must not change: files, scores and positions, sorted by file."""
    keys = ("file", "sha256", "score", "epochs", "start_position", "profile", "worker", "metrics")
    rows = [{key: entry[key] for key in keys} for entry in run.leaderboard.reader.entries()]
    return sorted(rows, key=lambda row: str(row["file"]))
