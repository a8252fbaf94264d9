"""What happens inside a transaction: the pieces that claims, results and chains are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from orchestrator.records import ChainJob, ChunkState, Entry, JobState, RunState, Worker
from orchestrator.rules import claiming

CONSUMED = (ChunkState.PROMOTED, ChunkState.DISCARDED)
# Why a claim was taken from its worker.
NO_WORD, JOB_GONE, LEASE_ENDED = "its job ended without a word", "its job is gone", "its lease ended"
NOT_KNOWN = "what came of it was lost with the database"
JOB_ENDED = "its job ended before it"
REAPED = (NO_WORD, JOB_GONE, JOB_ENDED, LEASE_ENDED, NOT_KNOWN)
HELD = (ChunkState.LIVE, ChunkState.SUSPENDED)


# --- statements of every chunk: built once, so that each execution finds its SQL by one look into a cache


def _is_one_of(states: Sequence[ChunkState]) -> ColumnElement[bool]:
    """Spelled out, since no partial index is used for a state that is a parameter."""
    return chunk.c.state.in_([literal_column(f"'{state}'") for state in states])


IS_HELD = _is_one_of(HELD)
ON_BOARD = entry.c.on_board == true()

# What a transaction needs of the run, the worker, its job and its chunk, in one row.
_STANDING = Statement(
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
    """The chunks that are live or suspended: how many, not which."""

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


def count_held(tx: Connection) -> Held:
    """As many rows as entries that are worked on, however many the workers are."""
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
    """held: left out where work in progress does not matter."""
    rows = _BOARD.all(tx)
    busy = held.by_entry if held else {}
    entries = [
        Entry(
            entry_id=r.entry_id,
            checkpoint_id=r.checkpoint_id,
            score=r.score,
            start_position=r.start_position,
            floor=r.floor,
            worked_on=r.worked_on,
            founder=r.parent_id is None,
            in_progress=busy.get(r.entry_id, 0),
        )
        for r in rows
    ]
    return BoardRows(entries, {r.entry_id: r for r in rows})


@dataclass(frozen=True, slots=True)
class BoardView:
    """What a claim or a result begins from."""

    standing: Any  # a row of _STANDING
    board: BoardRows
    held: Held


def look(tx: Connection, worker_id: int, job_id: int | None, chunk_id: int | None) -> BoardView:
    return look_again(tx, _STANDING.first(tx, by_worker=worker_id, by_job=job_id, of_chunk=chunk_id))


def look_again(tx: Connection, standing: Any) -> BoardView:
    """At the board, with what is known already of the rest."""
    held = count_held(tx)
    return BoardView(standing, read_board(tx, held), held)


def progress_of(standing: Any) -> dict[str, int]:
    """What a result changes of the run's row."""
    return {"epochs": standing.epochs, "chunks_since_promotion": standing.chunks_since_promotion}


def after_discard(before: BoardView, standing: Any, floor: int) -> BoardView:
    """What `look_again` would give after a live chunk was discarded, whose entry (if it has one) has this floor now.
    Only the end of the first lease may be too early: it may have been this chunk's."""
    board, held, entry_id = before.board, before.held, standing.entry_id
    by_entry = {**held.by_entry, entry_id: held.by_entry[entry_id] - 1}
    entries = [
        replace(e, worked_on=e.worked_on + 1, floor=floor, in_progress=by_entry[entry_id])
        if e.entry_id == entry_id
        else e
        for e in board.entries
    ]
    return BoardView(standing, replace(board, entries=entries), replace(held, by_entry=by_entry))


def taken_positions(tx: Connection, entry_id: int, floor: int) -> tuple[set[int], set[int]]:
    """From the floor on: those that are consumed, and those that are leased."""
    consumed: set[int] = set()
    leased: set[int] = set()
    for position, state in _TAKEN.all(tx, of_entry=entry_id, from_position=floor):
        (consumed if state in CONSUMED else leased).add(position)
    return consumed, leased


def consume(tx: Connection, entry_id: int | None, position: int, floor: int) -> int:
    """Count the finished chunk, and move the floor over what is consumed without a gap. Returns the floor. A founder's
    chunk (None) counts for nothing."""
    if entry_id is None:
        return floor
    if position == floor:
        consumed, _ = taken_positions(tx, entry_id, floor)
        floor = claiming.advance_floor(floor, consumed)
    _WORKED.write(tx, of_entry=entry_id, new_floor=floor)
    return floor


def release(tx: Connection) -> tuple[str, ...]:
    """Mark the checkpoints that neither an entry nor a claim refers to; their files may go."""
    rows = _UNREFERENCED.all(tx)
    if rows:
        ids = [r.checkpoint_id for r in rows]
        tx.execute(update(checkpoint).where(checkpoint.c.checkpoint_id.in_(ids)).values(released=True))
    return tuple(r.file for r in rows)


def take_off(
    tx: Connection, entry_id: int, reason: str, now: float, worker_id: int | None, chunk_id: int | None
) -> None:
    """An entry whose file is damaged leaves the board, and its slot is free."""
    on_board = update(entry).where(entry.c.entry_id == entry_id, ON_BOARD)
    tx.execute(on_board.values(on_board=False, evicted_at=now))
    tx.execute(update(run).values(chunks_since_promotion=0))  # a run that had converged has a slot to fill
    log_event(tx, now, "condemned", worker_id, chunk_id, entry_id, reason=reason)
    release(tx)


def expire(tx: Connection, chunk_ids: Sequence[int], reason: str, now: float) -> None:
    """Take live claims from their workers. One that was suspended before goes back to its suspended state."""
    for row in tx.execute(select(chunk).where(chunk.c.chunk_id.in_(chunk_ids), chunk.c.state == ChunkState.LIVE)).all():
        back = row.suspended_file is not None
        tx.execute(
            update(chunk)
            .where(and_(chunk.c.chunk_id == row.chunk_id, chunk.c.generation == row.generation))
            .values(
                state=ChunkState.SUSPENDED if back else ChunkState.EXPIRED,
                finished_at=None if back else now,
                error=None if back else reason,
            )
        )
        log_event(
            tx,
            now,
            "expired",
            row.worker_id,
            row.chunk_id,
            row.entry_id,
            reason=reason,
            position=row.position,
        )


def set_state(tx: Connection, state: RunState, reason: str | None, now: float) -> None:
    tx.execute(update(run).values(state=state, reason=reason))
    log_event(tx, now, "state", None, None, None, state=str(state), reason=reason)


def log_event(
    tx: Connection,
    now: float,
    kind: str,
    worker_id: int | None,
    chunk_id: int | None,
    entry_id: int | None,
    **data: Any,
) -> None:
    _LOG.insert(tx, at=now, kind=kind, worker_id=worker_id, chunk_id=chunk_id, entry_id=entry_id, data=_json_safe(data))


def _json_safe(data: Mapping[str, Any]) -> dict[str, Any]:
    return {k: finite(v) if isinstance(v, float) else v for k, v in data.items()}


def finite(value: float) -> float | None:
    """JSON and databases know no NaN."""
    return value if math.isfinite(value) else None


def job_of(row: Row[Any]) -> ChainJob:
    values = dict(row._mapping)
    return ChainJob(**(values | {"state": JobState(values["state"])}))


def worker_of(row: Row[Any]) -> Worker:
    return Worker(row.worker_id, row.device, row.failures, row.stopped)
