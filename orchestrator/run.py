"""A run: launch, open, resume, cancel, look at. What the command line and the Python API call."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestrator import checkpoints, rules
from orchestrator import settings as settings_module
from orchestrator.cluster import Cluster, open_cluster
from orchestrator.errors import RunError, StaleClaimError
from orchestrator.leaderboard import Leaderboard
from orchestrator.records import Evidence, Job, JobState, RunState
from orchestrator.settings import Settings
from orchestrator.worker import Ending, StopFlag, Worker, reconcile

SETTINGS_NAME = "settings.json"
RESUMABLE = (RunState.ACTIVE, RunState.PAUSED, RunState.CANCELLED, RunState.FAILED)

log = logging.getLogger("orch")


class Run:
    """A run that exists."""

    def __init__(self, folder: Path, settings: Settings, leaderboard: Leaderboard) -> None:
        self.folder = folder
        self.settings = settings
        self.leaderboard = leaderboard
        self.name = settings.name
        self._cluster: Cluster | None = None

    @property
    def cluster(self) -> Cluster:
        if self._cluster is None:
            self._cluster = open_cluster(self.settings.executor or "local", self.settings, self.folder, job_main)
        return self._cluster

    # --- making and finding

    @classmethod
    def launch(
        cls,
        settings: Settings,
        runs_dir: Path,
        import_paths: Sequence[str] = (),
        clock: Callable[[], float] = time.time,
    ) -> Run:
        """Make the run's folder and database and queue its workers. All or nothing: where the cluster takes
        no jobs, the folder is gone again.

        Raises RunError if there is a run of this name, SubmissionError if nothing could be queued.
        """
        from orchestrator.cluster.local import gpus

        folder = (runs_dir / settings.name).absolute()
        if folder.exists():
            raise RunError(f"{folder} exists already")
        building = folder.with_name(f".{folder.name}-{os.getpid()}")
        now = clock()
        try:
            for part in ("checkpoints", "jobs", "logs"):
                (building / part).mkdir(parents=True)
            frozen = settings_module.freeze(settings)
            (building / SETTINGS_NAME).write_text(frozen + "\n", encoding="utf-8")
            Leaderboard.create(
                building,
                settings.database,
                settings.name,
                frozen,
                import_paths,
                now,
                now + settings.total_lifetime,
            )
            building.rename(folder)  # the run is there from here on, and whole
        except OSError as error:
            shutil.rmtree(building, ignore_errors=True)
            if folder.exists():
                raise RunError(f"{folder} was made by another launch just now") from error
            raise RunError(f"{folder} can't be made: {error.strerror or error}") from error
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        run = cls.open(folder)
        devices: list[str | None] = [None] * settings.workers
        if settings.executor == "local" and (found := gpus()):
            devices = [found[i % len(found)] for i in range(settings.workers)]
        try:
            jobs = run.leaderboard.chains.add_workers(devices, now)
            run._submit(jobs)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return run

    @classmethod
    def open(cls, folder: Path) -> Run:
        """Raises RunError if there is no run in folder, LeaderboardError if its database can't be used."""
        path = folder / SETTINGS_NAME
        try:
            settings = settings_module.thaw(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RunError(f"{folder} is not a run: {path.name}: {error.strerror or error}") from error
        leaderboard = Leaderboard.open(folder, settings.database, settings_module.load_policy)
        return cls(folder.absolute(), settings, leaderboard)

    def _submit(self, jobs: list[Job]) -> None:
        workers = {w.worker_id: w for w in self.leaderboard.chains.workers()}
        self.leaderboard.chains.submitted(self.cluster.submit(jobs, workers, after=None))

    # --- control

    def resume(self, now: float) -> list[str]:
        """Start what is not running: every chain gets its job back. Idempotent; a line for each thing done.

        Raises RunError if the run's lifetime is over or it has ended.
        """
        snapshot = self.leaderboard.chains.snapshot(self.settings.metric.mode)
        if snapshot.state not in RESUMABLE:
            raise RunError(f"{self.name} is {snapshot.state}: {snapshot.reason}. Launch it under a new name")
        if rules.lifetime_over(now, snapshot.deadline):
            raise RunError(
                f"{self.name}: its total_lifetime ended at {iso(snapshot.deadline)}; launch it under a new name"
            )
        self.leaderboard.chains.revive(now)
        self.leaderboard.chains.change_state(RunState.ACTIVE, RESUMABLE, None, now)
        return self.reconcile(now, grace_s=0.0)

    def reconcile(self, now: float, grace_s: float = rules.SUBMITTING_GRACE_S) -> list[str]:
        return reconcile(self.leaderboard, self.cluster, self.settings, now, grace_s)

    def cancel(self, at_once: bool, now: float) -> list[str]:
        """End the run: no chunk and no job starts any more. Running jobs suspend their chunk and end, or are
        killed if at_once. Returns what could not be done."""
        ended = (RunState.ACTIVE, RunState.PAUSED, RunState.DRAINING, RunState.FAILED)
        self.leaderboard.chains.change_state(RunState.CANCELLED, ended, "cancelled by the user", now)
        jobs = self.leaderboard.chains.snapshot(self.settings.metric.mode).open_jobs
        queued = [j for j in jobs if j.state is not JobState.RUNNING]
        trouble = self.cluster.cancel(queued, at_once)
        self.leaderboard.chains.cancelled(queued, "cancelled by the user", now)
        return trouble + self.cluster.cancel([j for j in jobs if j.state is JobState.RUNNING], at_once)

    def work_inline(self) -> Ending:
        """Be the run's first worker, in this process (the inline executor)."""
        now = time.time()
        links = self.leaderboard.chains.relink([0], now, self.settings.max_failures)
        snapshot = self.leaderboard.chains.snapshot(self.settings.metric.mode)
        job = (links or [j for j in snapshot.open_jobs if j.worker_id == 0])[0]
        return _work(self, job.token, 0, StopFlag())

    # --- looking

    def board(self) -> dict[str, Any]:
        entries = self.leaderboard.reader.entries(self.settings.metric.mode)
        for entry in entries:
            entry["promoted_at"] = iso(entry["promoted_at"])
            entry["tested_at"] = iso(entry["tested_at"])
        return {
            "run": self.name,
            "metric": self.settings.metric.model_dump(),
            "num_models": self.settings.num_models,
            "select_on": self.settings.select_on,
            "founders": len({e["founder"] for e in entries}),  # how many lineages are left
            "entries": entries,
        }

    def summary(self) -> dict[str, Any]:
        """A line of `orch runs`: from the database alone."""
        snapshot = self.leaderboard.chains.snapshot(self.settings.metric.mode)
        return {
            "run": self.name,
            "folder": str(self.folder),
            "state": str(snapshot.state),
            "reason": snapshot.reason,
            "best": snapshot.progress.best_score,
            "epochs": snapshot.progress.epochs,
            "created_at": iso(snapshot.created_at),
            "deadline": iso(snapshot.deadline),
        }

    def status(self) -> dict[str, Any]:
        snapshot = self.leaderboard.chains.snapshot(self.settings.metric.mode)
        evidence = self.cluster.evidence(snapshot.open_jobs)
        counts = self.leaderboard.reader.counts()
        return {
            "run": self.name,
            "folder": str(self.folder),
            "state": str(snapshot.state),
            "reason": snapshot.reason,
            "created_at": iso(snapshot.created_at),
            "deadline": iso(snapshot.deadline),
            "executor": self.cluster.name,
            "best": snapshot.progress.best_score,
            "workers": [
                _worker_status(worker_id, row, evidence)
                for worker_id, row in self.leaderboard.reader.last_jobs().items()
            ],
            **counts,
        }

    def test(self, evaluate: Callable[[Path], dict[str, float]], again: bool, now: float) -> list[dict[str, Any]]:
        """Read the test set for the entries of the board, and record that it was. Entries that were tested
        before are not read again unless asked for."""
        for entry in self.leaderboard.reader.entries(self.settings.metric.mode):
            if entry["test_metrics"] is None or again:
                path = checkpoints.verify(self.folder / "checkpoints", entry["file"], entry["sha256"])
                metrics = evaluate(path)
                try:
                    self.leaderboard.reader.record_test(entry["checkpoint"], entry["sha256"], metrics, now)
                except StaleClaimError:
                    log.warning("checkpoint %s left the board while it was tested", entry["checkpoint"])
        return list(self.board()["entries"])


def _worker_status(worker_id: int, row: dict[str, Any], evidence: dict[int, Evidence]) -> dict[str, Any]:
    states = {
        JobState.SUBMITTING: "queued",
        JobState.QUEUED: "queued",
        JobState.RUNNING: "running",
        JobState.ENDED: "ended",
        JobState.CANCELLED: "ended",
        JobState.LOST: "lost",
    }
    gone = evidence.get(row["job_id"]) is Evidence.GONE and row["state"] != JobState.SUBMITTING
    return {
        "worker": worker_id,
        "state": "lost" if gone else states[JobState(row["state"])],
        "job": row["cluster_id"],
        "node": row["host"].split("/")[0] if row["host"] else None,
        "link": row["link"],
        "outcome": row["outcome"],
    }


# --- in a job


def job_main(run_folder: str, worker_id: int) -> str:
    """What submitit runs: one job of one chain. Its token is the name of the folder it was submitted from."""
    stop = StopFlag()
    stop.listen()
    if os.getpgrp() != os.getpid():
        os.setsid()  # a terminal's Ctrl-C is not for the jobs that were launched from it
    run = Run.open(Path(run_folder))
    _log_to(run.folder / "logs" / f"worker-{worker_id}.log")
    return _work(run, run.cluster.token(), worker_id, stop).outcome


def _work(run: Run, token: str, worker_id: int, stop: StopFlag) -> Ending:
    from orchestrator.cluster.local import this_process

    job, predecessor = run.leaderboard.chains.find(token, worker_id)
    if job is None:
        return Ending(f"no job {token} of worker {worker_id} is known; another one took its place")
    run.cluster.wait_turn(predecessor, lambda: stop.reason is not None)
    if stop.reason:
        return Ending(f"stopped by {stop.reason} before it began")
    cluster_id, host = run.cluster.identity()
    started = run.leaderboard.chains.start(
        token,
        worker_id,
        cluster_id,
        host,
        *this_process(),
        time.time(),
        run.settings.max_failures,
        successor=run.cluster.chains,
    )
    if isinstance(started, str):
        log.warning("this job does nothing: %s", started)
        return Ending(started)
    if run.cluster.name == "local":
        os.environ["CUDA_VISIBLE_DEVICES"] = started.worker.device or ""
    sys.path[:0] = [p for p in run.leaderboard.reader.run_row()["import_paths"] if p not in sys.path]

    def open_trainer() -> Any:
        from jobs.training import (
            open_session,  # torch takes seconds to import; only a job that trains needs it
        )

        return open_session(run.settings.model_dump(mode="json"), run.cluster.cores())

    worker = Worker(run.folder, run.settings, run.leaderboard, run.cluster, open_trainer, time.time, stop)
    return worker.run(started)


def _log_to(path: Path) -> None:
    """A line for each thing that happens: in the job's own output and in the worker's log."""
    formatter = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    for handler in (logging.StreamHandler(sys.stderr), logging.FileHandler(path)):
        handler.setFormatter(formatter)
        log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


# --- finding runs


def all_runs(runs_dir: Path) -> list[Path]:
    """The folders of runs, newest first."""
    if not runs_dir.is_dir():
        return []
    found = [p for p in runs_dir.iterdir() if not p.name.startswith(".") and (p / SETTINGS_NAME).is_file()]
    return sorted(found, key=lambda p: (p / SETTINGS_NAME).stat().st_mtime_ns, reverse=True)


def find_run(run: str | None, runs_dir: Path) -> Path:
    """A run by name or path; None: the newest. Raises RunError naming those there are."""
    known = all_runs(runs_dir)
    if run is None:
        if not known:
            raise RunError(f"there is no run in {runs_dir}; `orch launch settings/digits.json` makes one")
        return known[0]
    for folder in (runs_dir / run, Path(run)):
        if (folder / SETTINGS_NAME).is_file():
            return folder
    names = ", ".join(p.name for p in known[:10]) or "none"
    raise RunError(f"there is no run {run!r} in {runs_dir}; there are: {names}")


def iso(at: float | None) -> str | None:
    """A time for people and JSON: ISO 8601, UTC, to the second."""
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
