"""Read-only queries for what the commands display."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from sqlalchemy import func, select

from orchestrator.leaderboard.engine import Database
from orchestrator.leaderboard.links import OPEN
from orchestrator.leaderboard.moves import IS_HELD, ON_BOARD, job_of
from orchestrator.leaderboard.run_state import best_first
from orchestrator.leaderboard.schema import checkpoint, chunk, entry, epoch, event, job, run
from orchestrator.profile import Metric
from orchestrator.records import ChainJob, ChunkState, JobState
from orchestrator.rules import succession

_ENTRY = (
    checkpoint.c.checkpoint_id.label("checkpoint"),
    checkpoint.c.score,
    checkpoint.c.epochs,
    entry.c.worked_on,
    select(func.count()).where(chunk.c.entry_id == entry.c.entry_id, IS_HELD).scalar_subquery().label("in_progress"),
    checkpoint.c.founder_id.label("founder"),
    checkpoint.c.parent_id.label("parent"),
    checkpoint.c.profile,
    checkpoint.c.worker_id.label("worker"),
    entry.c.promoted_at,
    checkpoint.c.file,
    checkpoint.c.sha256,
    entry.c.entry_id.label("entry"),
    entry.c.start_position,
    entry.c.floor.label("next_position"),
    checkpoint.c.metrics,
    checkpoint.c.test_metrics,
    checkpoint.c.tested_at,
)
_LATER = job.alias("later")


class Reader:
    """Queries on the database. Every method is one transaction and returns plain values."""

    def __init__(self, database: Database, metric: Metric) -> None:
        self._database = database
        self._metric = metric

    def entries(self) -> list[dict[str, Any]]:
        """Return the board, best first. Of two entries with equal scores, the older comes first."""
        with self._database.transaction() as tx:
            rows = tx.execute(
                select(*_ENTRY)
                .join(entry, entry.c.checkpoint_id == checkpoint.c.checkpoint_id)
                .where(ON_BOARD)
                .order_by(best_first(self._metric), entry.c.entry_id)
            ).all()
            return [{"rank": rank, **row._mapping} for rank, row in enumerate(rows, start=1)]

    def counts(self) -> dict[str, Any]:
        """Return the numbers of chunks and jobs in each state, of epochs, of training seconds and of expired claims."""
        with self._database.transaction() as tx:
            by_state = select(chunk.c.state, func.count()).group_by(chunk.c.state)
            chunks: dict[str, int] = {row[0]: row[1] for row in tx.execute(by_state)}
            by_state = select(job.c.state, func.count()).group_by(job.c.state)
            jobs: dict[str, int] = {row[0]: row[1] for row in tx.execute(by_state)}
            epochs, seconds = tx.execute(select(func.count(), func.sum(epoch.c.seconds)).select_from(epoch)).one()
            expirations = tx.execute(select(func.count()).where(event.c.kind == "expired")).scalar_one()
        return {
            "chunks": {"claimed": sum(chunks.values())} | {str(state): chunks.get(state, 0) for state in ChunkState},
            "epochs": epochs,
            "train_seconds": round(seconds or 0.0, 3),
            "jobs": {str(state): jobs.get(state, 0) for state in JobState},
            "expirations": expirations,
        }

    def last_jobs(self) -> dict[int, ChainJob]:
        """Return the job that represents each worker's chain (see `succession.job_to_show`)."""
        with self._database.transaction() as tx:
            links = [job_of(row) for row in tx.execute(select(job).order_by(job.c.worker_id, job.c.link)).all()]
        chains = groupby(links, key=lambda link: link.worker_id)
        return {worker_id: succession.job_to_show(list(chain)) for worker_id, chain in chains}

    def tokens(self) -> list[tuple[int, str, bool]]:
        """Return (worker, token, whether the job is open) for every job, ordered by worker and link."""
        with self._database.transaction() as tx:
            rows = tx.execute(select(job.c.worker_id, job.c.token, job.c.state).order_by(job.c.worker_id, job.c.link))
            return [(r.worker_id, r.token, r.state in OPEN) for r in rows.all()]

    def never_begun(self) -> list[ChainJob]:
        """Return the lost and cancelled jobs that never started. Such a job may still be in the queue after a crash of
        Slurm's controller."""
        with self._database.transaction() as tx:
            given_up = job.c.state.in_((JobState.LOST, JobState.CANCELLED))
            rows = tx.execute(select(job).where(given_up, job.c.started_at.is_(None), job.c.cluster_id.is_not(None)))
            return [job_of(row) for row in rows.all()]

    def awaited(self, ended_before: float) -> list[ChainJob]:
        """Return the jobs that reported their end before the given time, and whose queued successor has not started."""
        with self._database.transaction() as tx:
            rows = tx.execute(
                select(job)
                .join(_LATER, _LATER.c.after_job_id == job.c.job_id)
                .where(
                    job.c.state == JobState.ENDED,
                    job.c.ended_at < ended_before,
                    job.c.cluster_id.is_not(None),
                    _LATER.c.state == JobState.QUEUED,
                )
            )
            return [job_of(row) for row in rows.all()]

    def last_error(self) -> tuple[str, float] | None:
        """Return the latest error of any chunk and its time; None if there was no error."""
        at = func.coalesce(chunk.c.error_at, chunk.c.finished_at).label("at")  # before schema 3: the chunk's end
        with self._database.transaction() as tx:
            with_error = select(chunk.c.error, at).where(chunk.c.error.is_not(None), at.is_not(None))
            row = tx.execute(with_error.order_by(at.desc()).limit(1)).one_or_none()
            return None if row is None else (row.error, row.at)

    def recent_chunk_seconds(self) -> list[float]:
        """Return how long the last five finished chunks of this run took, latest last."""
        with self._database.transaction() as tx:
            query = (
                select(chunk.c.train_seconds)
                .where(chunk.c.finished_at.is_not(None), chunk.c.train_seconds.is_not(None))
                .order_by(chunk.c.finished_at.desc())
                .limit(5)
            )
            return list(tx.execute(query).scalars())[::-1]

    def rows(self, table: str) -> list[dict[str, Any]]:
        """Return a whole table, ordered by its primary key."""
        wanted = {t.name: t for t in (run, job, checkpoint, entry, chunk, epoch, event)}[table]
        with self._database.transaction() as tx:
            return [dict(r._mapping) for r in tx.execute(select(wanted).order_by(*wanted.primary_key.columns)).all()]

    def references(self) -> tuple[set[str], set[int]]:
        """Return the files that must be kept, and the generations of live claims, whose jobs may be writing files."""
        with self._database.transaction() as tx:
            on_board = select(checkpoint.c.file).join(entry, entry.c.checkpoint_id == checkpoint.c.checkpoint_id)
            files = set(tx.execute(on_board.where(ON_BOARD)).scalars())
            held = tx.execute(
                select(chunk.c.state, chunk.c.generation, chunk.c.suspended_file, checkpoint.c.file)
                .outerjoin(checkpoint, checkpoint.c.checkpoint_id == chunk.c.parent_id)
                .where(IS_HELD)
            ).all()
        files |= {name for row in held for name in (row.suspended_file, row.file) if name}
        return files, {row.generation for row in held if row.state == ChunkState.LIVE}
