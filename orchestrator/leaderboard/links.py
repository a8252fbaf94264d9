"""Operations on single links of a chain, inside a transaction."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, update

from orchestrator.leaderboard.moves import job_of, log_event, set_state, worker_of
from orchestrator.leaderboard.schema import chunk, job, run, worker
from orchestrator.records import ChainJob, ChunkState, JobState, RunState, StopKind, Worker
from orchestrator.rules import failing, stopping, succession

OPEN = (JobState.SUBMITTING, JobState.QUEUED, JobState.RUNNING)
IS_OPEN = job.c.state.in_(OPEN)


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
    tx: Connection,
    job_id: int,
    state: JobState,
    outcome: str,
    now: float,
    starts: int | None = None,
    may_count: bool = True,
) -> bool:
    """Close a link. starts: how often the job had started when the caller saw it; None: ignore this. may_count: False
    if the failure that ended the job has been counted already. Returns False if the link is not open, or if the job has
    started again meanwhile."""
    where = [job.c.job_id == job_id, IS_OPEN]
    if starts is not None:
        where.append(job.c.starts == starts)
    was = tx.execute(select(job).where(*where)).one_or_none()
    if was is None:
        return False
    tx.execute(update(job).where(job.c.job_id == job_id).values(state=state, outcome=outcome, ended_at=now))
    finished = select(func.count()).where(
        chunk.c.job_id == job_id, chunk.c.finished_at.is_not(None), chunk.c.state != ChunkState.EXPIRED
    )
    failed_at = tx.execute(select(worker.c.failed_at).where(worker.c.worker_id == was.worker_id)).scalar_one()
    counts = succession.counts_as_failure(job_of(was), state, tx.execute(finished).scalar_one(), failed_at)
    if counts and may_count:
        count_failure(tx, was.worker_id, now)
    return True


def job_with(tx: Connection, token: str, worker_id: int) -> Row[Any] | None:
    return tx.execute(select(job).where(job.c.token == token, job.c.worker_id == worker_id)).one_or_none()


def why_no_successor(tx: Connection, worker_id: int, now: float, max_failures: int) -> tuple[Worker, str | None]:
    """Return the worker, and why its chain gets no further link (None if it gets one); see `should_resubmit`."""
    who = worker_of(tx.execute(select(worker).where(worker.c.worker_id == worker_id)).one())
    row = tx.execute(select(run.c.state, run.c.deadline)).one()
    return who, succession.should_resubmit(RunState(row.state), now, row.deadline, who, max_failures)


def settle(tx: Connection, now: float) -> None:
    """Check whether the run is over; if so, record its final state."""
    row = tx.execute(select(run.c.state, run.c.deadline)).one()
    states = tx.execute(select(job.c.state).where(IS_OPEN)).scalars().all()
    over = stopping.settled(RunState(row.state), now, row.deadline, len(states), states.count(JobState.RUNNING))
    if over is not None:
        set_state(tx, over.state, over.reason, now)


def stop_worker(tx: Connection, worker_id: int, reason: str, now: float) -> None:
    """Stop a chain that has failed too often. If every chain is now stopped, mark the run as failed."""
    stopped = update(worker).where(worker.c.worker_id == worker_id)
    tx.execute(stopped.values(stopped=reason, stop_kind=StopKind.FAILURES))
    log_event(tx, now, "worker stopped", worker_id=worker_id, reason=reason)
    left = tx.execute(select(func.count()).where(worker.c.stopped.is_(None))).scalar_one()
    if not left and tx.execute(select(run.c.state)).scalar_one() == RunState.ACTIVE:
        set_state(tx, RunState.FAILED, f"every worker has stopped; the last: {reason}", now)


def count_failure(
    tx: Connection, worker_id: int, now: float, early: str | None = None, message: str | None = None
) -> Worker:
    """Count a failure of a chain. early: its signature (see `failing.signature`) if it came before the first step;
    message: what failed. Stops the chain if its last failure was the same. Returns the worker as it is then."""
    this = worker.c.worker_id == worker_id
    earlier = tx.execute(select(worker.c.early_failure).where(this)).scalar_one()
    counted = {"failures": worker.c.failures + 1, "failed_at": now, "early_failure": early}
    tx.execute(update(worker).where(this).values(counted))
    who = worker_of(tx.execute(select(worker).where(this)).one())
    if not failing.repeats(earlier, early) or who.stopped is not None:
        return who
    reason = failing.why_it_ends(message or early or "")
    stop_worker(tx, worker_id, reason, now)
    return replace(who, stopped=reason)
