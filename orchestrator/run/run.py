"""A run: launch, open, resume, cancel, look at. What the command line and the Python API call."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator.errors import RunError, SubmissionError
from orchestrator.files import atomic
from orchestrator.files.run_folder import SETTINGS_NAME
from orchestrator.leaderboard.engine import CONNECT_FOR_S
from orchestrator.leaderboard.run_state import Snapshot
from orchestrator.messages import iso
from orchestrator.records import ChainJob, Evidence, JobState, RunState
from orchestrator.rules import stopping, succession
from orchestrator.settings import loading
from orchestrator.worker.job_main import be_worker, job_main
from orchestrator.worker.mending import reconcile
from orchestrator.worker.opened_run import OpenedRun
from orchestrator.worker.trainer import Ending, StopFlag

HOLDABLE = (RunState.ACTIVE, RunState.PAUSED, RunState.DRAINING, RunState.CANCELLED, RunState.FAILED)

log = logging.getLogger("orch")


class Run(OpenedRun):
    """A run that exists, with everything that the command line and the Python API do to it."""

    @classmethod
    def open(cls, folder: Path, connect_for_s: float = CONNECT_FOR_S) -> Run:
        """See `OpenedRun.opened`."""
        return cls.opened(folder, job_main, connect_for_s)

    # --- making and finding

    def grow(self, now: float) -> list[str]:
        """Add the workers that the settings want and the run does not have; all of them or none."""
        from orchestrator.cluster.host import gpus_of

        have = len(self.leaderboard.chains.workers())
        missing = range(have, self.settings.workers)
        if not missing:
            return []
        local = self.settings.executor == "local"
        devices = gpus_of(missing, self.settings.gpus_per_worker) if local else [None for _ in missing]
        jobs = self.leaderboard.chains.add_workers(devices, now)
        try:
            taken = self.cluster.submit(jobs, after=None)
        except SubmissionError as error:
            self.leaderboard.chains.close(jobs, JobState.LOST, str(error), now)
            raise
        self.cluster.cancel(self.leaderboard.chains.submitted(taken), now=True)
        return [f"worker {job.worker_id} joins" for job in jobs]

    # --- control

    def resume(self, now: float) -> list[str]:
        """Start what is not running: every chain gets its job back. Idempotent; a line for each thing done.

        Raises RunError if the run is over: its lifetime, or a stop rule that still holds.
        """
        snapshot = self.refuse_if_over(now)
        # What was being submitted when the run stopped is given up now; afterwards, another `resume` may be submitting.
        closed = [] if snapshot.state is RunState.ACTIVE else self.reconcile(now)
        self.leaderboard.run_state.revive(self.settings.workers)
        self.leaderboard.run_state.change_state(RunState.ACTIVE, list(RunState), None, now)
        return closed + self.grow(now) + self.reconcile(now)

    def refuse_if_over(self, now: float) -> Snapshot:
        """Raises RunError if the run's lifetime is over, or a stop rule still holds."""
        snapshot = self.leaderboard.run_state.snapshot()
        policy = self.settings.policy(self.version)
        stopped = stopping.converged(snapshot.progress, policy.stop, policy.metric)
        over = stopping.run_over(now, snapshot.deadline, stopped)
        if over is not None:
            raise RunError(
                f"{self.name} is over: {over.reason}. `orch amend {self.name} --set ...` changes what ends it "
                "(total_lifetime, stop_after_stale_cycles, stop_at_score, stop_after_epochs)"
            )
        return snapshot

    def reconcile(self, now: float, grace_s: float = succession.SUBMITTING_GRACE_S) -> list[str]:
        """See `mending.reconcile`."""
        return reconcile(self.leaderboard, self.cluster, self.settings, now, grace_s)

    def pause(self, now: float) -> list[str]:
        """Running jobs finish their chunk and end; none is queued until `resume`."""
        return self._hold(RunState.PAUSED, "paused by the user", now)

    def drain(self, now: float) -> list[str]:
        """Running jobs finish their chunk and end, and with the last of them the run is finished."""
        return self._hold(RunState.DRAINING, "drained by the user", now)

    def cancel(self, at_once: bool, now: float) -> list[str]:
        """End the run: no chunk and no job starts any more. Running jobs suspend their chunk and end, or are
        killed if at_once. Returns what could not be done."""
        trouble = self._hold(RunState.CANCELLED, "cancelled by the user", now)
        running = self.leaderboard.run_state.snapshot().open_jobs
        return trouble + self.cluster.cancel([j for j in running if j.state is JobState.RUNNING], at_once)

    def _hold(self, state: RunState, reason: str, now: float) -> list[str]:
        """Change the state and take the queued jobs out of the queue. Returns what could not be done."""
        if self.leaderboard.run_state.change_state(state, HOLDABLE, reason, now) not in HOLDABLE:
            return []  # the run is over: there is nothing to hold
        jobs = self.leaderboard.run_state.snapshot().open_jobs
        seen = self.cluster.evidence(jobs)  # Slurm may have put a job back that was running
        queued = [j for j in jobs if j.state is not JobState.RUNNING or seen[j.job_id] is Evidence.QUEUED]
        trouble = self.cluster.cancel(queued, now=True)
        self.leaderboard.chains.close(queued, JobState.CANCELLED, reason, now)
        return trouble

    def amend(self, overrides: Sequence[str], now: float) -> list[str]:
        """Change settings of the run, in force at each worker's next claim. A line for each change.

        Raises SettingsError for what can't be changed or is not valid; then nothing is changed.
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
        self.settings, self.version, self._cluster = amended, self.version + 1, None
        trouble = self.cluster.cancel(surplus, now=True)
        if run_state.snapshot().state is RunState.ACTIVE:
            changes += self.grow(now) + self.reconcile(now)
        return changes + trouble

    def keep(self, every_s: float, clock: Callable[[], float], sleep: Callable[[float], None]) -> None:
        """Mend chains from a login node until the run is over, where compute nodes can't submit jobs."""
        while True:
            for line in self.reconcile(clock()):
                log.info("%s", line)
            snapshot = self.leaderboard.run_state.snapshot()
            over = snapshot.state is not RunState.ACTIVE or stopping.lifetime_over(clock(), snapshot.deadline)
            if over and not snapshot.open_jobs:
                return
            sleep(every_s)

    def work_inline(self) -> Ending:
        """Be the run's only worker, in this process (the inline executor): job after job, until the run is over,
        the worker has failed too often, or a signal says stop."""
        from orchestrator.worker.user_job import apart_from_stdout

        chains, stop = self.leaderboard.chains, StopFlag()
        while True:
            links = chains.relink([0], time.time(), self.settings.max_failures)
            job = (links or [j for j in self.leaderboard.run_state.snapshot().open_jobs if j.worker_id == 0])[0]
            with apart_from_stdout():
                ending = be_worker(self, job.token, 0, stop)
            if stop.reason or not chains.wants_successor(0, time.time(), self.settings.max_failures):
                return ending

    # --- looking

    def board(self) -> dict[str, Any]:
        entries = self.leaderboard.reader.entries()
        for entry in entries:
            entry["promoted_at"] = iso(entry["promoted_at"])
            entry["tested_at"] = iso(entry["tested_at"])
        return {
            "run": self.name,
            "metric": asdict(self.settings.metric),
            "num_models": self.settings.num_models,
            "select_on": self.settings.select_on,
            "founders": len({e["founder"] for e in entries}),  # how many lineages are left
            "entries": entries,
        }

    def summary(self) -> dict[str, Any]:
        """A line of `orch runs`: from the database alone."""
        snapshot = self.leaderboard.run_state.snapshot()
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
        snapshot = self.leaderboard.run_state.snapshot()
        evidence = self.cluster.evidence(snapshot.open_jobs)
        counts = self.leaderboard.reader.counts()
        error, failed_at = self.leaderboard.reader.last_error() or (None, None)
        return {
            "run": self.name,
            "folder": str(self.folder),
            "state": str(snapshot.state),
            "reason": snapshot.reason,
            "created_at": iso(snapshot.created_at),
            "deadline": iso(snapshot.deadline),
            "executor": self.cluster.name,
            "lock": str(self.leaderboard.database.lock_choice or "the database server's"),
            "best": snapshot.progress.best_score,
            "workers": [_worker_status(job, evidence) for job in self.leaderboard.reader.last_jobs().values()],
            "last_error": error,
            "last_error_at": iso(failed_at),
            "logs": str(self.folder / "logs"),
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
