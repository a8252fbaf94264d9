"""Steps inside a transaction, shared by claims, results and chains."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Integer, Row, bindparam, func, insert, literal_column, select, update

from orchestrator.leaderboard.schema import checkpoint, chunk, entry, event, job, run, worker
from orchestrator.leaderboard.statements import Statement
from orchestrator.records import ChainJob, ChunkState, Entry, ExpiredBy, JobState, RunState, Worker
from orchestrator.rules import claiming

CONSUMED = (ChunkState.PROMOTED, ChunkState.DISCARDED)
HELD = (ChunkState.LIVE, ChunkState.SUSPENDED)


# --- statements executed for every chunk


def _is_one_of(states: Sequence[ChunkState]) -> ColumnElement[bool]:
    """Compare a chunk's state with constants in the SQL: databases don't use a partial index for bound parameters."""
    return chunk.c.state.in_([literal_column(f"'{state}'") for state in states])


IS_HELD = _is_one_of(HELD)
ON_BOARD: ColumnElement[bool] = entry.c.on_board

_CONTEXT = Statement(
    select(
        *run.c["state", "reason", "deadline", "generation", "epochs", "chunks_since_promotion", "settings_version"],
        *(worker.c.stopped, worker.c.failures, job.c.state.label("job_state"), job.c.starts),
        *(chunk.c.entry_id, chunk.c.parent_id, entry.c.floor, checkpoint.c.founder_id),
    ).select_from(
        run.join(worker, worker.c.worker_id == bindparam("by_worker"))
        .outerjoin(job, job.c.job_id == bindparam("by_job", type_=Integer))
        .outerjoin(chunk, chunk.c.chunk_id == bindparam("of_chunk", type_=Integer))
        .outerjoin(entry, entry.c.entry_id == chunk.c.entry_id)
        .outerjoin(checkpoint, checkpoint.c.checkpoint_id == chunk.c.parent_id)
    )
)
_HELD_COUNTS = Statement(
    select(chunk.c.entry_id, chunk.c.state, func.count().label("chunks"), func.min(chunk.c.lease_until).label("lease"))
    .where(IS_HELD)
    .group_by(chunk.c.entry_id, chunk.c.state)
)
_BOARD = Statement(
    select(
        *entry.c["entry_id", "checkpoint_id", "start_position", "floor", "worked_on"],
        *checkpoint.c["score", "file", "sha256", "epochs", "parent_id"],
    )
    .join(checkpoint, checkpoint.c.checkpoint_id == entry.c.checkpoint_id)
    .where(ON_BOARD)
    .order_by(entry.c.entry_id)
)
_TAKEN = Statement(
    select(chunk.c.position, chunk.c.state).where(
        chunk.c.entry_id == bindparam("of_entry"),
        chunk.c.position >= bindparam("from_position"),
        _is_one_of((*CONSUMED, *HELD)),
    )
)
_WORKED = Statement(
    update(entry)
    .where(entry.c.entry_id == bindparam("of_entry"))
    .values(worked_on=entry.c.worked_on + 1, floor=bindparam("new_floor"))
)
_UNREFERENCED = Statement(
    select(checkpoint.c.checkpoint_id, checkpoint.c.file).where(
        ~checkpoint.c.released,
        checkpoint.c.checkpoint_id.not_in(
            select(entry.c.checkpoint_id)
            .where(ON_BOARD)
            .union(select(chunk.c.parent_id).where(IS_HELD, chunk.c.parent_id.is_not(None)))
        ),
    )
)
_LOG = Statement(insert(event))


@dataclass(frozen=True, slots=True)
class BoardView:
    """The board as read before a chunk is claimed or a result is recorded."""

    context: Any  # see `context_of`
    entries: list[Entry]  # on the board
    rows: Mapping[int, Any]  # by entry_id: each entry's row, with the file, sha256 and epochs of its checkpoint
    founders: int  # number of live or suspended chunks that train a founder
    suspended: int  # number of suspended chunks
    first_lease_end: float | None  # when the first lease of a live chunk ends


def context_of(tx: Connection, worker_id: int, job_id: int | None, chunk_id: int | None) -> Any:
    """Return one row that joins the run, the worker, the job and the chunk. If an id is None, its fields are None."""
    return _CONTEXT.first(tx, by_worker=worker_id, by_job=job_id, of_chunk=chunk_id)


def look(tx: Connection, context: Any) -> BoardView:
    """Read the board. The number of rows read depends on the number of entries, not on the number of workers."""
    in_progress: Counter[int | None] = Counter()  # by entry_id; None: founders
    suspended, leases = 0, []
    for entry_id, state, chunks, lease_until in _HELD_COUNTS.all(tx):
        in_progress[entry_id] += chunks
        if state == ChunkState.SUSPENDED:
            suspended += chunks
        else:
            leases.append(lease_until)
    rows = {row.entry_id: row for row in _BOARD.all(tx)}
    entries = [_entry(row, in_progress[row.entry_id]) for row in rows.values()]
    return BoardView(context, entries, rows, in_progress[None], suspended, min(leases, default=None))


def read_entries(tx: Connection) -> list[Entry]:
    """Return the entries on the board, with in_progress left at 0."""
    return [_entry(row) for row in _BOARD.all(tx)]


def _entry(row: Any, in_progress: int = 0) -> Entry:
    return Entry(
        entry_id=row.entry_id,
        checkpoint_id=row.checkpoint_id,
        score=row.score,
        start_position=row.start_position,
        floor=row.floor,
        worked_on=row.worked_on,
        founder=row.parent_id is None,
        in_progress=in_progress,
    )


def taken_positions(tx: Connection, entry_id: int, floor: int) -> tuple[set[int], set[int]]:
    """Return the consumed and the leased positions of an entry, starting at its floor."""
    consumed: set[int] = set()
    leased: set[int] = set()
    for position, state in _TAKEN.all(tx, of_entry=entry_id, from_position=floor):
        (consumed if state in CONSUMED else leased).add(position)
    return consumed, leased


def consume(tx: Connection, entry_id: int | None, position: int, floor: int) -> None:
    """Count a finished chunk on an entry, and advance the entry's floor. Does nothing for a founder (entry_id None)."""
    if entry_id is None:
        return
    if position == floor:
        consumed, _ = taken_positions(tx, entry_id, floor)
        floor = claiming.advance_floor(floor, consumed)
    _WORKED.write(tx, of_entry=entry_id, new_floor=floor)


def release(tx: Connection) -> tuple[str, ...]:
    """Mark the checkpoints that no entry on the board and no claim needs as released. Returns their files."""
    rows = _UNREFERENCED.all(tx)
    if rows:
        ids = [r.checkpoint_id for r in rows]
        tx.execute(update(checkpoint).where(checkpoint.c.checkpoint_id.in_(ids)).values(released=True))
    return tuple(r.file for r in rows)


def take_off(tx: Connection, entry_id: int, reason: str, now: float, **found_by: int) -> None:
    """Remove an entry with a damaged file from the board. found_by: worker_id and chunk_id that found the damage."""
    on_board = update(entry).where(entry.c.entry_id == entry_id, ON_BOARD)
    tx.execute(on_board.values(on_board=False, evicted_at=now))
    tx.execute(update(run).values(chunks_since_promotion=0))  # the board has a free slot again, so the run is not stale
    log_event(tx, now, "condemned", entry_id=entry_id, reason=reason, **found_by)
    release(tx)


def expire(tx: Connection, claims: ColumnElement[bool], by: ExpiredBy, now: float) -> None:
    """Revoke live claims. Chunks that were resumed from a suspended state are suspended again; the others expire."""
    for row in tx.execute(select(chunk).where(claims, chunk.c.state == ChunkState.LIVE)).all():
        resumable = row.suspended_file is not None
        tx.execute(
            update(chunk)
            .where(chunk.c.chunk_id == row.chunk_id, chunk.c.generation == row.generation)
            .values(
                state=ChunkState.SUSPENDED if resumable else ChunkState.EXPIRED,
                finished_at=None if resumable else now,
                expired_by=None if resumable else by,
            )
        )
        whose = {"worker_id": row.worker_id, "chunk_id": row.chunk_id, "entry_id": row.entry_id}
        log_event(tx, now, "expired", **whose, by=str(by), position=row.position)


def set_state(tx: Connection, state: RunState, reason: str | None, now: float) -> None:
    tx.execute(update(run).values(state=state, reason=reason))
    log_event(tx, now, "state", state=str(state), reason=reason)


def log_event(
    tx: Connection,
    now: float,
    kind: str,
    *,
    worker_id: int | None = None,
    chunk_id: int | None = None,
    entry_id: int | None = None,
    **data: Any,
) -> None:
    whose = {"worker_id": worker_id, "chunk_id": chunk_id, "entry_id": entry_id}
    _LOG.insert(tx, at=now, kind=kind, **whose, data=json_safe(data))


def json_safe(values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace NaN and infinities by None, since JSON has neither."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in values.items()}


def job_of(row: Row[Any]) -> ChainJob:
    values = dict(row._mapping)
    return ChainJob(**(values | {"state": JobState(values["state"])}))


def worker_of(row: Row[Any]) -> Worker:
    return Worker(row.worker_id, row.device, row.failures, row.stopped)
