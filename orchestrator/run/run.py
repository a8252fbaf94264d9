"""Control an existing run and read its state, for the command line and the Python API."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator.cluster.host import gpus_of
from orchestrator.cluster.inline import InlineJob
from orchestrator.errors import RunError
from orchestrator.files import atomic
from orchestrator.files.run_folder import DATA_NAME, LOGS, SETTINGS_NAME
from orchestrator.leaderboard.engine import CONNECT_FOR_S, JOB_CONNECTS_FOR_S
from orchestrator.leaderboard.run_state import Snapshot
from orchestrator.messages import iso
from orchestrator.records import ChainJob, Evidence, JobState, RunState
from orchestrator.rules import stopping, succession
from orchestrator.settings import loading
from orchestrator.worker.job_main import be_worker, job_main
from orchestrator.worker.mending import reconcile, submit_links
from orchestrator.worker.opened_run import OpenedRun
from orchestrator.worker.trainer import Ending, StopFlag
from orchestrator.worker.user_job import apart_from_stdout

OVER = (RunState.CONVERGED, RunState.FINISHED)  # the run has ended by itself: it can't be paused, drained or cancelled
STOPPED = (*OVER, RunState.PAUSED, RunState.CANCELLED, RunState.FAILED)  # jobs that still run will end soon
HOLDABLE = tuple(state for state in RunState if state not in OVER)

log = logging.getLogger("orch")


class Run(OpenedRun):
    """An existing run, with all operations of the command line and the Python API."""

    @classmethod
    def open(cls, folder: Path, connect_for_s: float = CONNECT_FOR_S) -> Run:
        """See `OpenedRun.opened`."""
        return cls.opened(folder, job_main, connect_for_s)

    def grow(self, now: float) -> list[str]:
        """Add all missing workers. If their jobs are refused, add none and raise SubmissionError."""
        have = len(self.leaderboard.chains.workers())
        missing = range(have, self.settings.workers)
        if not missing:
            return []
        local = self.settings.executor == "local"
        devices = gpus_of(missing, self.settings.gpus_per_worker) if local else [None for _ in missing]
        jobs = self.leaderboard.chains.add_workers(devices, now)
        submit_links(self.leaderboard, self.queue, jobs, now)
        return [f"worker {job.worker_id} joins" for job in jobs]

    # --- control

    def resume(self, now: float) -> list[str]:
        """Activate the run from any state, and queue a job for each chain without one. Returns a line for each change.

        Raises RunError if the run's lifetime is over, or a stop rule is still met.
        """
        snapshot = self.refuse_if_over(now)
        # Close the jobs whose submission was interrupted when the run stopped, before the run is active again. In an
        # active run, they can't be distinguished from jobs that another `resume` is submitting.
        closed = [] if snapshot.state is RunState.ACTIVE else self.reconcile(now)
        self.leaderboard.run_state.revive(self.settings.workers)
        self.leaderboard.run_state.change_state(RunState.ACTIVE, list(RunState), None, now)
        return closed + self.grow(now) + self.reconcile(now)

    def refuse_if_over(self, now: float) -> Snapshot:
        """Return a snapshot of the run. Raises RunError if its lifetime is over, or a stop rule is still met."""
        snapshot = self.leaderboard.run_state.snapshot()
        policy = self.settings.policy(self.version)
        stopped = stopping.converged(snapshot.progress, policy.stop, policy.metric)
        over = stopping.run_over(now, snapshot.deadline, stopped)
        if over is not None:
            raise RunError(
                f"{self.name} is over: {over.reason}. Use `orch amend {self.name} --set ...` to extend it "
                "(total_lifetime, stop_after_stale_cycles, stop_at_score, stop_after_epochs)"
            )
        return snapshot

    def reconcile(self, now: float, grace_s: float = succession.SUBMITTING_GRACE_S) -> list[str]:
        """See `mending.reconcile`."""
        return reconcile(self.leaderboard, self.queue, self.settings, now, grace_s)

    def pause(self, now: float) -> list[str]:
        """Let running jobs finish their chunks and end; no job is queued until `resume`."""
        return self._hold(RunState.PAUSED, "paused by the user", now)

    def drain(self, now: float) -> list[str]:
        """Let running jobs finish their chunks and end; when the last job has ended, the run is finished."""
        return self._hold(RunState.DRAINING, "drained by the user", now)

    def cancel(self, at_once: bool, now: float) -> list[str]:
        """End the run: no more chunks or jobs start. Running jobs suspend their chunks and end. at_once: kill the jobs
        instead. Returns a line for each failure."""
        trouble = self._hold(RunState.CANCELLED, "cancelled by the user", now)
        running = self.leaderboard.run_state.snapshot().open_jobs
        return trouble + self.queue.cancel([j for j in running if j.state is JobState.RUNNING], at_once)

    def _hold(self, state: RunState, reason: str, now: float) -> list[str]:
        """Change the run's state and remove waiting jobs from the queue. Returns a line for each failure."""
        if self.leaderboard.run_state.change_state(state, HOLDABLE, reason, now) not in HOLDABLE:
            return []
        jobs = self.leaderboard.run_state.snapshot().open_jobs
        evidence = self.queue.evidence(jobs)  # Slurm may have requeued a job that is RUNNING in the database
        queued = [j for j in jobs if j.state is not JobState.RUNNING or evidence[j.job_id] is Evidence.QUEUED]
        trouble = self.queue.cancel(queued, now=True)
        self.leaderboard.chains.close(queued, JobState.CANCELLED, reason, now)
        return trouble

    def amend(self, overrides: Sequence[str], now: float) -> list[str]:
        """Change settings of the run; workers use the new values from their next claim. Returns a line for each change.

        Raises SettingsError if a setting can't be changed or a value is invalid; then nothing is changed.
        """
        amended = loading.amend(self.settings, overrides)
        changes = loading.difference(self.settings, amended)
        if not changes:
            return []
        frozen = loading.freeze(amended)
        run_state = self.leaderboard.run_state
        deadline = run_state.snapshot().created_at + amended.total_lifetime
        other_profiles = amended.training_profiles != self.settings.training_profiles
        surplus = run_state.amend(
            frozen, deadline, amended.workers, "; ".join(changes), now, profiles_changed=other_profiles
        )
        atomic.publish(self.folder / SETTINGS_NAME, lambda target: target.write(f"{frozen}\n".encode()))
        self.use(amended, self.version + 1)
        trouble = self.queue.cancel(surplus, now=True)
        if run_state.snapshot().state is RunState.ACTIVE:
            changes += self.grow(now) + self.reconcile(now)
        return changes + trouble

    def keep(self, every_s: float, clock: Callable[[], float], sleep: Callable[[float], None]) -> None:
        """Repair chains from a login node until the run is over, for clusters whose compute nodes can't submit jobs."""
        while True:
            for line in self.reconcile(clock()):
                log.info("%s", line)
            snapshot = self.leaderboard.run_state.snapshot()
            over = snapshot.state is not RunState.ACTIVE or stopping.lifetime_over(clock(), snapshot.deadline)
            if over and not snapshot.open_jobs:
                return
            sleep(every_s)

    def work_inline(self) -> Ending:
        """Run the only worker of an inline run in this process, job after job, until the run is over, the worker has
        failed too often, or a signal stops it."""
        run = Run.open(self.folder, JOB_CONNECTS_FOR_S)
        chains, stop = run.leaderboard.chains, StopFlag()
        while True:
            links = chains.relink([0], time.time(), run.settings.max_failures)
            job = (links or [j for j in run.leaderboard.run_state.snapshot().open_jobs if j.worker_id == 0])[0]
            with apart_from_stdout(), stop.listening():
                ending = be_worker(run, InlineJob(run.settings, job.token), 0, stop)
            if stop.reason or not chains.wants_successor(0, time.time(), run.settings.max_failures):
                return ending

    # --- reading

    def board(self) -> dict[str, Any]:
        """Return the leaderboard in the format of `orch leaderboard --json`."""
        entries = self.leaderboard.reader.entries()
        for entry in entries:
            entry["promoted_at"] = iso(entry["promoted_at"])
            entry["tested_at"] = iso(entry["tested_at"])
        return {
            "run": self.name,
            "metric": asdict(self.settings.metric),
            "num_models": self.settings.num_models,
            "select_on": self.settings.select_on,
            "data": self.data_source(),
            "founders": len({e["founder"] for e in entries}),  # number of lineages on the board
            "entries": entries,
        }

    def data_source(self) -> dict[str, Any] | None:
        """Return where the training data come from; None if the job did not know at launch."""
        try:
            source: dict[str, Any] = json.loads((self.folder / DATA_NAME).read_bytes())
        except (OSError, ValueError):
            return None
        return source

    def summary(self, snapshot: Snapshot | None = None) -> dict[str, Any]:
        """Return the data for a line of `orch runs`, from the database only. snapshot: the run's; None: read it now."""
        snapshot = snapshot or self.leaderboard.run_state.snapshot()
        return {
            "run": self.name,
            "folder": str(self.folder),
            "state": snapshot.state,
            "reason": snapshot.reason,
            "best": snapshot.progress.best_score,
            "epochs": snapshot.progress.epochs,
            "created_at": iso(snapshot.created_at),
            "deadline": iso(snapshot.deadline),
        }

    def status(self) -> dict[str, Any]:
        """Return the state of the run and its workers in the format of `orch status --json`."""
        snapshot = self.leaderboard.run_state.snapshot()
        evidence = self.queue.evidence(snapshot.open_jobs)
        counts = self.leaderboard.reader.counts()
        error, failed_at = self.leaderboard.reader.last_error() or (None, None)
        return self.summary(snapshot) | {
            "executor": self.queue.name,
            "lock": str(self.leaderboard.database.lock_choice or "the database server's"),
            "workers": [_worker_status(job, evidence) for job in self.leaderboard.reader.last_jobs().values()],
            "last_error": error,
            "last_error_at": iso(failed_at),
            "logs": str(self.folder / LOGS),
            "data": self.data_source(),
            "warnings": stopping.warnings(counts["chunks"], self.settings.metric.name),
            **counts,
        }


def _worker_status(job: ChainJob, evidence: dict[int, Evidence]) -> dict[str, Any]:
    return {
        "worker": job.worker_id,
        "state": succession.shown_state(job, evidence.get(job.job_id, Evidence.UNKNOWN)),
        "job": job.cluster_id,
        "node": job.host.split("/")[0] if job.host else None,
        "link": job.link,
        "outcome": job.outcome,
    }
