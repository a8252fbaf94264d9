"""What happens to single links of a chain, inside a transaction."""

from __future__ import annotations

from sqlalchemy import Connection, func, insert, select, update

from orchestrator.leaderboard.moves import expire, log_event, set_state
from orchestrator.leaderboard.schema import chunk, job, run, worker
from orchestrator.records import ChainJob, ChunkState, JobState, RunState
from orchestrator.rules import stopping

OPEN = (JobState.SUBMITTING, JobState.QUEUED, JobState.RUNNING)


def add_link(tx: Connection, worker_id: int, after_job_id: int | None, token: str, now: float) -> ChainJob:
    last = tx.execute(select(func.max(job.c.link)).where(job.c.worker_id == worker_id)).scalar_one()
    link = 0 if last is None else last + 1
    job_id = tx.execute(
        insert(job).values(
            worker_id=worker_id,
            link=link,
            token=token,
            state=JobState.SUBMITTING,
            after_job_id=after_job_id,
            starts=0,
            submitted_at=now,
        )
    ).inserted_primary_key[0]  # type: ignore[index]
    return ChainJob(job_id, worker_id, link, token, JobState.SUBMITTING, after_job_id=after_job_id, submitted_at=now)


def close_link(
    tx: Connection, job_id: int, state: JobState, outcome: str, now: float, starts: int | None = None
) -> bool:
    where = [job.c.job_id == job_id, job.c.state.in_(OPEN)]
    if starts is not None:
        where.append(job.c.starts == starts)
    was = tx.execute(select(job).where(*where)).one_or_none()
    if was is None:
        return False
    tx.execute(update(job).where(job.c.job_id == job_id).values(state=state, outcome=outcome, ended_at=now))
    # In the queue no more, and never begun: it died before Python did, in its set-up lines, say.
    died = was.state == JobState.RUNNING or (was.state == JobState.QUEUED and was.cluster_id is not None)
    if state is JobState.LOST and died:
        finished = select(func.count()).where(chunk.c.job_id == job_id, chunk.c.finished_at.is_not(None))
        if not tx.execute(finished).scalar_one():
            count_failure(tx, was.worker_id)
    return True


def expire_claims(tx: Connection, job_id: int, reason: str, now: float) -> None:
    live = select(chunk.c.chunk_id).where(chunk.c.job_id == job_id, chunk.c.state == ChunkState.LIVE)
    expire(tx, tx.execute(live).scalars().all(), reason, now)


def settle(tx: Connection, now: float) -> None:
    """With its last job, a run that is draining, or whose lifetime is over, is finished."""
    row = tx.execute(select(run.c.state, run.c.deadline)).one()
    at_work = select(func.count()).where(job.c.state == JobState.RUNNING)
    if row.state == RunState.DRAINING and not tx.execute(at_work).scalar_one():
        set_state(tx, RunState.FINISHED, "drained by the user", now)
    over = row.state == RunState.ACTIVE and stopping.lifetime_over(now, row.deadline)
    if over and not tx.execute(select(func.count()).where(job.c.state.in_(OPEN))).scalar_one():
        set_state(tx, RunState.FINISHED, "the run's total lifetime is over", now)


def stop_worker(tx: Connection, worker_id: int, reason: str, now: float) -> None:
    tx.execute(update(worker).where(worker.c.worker_id == worker_id).values(stopped=reason))
    log_event(tx, now, "worker stopped", worker_id, None, None, reason=reason)
    left = tx.execute(select(func.count()).where(worker.c.stopped.is_(None))).scalar_one()
    if not left and tx.execute(select(run.c.state)).scalar_one() == RunState.ACTIVE:
        set_state(tx, RunState.FAILED, f"every worker has stopped; the last: {reason}", now)


def count_failure(tx: Connection, worker_id: int) -> None:
    tx.execute(update(worker).where(worker.c.worker_id == worker_id).values(failures=worker.c.failures + 1))
