"""Chains of jobs: who gets a successor, and what mends a broken chain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.messages import counted
from orchestrator.records import ChainJob, Evidence, JobState, RunState, Worker
from orchestrator.rules.stopping import lifetime_over


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


@dataclass(frozen=True, slots=True)
class Mend:
    """What brings the database and the cluster together again."""

    lost: tuple[ChainJob, ...]  # their jobs are gone: close them, reap their claims
    adopt: tuple[tuple[ChainJob, str], ...]  # submitted, but its worker died before it could write the cluster's id
    resubmit: tuple[int, ...]  # workers whose chain is broken


# A job that has said its last word is gone so soon. One that the cluster holds on to (its process hangs at its
# end, or the controller missed it in a crash) would keep its successor waiting until its time limit: it is cancelled.
EXIT_GRACE_S = 60.0


# A job that is being submitted for longer than this is treated as one whose submitter died.
SUBMITTING_GRACE_S = 120.0


# Where it did die, only the cluster may still be about to list what it was sent.
ORPHANED_GRACE_S = 10.0


def mend(
    workers: Sequence[Worker],
    open_jobs: Sequence[ChainJob],
    evidence: Mapping[int, Evidence],
    found_ids: Mapping[str, str],
    now: float,
    grace_s: float = SUBMITTING_GRACE_S,
) -> Mend:
    """Compare the chains of the database with what the cluster says.

    evidence is by job_id; found_ids are the cluster's ids of the jobs whose row has none, by token. Nothing
    is done about a job of which the cluster says nothing. A chain with any open job left is whole. A successor is
    submitted by the job before it, so that one's end tells that nobody is about to submit it any more.
    """
    gone = [job for job in open_jobs if evidence.get(job.job_id, Evidence.UNKNOWN) is Evidence.GONE]
    on_their_way = {job.job_id: job for job in open_jobs if job.state is JobState.SUBMITTING and job.cluster_id is None}
    alive = {job.job_id for job in open_jobs} - {job.job_id for job in gone} - on_their_way.keys()
    adopt = tuple((job, found_ids[job.token]) for job in on_their_way.values() if job.token in found_ids)
    lost: dict[int, ChainJob] = {}
    for job in gone:
        if job.job_id in on_their_way:
            orphaned = job.after_job_id is not None and job.after_job_id not in alive
            patience_s = min(grace_s, ORPHANED_GRACE_S) if orphaned else grace_s
            if job.token in found_ids or now - (job.submitted_at or 0.0) <= patience_s:
                continue
        lost[job.job_id] = job
    held = {job.worker_id for job in open_jobs if job.job_id not in lost}
    return Mend(tuple(lost.values()), adopt, tuple(w.worker_id for w in workers if w.worker_id not in held))


def unwanted(state: RunState, open_jobs: Sequence[ChainJob], evidence: Mapping[int, Evidence]) -> list[ChainJob]:
    """Jobs that wait in the queue of a run that starts no work any more. One that had begun is there if Slurm put
    it back (a node failed, it was preempted) after the others were taken out."""
    if state is RunState.ACTIVE:
        return []
    return [j for j in open_jobs if j.cluster_id is not None and evidence.get(j.job_id) is Evidence.QUEUED]
