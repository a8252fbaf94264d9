"""Steps inside a transaction, which claims, results and chains are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Integer,
    Row,
    and_,
    bindparam,
    false,
    func,
    insert,
    literal_column,
    select,
    true,
    update,
)

from orchestrator.leaderboard.schema import checkpoint, chunk, entry, event, job, run, worker
from orchestrator.leaderboard.statements import Statement
from orchestrator.records import ChainJob, ChunkState, Entry, ExpiredBy, JobState, RunState, Worker
from orchestrator.rules import claiming

CONSUMED = (ChunkState.PROMOTED, ChunkState.DISCARDED)
HELD = (ChunkState.LIVE, ChunkState.SUSPENDED)


# --- the statements of every chunk


def _is_one_of(states: Sequence[ChunkState]) -> ColumnElement[bool]:
    """Written into the SQL, since databases use a partial index only for constants."""
    return chunk.c.state.in_([literal_column(f"'{state}'") for state in states])


IS_HELD = _is_one_of(HELD)
ON_BOARD = entry.c.on_board == true()

# What a transaction needs to know about the run, the worker, its job and its chunk, in one row.
_CONTEXT = Statement(
    select(
        run.c.state,
        run.c.reason,
        run.c.deadline,
        run.c.generation,
        run.c.epochs,
        run.c.chunks_since_promotion,
        run.c.settings_version,
        worker.c.stopped,
        worker.c.failures,
        job.c.state.label("job_state"),
        job.c.starts,
        chunk.c.entry_id,
        chunk.c.parent_id,
        entry.c.floor,
        checkpoint.c.founder_id,
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
        entry.c.entry_id,
        entry.c.checkpoint_id,
        entry.c.start_position,
        entry.c.floor,
        entry.c.worked_on,
        checkpoint.c.score,
        checkpoint.c.file,
        checkpoint.c.sha256,
        checkpoint.c.epochs,
        checkpoint.c.parent_id,
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
        checkpoint.c.released == false(),
        checkpoint.c.checkpoint_id.not_in(
            select(entry.c.checkpoint_id)
            .where(ON_BOARD)
            .union(select(chunk.c.parent_id).where(IS_HELD, chunk.c.parent_id.is_not(None)))
        ),
    )
)
_LOG = Statement(insert(event))


@dataclass(frozen=True, slots=True)
class Held:
    """How many chunks are live or suspended."""

    by_entry: Mapping[int | None, int]  # None: founders
    suspended: int
    first_lease_end: float | None  # of the live ones

    @property
    def founders(self) -> int:
        return self.by_entry.get(None, 0)


@dataclass(frozen=True, slots=True)
class BoardRows:
    """The entries on the board, and the rows they were read from."""

    entries: list[Entry]
    rows: dict[int, Any]  # by entry_id: with the checkpoint's file, sha256 and epochs


@dataclass(frozen=True, slots=True)
class BoardView:
    """What a claim or a result begins from."""

    context: Any  # a row of _CONTEXT
    board: BoardRows
    held: Held


def look(tx: Connection, worker_id: int, job_id: int | None, chunk_id: int | None) -> BoardView:
    return look_again(tx, _CONTEXT.first(tx, by_worker=worker_id, by_job=job_id, of_chunk=chunk_id))


def look_again(tx: Connection, context: Any) -> BoardView:
    """Read the board again; the rest is known already."""
    held = _count_held(tx)
    return BoardView(context, read_board(tx, held), held)


def _count_held(tx: Connection) -> Held:
    """Reads a row for each entry that is worked on, however many workers there are."""
    by_entry: dict[int | None, int] = {}
    suspended = 0
    leases = []
    for entry_id, state, chunks, lease_until in _HELD_COUNTS.all(tx):
        by_entry[entry_id] = by_entry.get(entry_id, 0) + chunks
        if state == ChunkState.SUSPENDED:
            suspended += chunks
        else:
            leases.append(lease_until)
    return Held(by_entry, suspended, min(leases, default=None))


def read_board(tx: Connection, held: Held | None = None) -> BoardRows:
    """held: not needed where work in progress does not matter."""
    rows = _BOARD.all(tx)
    in_progress = held.by_entry if held else {}
    entries = [
        Entry(
            entry_id=r.entry_id,
            checkpoint_id=r.checkpoint_id,
            score=r.score,
            start_position=r.start_position,
            floor=r.floor,
            worked_on=r.worked_on,
            founder=r.parent_id is None,
            in_progress=in_progress.get(r.entry_id, 0),
        )
        for r in rows
    ]
    return BoardRows(entries, {r.entry_id: r for r in rows})


def taken_positions(tx: Connection, entry_id: int, floor: int) -> tuple[set[int], set[int]]:
    """The consumed and the leased positions of an entry, from its floor on."""
    consumed: set[int] = set()
    leased: set[int] = set()
    for position, state in _TAKEN.all(tx, of_entry=entry_id, from_position=floor):
        (consumed if state in CONSUMED else leased).add(position)
    return consumed, leased


def consume(tx: Connection, entry_id: int | None, position: int, floor: int) -> None:
    """Count a finished chunk of this entry, and advance the entry's floor. The chunk of a founder (None) has no
    entry."""
    if entry_id is None:
        return
    if position == floor:
        consumed, _ = taken_positions(tx, entry_id, floor)
        floor = claiming.advance_floor(floor, consumed)
    _WORKED.write(tx, of_entry=entry_id, new_floor=floor)


def release(tx: Connection) -> tuple[str, ...]:
    """Mark the checkpoints that neither an entry nor a claim refers to; their files may be deleted."""
    rows = _UNREFERENCED.all(tx)
    if rows:
        ids = [r.checkpoint_id for r in rows]
        tx.execute(update(checkpoint).where(checkpoint.c.checkpoint_id.in_(ids)).values(released=True))
    return tuple(r.file for r in rows)


def take_off(tx: Connection, entry_id: int, reason: str, now: float, **found_by: int) -> None:
    """An entry whose file is damaged leaves the board, and its slot is free. found_by: a worker_id and a chunk_id."""
    on_board = update(entry).where(entry.c.entry_id == entry_id, ON_BOARD)
    tx.execute(on_board.values(on_board=False, evicted_at=now))
    tx.execute(update(run).values(chunks_since_promotion=0))  # a run that had converged has a slot to fill
    log_event(tx, now, "condemned", entry_id=entry_id, reason=reason, **found_by)
    release(tx)


def expire(tx: Connection, claims: ColumnElement[bool], by: ExpiredBy, now: float) -> None:
    """Take live claims from their workers. A chunk that was suspended before is suspended again."""
    for row in tx.execute(select(chunk).where(claims, chunk.c.state == ChunkState.LIVE)).all():
        resumable = row.suspended_file is not None
        tx.execute(
            update(chunk)
            .where(and_(chunk.c.chunk_id == row.chunk_id, chunk.c.generation == row.generation))
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
    json_safe = {k: finite(v) if isinstance(v, float) else v for k, v in data.items()}
    _LOG.insert(tx, at=now, kind=kind, worker_id=worker_id, chunk_id=chunk_id, entry_id=entry_id, data=json_safe)


def finite(value: float) -> float | None:
    """JSON has neither NaN nor infinities."""
    return value if math.isfinite(value) else None


def job_of(row: Row[Any]) -> ChainJob:
    values = dict(row._mapping)
    return ChainJob(**(values | {"state": JobState(values["state"])}))


def worker_of(row: Row[Any]) -> Worker:
    return Worker(row.worker_id, row.device, row.failures, row.stopped)
