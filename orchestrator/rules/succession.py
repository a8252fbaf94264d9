"""Chains of jobs: which job may work, who gets a successor, and what mends a broken chain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.messages import counted
from orchestrator.records import ChainJob, Evidence, JobState, RunState, Worker
from orchestrator.rules.stopping import lifetime_over

# A job is gone within this time after it reported its end. If not (its process hangs, or the controller missed its end
# in a crash), it is cancelled, since its successor waits for it.
EXIT_GRACE_S = 60.0
SUBMITTING_GRACE_S = 120.0  # after this, the process that was submitting a job is taken for dead
ORPHANED_GRACE_S = 10.0  # the same where that process is known to be dead: the cluster may list the job a little later


def refusal(job: ChainJob, cluster_id: str, followed: bool) -> str | None:
    """Why a job that begins must not work; None: it may. job: its link, as it was before. cluster_id: its own.
    followed: a later link of its chain has begun already."""
    if job.state is JobState.CANCELLED:
        return f"this job was cancelled: {job.outcome}"
    if job.cluster_id not in (None, cluster_id):
        return f"this job is job {job.cluster_id} already; {cluster_id} was submitted by mistake"
    if followed:
        return f"a later link of worker {job.worker_id} than this one (link {job.link}) has begun already"
    return None


def counts_as_failure(job: ChainJob, ended_as: JobState, finished_chunks: int) -> bool:
    """Does the end of this job count against its chain? If it was lost while it worked, or vanished from the queue (it
    may have died in its set-up lines, before Python started), and has finished no chunk."""
    had_begun = job.state is JobState.RUNNING or (job.state is JobState.QUEUED and job.cluster_id is not None)
    return ended_as is JobState.LOST and had_begun and not finished_chunks


def should_resubmit(state: RunState, now: float, deadline: float, worker: Worker, max_failures: int) -> str | None:
    """Why this chain gets no successor, or None if it gets one."""
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
    """Links of one chain, if each works its whole time and none waits in the queue."""
    return math.ceil(total_lifetime_s / eon_lifetime_s)


def job_to_show(links: Sequence[ChainJob]) -> ChainJob:
    """The link that represents its chain: the one that works, else the last in the queue, else the last that worked,
    else the last. links: at least one, in their order."""

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
    """The state of a link in the database, corrected by what the queue proved."""
    if job.state is JobState.LOST or (evidence is Evidence.GONE and job.state is not JobState.SUBMITTING):
        return WorkerState.LOST
    if job.state in (JobState.SUBMITTING, JobState.QUEUED):
        return WorkerState.QUEUED
    return WorkerState.RUNNING if job.state is JobState.RUNNING else WorkerState.ENDED


@dataclass(frozen=True, slots=True)
class Mend:
    """What brings the database and the cluster together again."""

    lost: tuple[ChainJob, ...]  # proved gone: close them and expire their claims
    adopt: tuple[tuple[ChainJob, str], ...]  # submitted, but their worker died before it wrote the cluster's id down
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

    evidence: by job_id; a job without evidence is left alone. found_ids: the cluster's ids, by token, of jobs whose
    row has none. A chain with an open job that is not lost is whole. Each job submits its successor, so if that job is
    gone, no process is about to submit the successor any more.
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
    """Jobs in the queue of a run that starts no work any more. One of them may have begun before: Slurm puts a job
    back when its node fails or it is preempted."""
    if state is RunState.ACTIVE:
        return []
    return [j for j in open_jobs if j.cluster_id is not None and evidence.get(j.job_id) is Evidence.QUEUED]
