"""Chains of jobs: which job may run, which chain gets a successor, and how to mend a broken chain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.messages import counted
from orchestrator.records import ChainJob, Evidence, JobState, RunState, Worker
from orchestrator.rules.stopping import lifetime_over

# How long the cluster may still list a job after the job reported its end. After this time, the job is cancelled, since
# its successor is waiting. (The job's process may hang, or Slurm's controller may have crashed and missed the end.)
EXIT_GRACE_S = 60.0
SUBMITTING_GRACE_S = 120.0  # after this, the process that was submitting a job is presumed dead
ORPHANED_GRACE_S = 10.0  # used if that process is known to be dead; not 0, since the cluster may list a job late


def refusal(job: ChainJob, cluster_id: str, followed: bool) -> str | None:
    """Return why a starting job must not run, or None if it may. job: as stored before the start. cluster_id: the id
    that it has now. followed: whether a later link of the chain has already started."""
    if job.state is JobState.CANCELLED:
        return f"this job was cancelled: {job.outcome}"
    if job.cluster_id not in (None, cluster_id):
        return f"this link is already job {job.cluster_id}; job {cluster_id} was submitted by mistake"
    if followed:
        return f"worker {job.worker_id} has already started a later link than this one (link {job.link})"
    return None


def counts_as_failure(job: ChainJob, ended_as: JobState, finished_chunks: int, failed_at: float | None = None) -> bool:
    """Does the end of this job count as a failure of its chain? Yes, if the job finished no chunk and was lost, either
    while it ran or after the cluster had accepted it (its set-up lines may have failed before Python started).

    failed_at: when the chain's last failure was counted. If this job was running then, the failure was that of its
    chunk, from which the process died afterwards; it is not counted a second time.
    """
    had_begun = job.state is JobState.RUNNING or (job.state is JobState.QUEUED and job.cluster_id is not None)
    counted = failed_at is not None and job.started_at is not None and failed_at >= job.started_at
    return ended_as is JobState.LOST and had_begun and not finished_chunks and not counted


def should_resubmit(state: RunState, now: float, deadline: float, worker: Worker, max_failures: int) -> str | None:
    """Return why this chain gets no successor, or None if it gets one."""
    if state is not RunState.ACTIVE:
        return f"the run is {state}"
    if lifetime_over(now, deadline):
        return "the run's total lifetime is over"
    if worker.stopped is not None:
        return worker.stopped
    if worker.failures >= max_failures:
        return f"{counted(worker.failures, 'failure')} in a row, {max_failures} allowed"
    return None


def jobs_at_most(total_lifetime_s: float, eon_lifetime_s: float) -> int:
    """Return how many links a chain has if each job runs for its full time and none waits in the queue."""
    return math.ceil(total_lifetime_s / eon_lifetime_s)


def job_to_show(links: Sequence[ChainJob]) -> ChainJob:
    """Return the link that represents its chain: the last running link, else the last queued link, else the last link
    that ever started, else the last link. links: at least one, in order."""

    def rank(job: ChainJob) -> int:
        if job.state is JobState.RUNNING:
            return 3
        return 2 if job.open else 1 if job.started_at else 0

    return max(reversed(links), key=rank)


class WorkerState(StrEnum):
    """The state of a worker, as `orch status` shows it."""

    QUEUED = "queued"
    RUNNING = "running"
    ENDED = "ended"
    LOST = "lost"


def shown_state(job: ChainJob, evidence: Evidence) -> WorkerState:
    """Return the state of a link in the database, corrected by evidence from the queue."""
    if job.state is JobState.LOST or (evidence is Evidence.GONE and job.state is not JobState.SUBMITTING):
        return WorkerState.LOST
    if job.state in (JobState.SUBMITTING, JobState.QUEUED):
        return WorkerState.QUEUED
    return WorkerState.RUNNING if job.state is JobState.RUNNING else WorkerState.ENDED


@dataclass(frozen=True, slots=True)
class Mend:
    """The changes that make the database and the cluster agree again."""

    lost: tuple[ChainJob, ...]  # proven gone: close the links and expire their claims
    adopt: tuple[tuple[ChainJob, str], ...]  # submitted, but the submitter died before it stored their cluster_id
    resubmit: tuple[int, ...]  # workers whose chain is broken


def mend(
    workers: Sequence[Worker],
    open_jobs: Sequence[ChainJob],
    evidence: Mapping[int, Evidence],
    found_ids: Mapping[str, str],
    now: float,
    grace_s: float = SUBMITTING_GRACE_S,
) -> Mend:
    """Compare the chains in the database with what the cluster reports.

    evidence: by job_id; a job without evidence is not changed. found_ids: for jobs whose row has no cluster_id, the ids
    that the cluster lists, by token. A chain is intact if it has an open job that is not lost. Each job submits its own
    successor, so a chain breaks if a job disappears before it has done this.
    """
    gone = [job for job in open_jobs if evidence.get(job.job_id, Evidence.UNKNOWN) is Evidence.GONE]
    submitting = {job.job_id: job for job in open_jobs if job.state is JobState.SUBMITTING and job.cluster_id is None}
    alive = {job.job_id for job in open_jobs} - {job.job_id for job in gone} - submitting.keys()
    adopt = tuple((job, found_ids[job.token]) for job in submitting.values() if job.token in found_ids)
    lost: dict[int, ChainJob] = {}
    for job in gone:
        if job.job_id in submitting:
            orphaned = job.after_job_id is not None and job.after_job_id not in alive
            patience_s = min(grace_s, ORPHANED_GRACE_S) if orphaned else grace_s
            if job.token in found_ids or now - (job.submitted_at or 0.0) <= patience_s:
                continue
        lost[job.job_id] = job
    whole = {job.worker_id for job in open_jobs if job.job_id not in lost}
    return Mend(tuple(lost.values()), adopt, tuple(w.worker_id for w in workers if w.worker_id not in whole))


def unwanted(state: RunState, open_jobs: Sequence[ChainJob], evidence: Mapping[int, Evidence]) -> list[ChainJob]:
    """Return the queued jobs of a run that no longer starts work. A queued job may have run before: Slurm requeues jobs
    after a node failure or preemption."""
    if state is RunState.ACTIVE:
        return []
    return [j for j in open_jobs if j.cluster_id is not None and evidence.get(j.job_id) is Evidence.QUEUED]
