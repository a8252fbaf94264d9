"""Reconcile the database with the queue: close jobs that are gone, mend broken chains, cancel unwanted jobs.

Every job does this when it starts; `orch status`, `resume` and `keep` do it from a login node.
"""

from __future__ import annotations

from orchestrator.cluster.protocol import JobQueue
from orchestrator.errors import SubmissionError
from orchestrator.files.run_folder import JOBS
from orchestrator.leaderboard.leaderboard import Leaderboard
from orchestrator.records import ChainJob, JobState, RunState
from orchestrator.rules import succession
from orchestrator.settings.settings import Settings


def reconcile(
    leaderboard: Leaderboard,
    queue: JobQueue,
    settings: Settings,
    now: float,
    grace_s: float = succession.SUBMITTING_GRACE_S,
) -> list[str]:
    """Close the jobs that are gone, free their claims, mend broken chains and cancel unwanted jobs.

    grace_s: how long a submitted job may take to appear in the queue. Returns a line for each change. The queue may
    answer slowly, so it is never queried inside a transaction.
    """
    snapshot = leaderboard.run_state.snapshot()
    if snapshot.state is not RunState.ACTIVE:
        grace_s = 0.0  # don't wait for jobs that are still being submitted: they are cancelled once they appear
    evidence = queue.evidence(snapshot.open_jobs)
    found_ids = queue.find([j for j in snapshot.open_jobs if j.cluster_id is None])
    todo = succession.mend(snapshot.workers, snapshot.open_jobs, evidence, found_ids, now, grace_s)
    done = []
    if todo.lost or todo.adopt:
        endings = queue.endings(todo.lost)
        reasons = {job.job_id: _gone(job, endings.get(job.job_id)) for job in todo.lost}
        leaderboard.chains.apply_mend(todo.lost, todo.adopt, now, reasons)
        done += [
            f"job {j.cluster_id or j.token} of worker {j.worker_id}: {reasons[j.job_id]}; its claim is released"
            for j in todo.lost
        ]
    if todo.resubmit and queue.chains:
        links = leaderboard.chains.relink(todo.resubmit, now, settings.max_failures)
        try:
            if links:
                submit_links(leaderboard, queue, links, now)
            done += [f"worker {j.worker_id} got a new job" for j in links]
        except SubmissionError as error:
            workers = ", ".join(str(j.worker_id) for j in links)
            done.append(f"the chains of workers {workers} can't be repaired now: {error}")
    unneeded = leaderboard.reader.never_begun() + leaderboard.reader.awaited(now - succession.EXIT_GRACE_S)
    unwanted = succession.unwanted(snapshot.state, snapshot.open_jobs, evidence)
    if unwanted:  # there are usually none, so this check saves a transaction at each start of a job
        leaderboard.chains.close(unwanted, JobState.CANCELLED, f"the run is {snapshot.state}", now)
    queue.cancel(unneeded + unwanted, now=True)  # the queue skips jobs that no longer exist
    leaderboard.run_state.settle(now)
    return done


def submit_links(leaderboard: Leaderboard, queue: JobQueue, links: list[ChainJob], now: float) -> None:
    """Submit links that are already in the database. If they are refused, close them and raise SubmissionError."""
    try:
        taken = queue.submit(links, after=None)
    except SubmissionError as error:
        leaderboard.chains.close(links, JobState.LOST, str(error), now)
        raise
    queue.cancel(leaderboard.chains.submitted(taken), now=True)


def _gone(job: ChainJob, how: str | None) -> str:
    """Describe how a job was lost. A job that never started has no log; its output files may show why, so name them."""
    gone = f"its job is gone ({how})" if how else "its job is gone"
    return gone if job.started_at is not None else f"{gone}; its output is in {JOBS}/{job.base}*"
