"""Bring the database and the cluster together: what is gone is closed, what is broken is mended, strays are ended.
Any peer does this when its job starts, and `orch status`, `resume` and `keep` do it from a login node."""

from __future__ import annotations

from orchestrator.cluster.protocol import Cluster
from orchestrator.errors import SubmissionError
from orchestrator.leaderboard.leaderboard import Leaderboard
from orchestrator.records import ChainJob, JobState, RunState
from orchestrator.rules import succession
from orchestrator.settings.settings import Settings


def reconcile(
    leaderboard: Leaderboard,
    cluster: Cluster,
    settings: Settings,
    now: float,
    grace_s: float = succession.SUBMITTING_GRACE_S,
) -> list[str]:
    """Bring the database and the cluster together: close what is gone, reap its claims, mend broken chains.

    Returns a line for each thing that was done. The cluster is asked outside every transaction.
    """
    snapshot = leaderboard.run_state.snapshot()
    if snapshot.state is not RunState.ACTIVE:
        grace_s = 0.0  # nobody waits for what is being submitted; should it come, it is cancelled
    evidence = cluster.evidence(snapshot.open_jobs)
    found = cluster.find([j for j in snapshot.open_jobs if j.cluster_id is None])
    todo = succession.mend(snapshot.workers, snapshot.open_jobs, evidence, found, now, grace_s)
    done = []
    if todo.lost or todo.adopt:
        endings = cluster.endings(todo.lost)
        reasons = {job.job_id: _gone(job, endings.get(job.job_id)) for job in todo.lost}
        leaderboard.chains.apply_mend(todo.lost, todo.adopt, now, reasons)
        done += [
            f"job {j.cluster_id or j.token} of worker {j.worker_id}: {reasons[j.job_id]}; its claim is free"
            for j in todo.lost
        ]
    if todo.resubmit and cluster.chains:
        wanted = leaderboard.chains.relink(todo.resubmit, now, settings.max_failures)
        done += submit_links(leaderboard, cluster, wanted, now)
    strays = leaderboard.reader.never_begun() + leaderboard.reader.awaited(now - succession.EXIT_GRACE_S)
    unwanted = succession.unwanted(snapshot.state, snapshot.open_jobs, evidence)
    if unwanted:  # hardly ever: no transaction more at each start of a job
        leaderboard.chains.close(unwanted, JobState.CANCELLED, f"the run is {snapshot.state}", now)
    cluster.cancel(strays + unwanted, now=True)  # asks first which of them are there at all
    leaderboard.run_state.settle(now)
    return done


def submit_links(leaderboard: Leaderboard, cluster: Cluster, links: list[ChainJob], now: float) -> list[str]:
    """Submit links that are written down; close those that the cluster does not take."""
    if not links:
        return []
    try:
        taken = cluster.submit(links, after=None)
    except SubmissionError as error:
        leaderboard.chains.close(links, JobState.LOST, str(error), now)
        return [f"the chains of workers {', '.join(str(j.worker_id) for j in links)} can't be mended now: {error}"]
    cluster.cancel(leaderboard.chains.submitted(taken), now=True)
    return [f"worker {j.worker_id} got a new job" for j in links]


def _gone(job: ChainJob, how: str | None) -> str:
    """For a job that died before it could say anything itself, its output is all there is to go by."""
    said = f"its job is gone ({how})" if how else "its job is gone"
    return said if job.started_at is not None else f"{said}; what it printed is in jobs/{job.base}*"
