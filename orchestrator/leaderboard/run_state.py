"""The state of the run: its row, its settings, and whether it is over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, insert, select, update

from orchestrator import __version__
from orchestrator.leaderboard.engine import Database
from orchestrator.leaderboard.links import IS_OPEN, close_link, settle
from orchestrator.leaderboard.moves import ON_BOARD, job_of, log_event, set_state, worker_of
from orchestrator.leaderboard.schema import SCHEMA_VERSION, checkpoint, chunk, entry, job, run, worker
from orchestrator.profile import Metric
from orchestrator.records import ChainJob, ChunkState, ExpiredBy, JobState, Progress, RunState, StopKind, Worker


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The run as it is now, read in one transaction."""

    state: RunState
    reason: str | None
    created_at: float
    deadline: float
    progress: Progress
    workers: tuple[Worker, ...]
    open_jobs: tuple[ChainJob, ...]


def insert_run(tx: Connection, **values: Any) -> None:
    """Insert the row of a new run. values: name, settings, times and import paths; other values override defaults."""
    fresh = {"state": RunState.ACTIVE, "generation": 0, "chunks_since_promotion": 0, "epochs": 0, "settings_version": 1}
    version = {"schema_version": SCHEMA_VERSION, "orch_version": __version__}
    tx.execute(insert(run).values({"run_id": 1} | version | fresh | values))


class RunStateStore:
    """Reads and changes the state of the run. Every method is one transaction."""

    def __init__(self, database: Database, metric: Metric) -> None:
        self._database = database
        self._metric = metric

    def row(self) -> dict[str, Any]:
        with self._database.transaction() as tx:
            return dict(tx.execute(select(run)).one()._mapping)

    def origin(self) -> dict[str, Any]:
        """Return the values of the run's row that are copied into every checkpoint record, for `orch repair`."""
        row = self.row()
        return {"launched_at": row["created_at"], "import_paths": row["import_paths"]}

    def settings(self) -> tuple[str, int]:
        """Return the run's settings as JSON, and their version."""
        row = self.row()
        return row["settings"], row["settings_version"]

    def snapshot(self) -> Snapshot:
        with self._database.transaction() as tx:
            row = tx.execute(select(run)).one()
            best = tx.execute(
                select(checkpoint.c.score)
                .join(entry, entry.c.checkpoint_id == checkpoint.c.checkpoint_id)
                .where(ON_BOARD)
                .order_by(best_first(self._metric))
                .limit(1)
            ).scalar_one_or_none()
            workers = tx.execute(select(worker).order_by(worker.c.worker_id)).all()
            jobs = tx.execute(select(job).where(IS_OPEN).order_by(job.c.job_id)).all()
        return Snapshot(
            state=RunState(row.state),
            reason=row.reason,
            created_at=row.created_at,
            deadline=row.deadline,
            progress=Progress(row.chunks_since_promotion, best, row.epochs),
            workers=tuple(worker_of(w) for w in workers),
            open_jobs=tuple(job_of(j) for j in jobs),
        )

    def change_state(
        self, wanted: RunState, allowed_from: Sequence[RunState], reason: str | None, now: float
    ) -> RunState:
        """Set the run's state if its current state is in `allowed_from`. Returns the previous state."""
        with self._database.transaction() as tx:
            had = RunState(tx.execute(select(run.c.state)).scalar_one())
            if had in allowed_from and had is not wanted:
                set_state(tx, wanted, reason, now)
                settle(tx, now)
            return had

    def revive(self, workers: int) -> None:
        """Reset the failures of the first `workers` chains and remove their stops, so that they can continue."""
        with self._database.transaction() as tx:
            first = update(worker).where(worker.c.worker_id < workers)
            tx.execute(first.values(failures=0, early_failure=None, stopped=None, stop_kind=None))

    def amend(
        self, settings: str, deadline: float, workers: int, what: str, now: float, *, profiles_changed: bool
    ) -> list[ChainJob]:
        """Store amended settings. settings: as JSON. what: a description of the changes, for the event log.

        Stops all workers except the first `workers`. Returns the queued jobs of the stopped workers, which the caller
        must cancel. If profiles changed, suspended chunks expire and free their positions, because a position may now
        have another profile.
        """
        with self._database.transaction() as tx:
            version = run.c.settings_version + 1
            tx.execute(update(run).values(settings=settings, deadline=deadline, settings_version=version))
            log_event(tx, now, "amended", what=what)
            if profiles_changed:
                suspended = update(chunk).where(chunk.c.state == ChunkState.SUSPENDED)
                given_up = {"state": ChunkState.EXPIRED, "expired_by": ExpiredBy.AMENDED, "finished_at": now}
                tx.execute(suspended.values(given_up))
                # Without a suspended file, a live chunk also expires if its job is lost; see `moves.expire`.
                live = update(chunk).where(chunk.c.state == ChunkState.LIVE)
                tx.execute(live.values(suspended_file=None, suspended_sha256=None))
            reason = f"the run was amended to {workers} workers"
            wanted, surplus = worker.c.worker_id < workers, worker.c.worker_id >= workers
            back = update(worker).where(wanted, worker.c.stop_kind == StopKind.SURPLUS)
            tx.execute(back.values(stopped=None, stop_kind=None))
            tx.execute(update(worker).where(surplus).values(stopped=reason, stop_kind=StopKind.SURPLUS))
            queued = job.c.state.in_((JobState.SUBMITTING, JobState.QUEUED))
            rows = tx.execute(select(job).where(job.c.worker_id >= workers, queued)).all()
            for row in rows:
                close_link(tx, row.job_id, JobState.CANCELLED, reason, now)
            return [job_of(row) for row in rows]

    def settle(self, now: float) -> None:
        """If the run is over, record its final state, because its jobs may have died before they could record it."""
        with self._database.transaction() as tx:
            settle(tx, now)


def best_first(metric: Metric) -> ColumnElement[float]:
    return checkpoint.c.score.desc() if metric.mode == "max" else checkpoint.c.score.asc()
