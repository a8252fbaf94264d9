"""What is shown: the board, the counts, the events. Reads only, but for the test scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Row, func, select, update

from orchestrator.errors import StaleClaimError
from orchestrator.leaderboard.engine import Database
from orchestrator.leaderboard.links import OPEN
from orchestrator.leaderboard.moves import IS_HELD, ON_BOARD, REAPED, job_of, log_event
from orchestrator.leaderboard.schema import checkpoint, chunk, entry, epoch, event, job, run
from orchestrator.records import ChainJob, ChunkState, JobState, Metric

later_job = job.alias("later")


class Reader:
    """Every method is one transaction and returns plain values."""

    def __init__(self, database: Database, metric: Metric) -> None:
        self._database = database
        self._metric = metric

    def run_row(self) -> dict[str, Any]:
        with self._database.transaction() as tx:
            return dict(tx.execute(select(run)).one()._mapping)

    def origin(self) -> dict[str, Any]:
        """What each checkpoint's record repeats of the run's row, so that it can be written again without it."""
        with self._database.transaction() as tx:
            row = tx.execute(select(run.c.created_at, run.c.import_paths)).one()
            return {"launched_at": row.created_at, "import_paths": row.import_paths}

    def settings(self) -> tuple[str, int]:
        """The run's settings as JSON, and their version."""
        with self._database.transaction() as tx:
            row = tx.execute(select(run.c.settings, run.c.settings_version)).one()
            return row.settings, row.settings_version

    def entries(self) -> list[dict[str, Any]]:
        """The board, best first; equals in the order they came."""
        with self._database.transaction() as tx:
            order = checkpoint.c.score.desc() if self._metric.mode == "max" else checkpoint.c.score.asc()
            held = select(func.count()).where(chunk.c.entry_id == entry.c.entry_id, IS_HELD).scalar_subquery()
            rows = tx.execute(
                select(
                    checkpoint,
                    entry.c.entry_id,
                    entry.c.worked_on,
                    entry.c.promoted_at,
                    entry.c.start_position,
                    entry.c.floor,
                    held.label("in_progress"),
                )
                .join(checkpoint, checkpoint.c.checkpoint_id == entry.c.checkpoint_id)
                .where(ON_BOARD)
                .order_by(order, entry.c.entry_id)
            ).all()
            return [_entry_row(rank, row) for rank, row in enumerate(rows, start=1)]

    def counts(self) -> dict[str, Any]:
        """Chunks by state, epochs and seconds of training, chunks by worker."""
        with self._database.transaction() as tx:
            by_state = select(chunk.c.state, func.count()).group_by(chunk.c.state)
            states: dict[str, int] = {row[0]: row[1] for row in tx.execute(by_state)}
            seconds = tx.execute(select(func.sum(epoch.c.seconds))).scalar_one()
            epochs = tx.execute(select(func.count()).select_from(epoch)).scalar_one()
            by_state = select(job.c.state, func.count()).group_by(job.c.state)
            jobs: dict[str, int] = {row[0]: row[1] for row in tx.execute(by_state)}
            events = tx.execute(select(func.count()).where(event.c.kind == "expired")).scalar_one()
        return {
            "chunks": {
                "claimed": sum(states.values()),
                "promoted": states.get(ChunkState.PROMOTED, 0),
                "discarded": states.get(ChunkState.DISCARDED, 0),
                "expired": states.get(ChunkState.EXPIRED, 0),
                "failed": states.get(ChunkState.FAILED, 0),
                "live": states.get(ChunkState.LIVE, 0),
                "suspended": states.get(ChunkState.SUSPENDED, 0),
            },
            "epochs": epochs,
            "train_seconds": round(seconds or 0.0, 3),
            "jobs": {str(state): jobs.get(state, 0) for state in JobState},
            "expirations": events,
        }

    def last_jobs(self) -> dict[int, dict[str, Any]]:
        """Of each worker the job that works, else the one in the queue, else the last that did."""
        with self._database.transaction() as tx:
            rows = tx.execute(select(job).order_by(job.c.worker_id, job.c.link)).all()
        chosen: dict[int, Row[Any]] = {}
        for row in rows:
            had = chosen.get(row.worker_id)
            if had is None or _prominence(row) >= _prominence(had):
                chosen[row.worker_id] = row
        return {worker_id: dict(row._mapping) for worker_id, row in chosen.items()}

    def tokens(self) -> list[tuple[int, str, bool]]:
        """(worker, token, open?) of every job, each chain in its order."""
        with self._database.transaction() as tx:
            rows = tx.execute(select(job.c.worker_id, job.c.token, job.c.state).order_by(job.c.worker_id, job.c.link))
            return [(r.worker_id, r.token, r.state in OPEN) for r in rows.all()]

    def never_begun(self) -> list[ChainJob]:
        """Jobs that were given up before they began. One that is in the queue all the same is a stray: a
        controller that crashed may remember a job that it had forgotten."""
        with self._database.transaction() as tx:
            given_up = job.c.state.in_((JobState.LOST, JobState.CANCELLED))
            rows = tx.execute(select(job).where(given_up, job.c.started_at.is_(None), job.c.cluster_id.is_not(None)))
            return [job_of(row) for row in rows.all()]

    def awaited(self, ended_before: float) -> list[ChainJob]:
        """Jobs that ended by their own word before this time, and whose successor has not begun."""
        after = later_job
        with self._database.transaction() as tx:
            rows = tx.execute(
                select(job)
                .join(after, after.c.after_job_id == job.c.job_id)
                .where(
                    job.c.state == JobState.ENDED,
                    job.c.ended_at < ended_before,
                    job.c.cluster_id.is_not(None),
                    after.c.state == JobState.QUEUED,
                )
            )
            return [job_of(row) for row in rows.all()]

    def last_error(self) -> tuple[str, float] | None:
        """What went wrong last in a chunk, and when. That its job died is no error of the chunk."""
        with self._database.transaction() as tx:
            query = (
                select(chunk.c.error, chunk.c.finished_at)
                .where(chunk.c.error.is_not(None), chunk.c.error.not_in(REAPED))
                .order_by(chunk.c.finished_at.desc())
                .limit(1)
            )
            row = tx.execute(query).one_or_none()
            return None if row is None else (row.error, row.finished_at)

    def recent_chunk_seconds(self, count: int = 5) -> list[float]:
        """How long the last finished chunks of this run took, latest last."""
        with self._database.transaction() as tx:
            query = (
                select(chunk.c.train_seconds)
                .where(chunk.c.finished_at.is_not(None), chunk.c.train_seconds.is_not(None))
                .order_by(chunk.c.finished_at.desc())
                .limit(count)
            )
            return list(tx.execute(query).scalars())[::-1]

    def rows(self, table: str) -> list[dict[str, Any]]:
        """A whole table, in the order of its keys: for checks, exports and tests."""
        wanted = {t.name: t for t in (run, job, checkpoint, entry, chunk, epoch, event)}[table]
        with self._database.transaction() as tx:
            return [dict(r._mapping) for r in tx.execute(select(wanted).order_by(*wanted.primary_key.columns)).all()]

    def references(self) -> tuple[set[str], set[int]]:
        """The files that must stay, and the generations of claims that may be writing one now."""
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

    def record_test(self, checkpoint_id: int, sha256: str, metrics: Mapping[str, float], now: float) -> None:
        """The test set was read for this checkpoint: remember what came out, and that it was."""
        with self._database.transaction() as tx:
            done = tx.execute(
                update(checkpoint)
                .where(checkpoint.c.checkpoint_id == checkpoint_id, checkpoint.c.sha256 == sha256)
                .values(test_metrics=dict(metrics), tested_at=now)
            )
            if done.rowcount != 1:
                raise StaleClaimError(f"checkpoint {checkpoint_id} is no longer the one that was tested")
            log_event(tx, now, "tested", None, None, None, checkpoint=checkpoint_id, metrics=dict(metrics))


def _prominence(row: Row[Any]) -> int:
    if row.state == JobState.RUNNING:
        return 3
    return 2 if row.state in (JobState.QUEUED, JobState.SUBMITTING) else 1 if row.started_at else 0


def _entry_row(rank: int, row: Row[Any]) -> dict[str, Any]:
    return {
        "rank": rank,
        "checkpoint": row.checkpoint_id,
        "score": row.score,
        "epochs": row.epochs,
        "worked_on": row.worked_on,
        "in_progress": row.in_progress,
        "founder": row.founder_id,
        "parent": row.parent_id,
        "profile": row.profile,
        "worker": row.worker_id,
        "promoted_at": row.promoted_at,
        "file": row.file,
        "sha256": row.sha256,
        "entry": row.entry_id,
        "start_position": row.start_position,
        "next_position": row.floor,
        "metrics": row.metrics,
        "test_metrics": row.test_metrics,
        "tested_at": row.tested_at,
    }
