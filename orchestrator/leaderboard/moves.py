"""What happens inside a transaction: the pieces that claims, results and chains are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, and_, insert, select, update

from orchestrator import rules
from orchestrator.leaderboard.schema import checkpoint, chunk, entry, event, run
from orchestrator.records import ChunkState, Entry, Job, JobState, RunState, Worker

CONSUMED = (ChunkState.PROMOTED, ChunkState.DISCARDED)
# Why a claim was taken from its worker.
NO_WORD, JOB_GONE, LEASE_ENDED = "its job ended without a word", "its job is gone", "its lease ended"
REAPED = (NO_WORD, JOB_GONE, LEASE_ENDED)
HELD = (ChunkState.LIVE, ChunkState.SUSPENDED)


@dataclass(frozen=True, slots=True)
class BoardRows:
    """The entries on the board, and the rows they were read from."""

    entries: list[Entry]
    rows: dict[int, Row[Any]]  # by entry_id: with the checkpoint's file, sha256 and epochs


def held_chunks(tx: Connection) -> list[Row[Any]]:
    return list(tx.execute(select(chunk).where(chunk.c.state.in_(HELD)).order_by(chunk.c.chunk_id)).all())


def read_board(tx: Connection, held: Sequence[Row[Any]]) -> BoardRows:
    rows = tx.execute(
        select(
            entry,
            checkpoint.c.score,
            checkpoint.c.file,
            checkpoint.c.sha256,
            checkpoint.c.epochs,
            checkpoint.c.parent_id,
        )
        .join(checkpoint, checkpoint.c.checkpoint_id == entry.c.checkpoint_id)
        .where(entry.c.on_board.is_(True))
        .order_by(entry.c.entry_id)
    ).all()
    busy: dict[int, int] = {}
    for h in held:
        busy[h.entry_id] = busy.get(h.entry_id, 0) + 1
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


def consumed_positions(tx: Connection, entry_id: int, floor: int) -> set[int]:
    query = select(chunk.c.position).where(
        chunk.c.entry_id == entry_id, chunk.c.position >= floor, chunk.c.state.in_(CONSUMED)
    )
    return set(tx.execute(query).scalars())


def consume(tx: Connection, entry_id: int | None, position: int) -> None:
    """Count the finished chunk, and move the floor over what is consumed without a gap."""
    if entry_id is None:
        return
    floor = tx.execute(select(entry.c.floor).where(entry.c.entry_id == entry_id)).scalar_one()
    if position == floor:
        floor = rules.advance_floor(floor, consumed_positions(tx, entry_id, floor))
    tx.execute(update(entry).where(entry.c.entry_id == entry_id).values(worked_on=entry.c.worked_on + 1, floor=floor))


def release(tx: Connection) -> tuple[str, ...]:
    """Mark the checkpoints that neither an entry nor a claim refers to; their files may go."""
    needed = (
        select(entry.c.checkpoint_id)
        .where(entry.c.on_board.is_(True))
        .union(select(chunk.c.parent_id).where(chunk.c.state.in_(HELD), chunk.c.parent_id.is_not(None)))
    )
    rows = tx.execute(
        select(checkpoint.c.checkpoint_id, checkpoint.c.file).where(
            checkpoint.c.released.is_(False), checkpoint.c.checkpoint_id.not_in(needed)
        )
    ).all()
    if rows:
        ids = [r.checkpoint_id for r in rows]
        tx.execute(update(checkpoint).where(checkpoint.c.checkpoint_id.in_(ids)).values(released=True))
    return tuple(r.file for r in rows)


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
    tx.execute(
        insert(event).values(
            at=now,
            kind=kind,
            worker_id=worker_id,
            chunk_id=chunk_id,
            entry_id=entry_id,
            data=_json_safe(data),
        )
    )


def _json_safe(data: Mapping[str, Any]) -> dict[str, Any]:
    return {k: finite(v) if isinstance(v, float) else v for k, v in data.items()}


def finite(value: float) -> float | None:
    """JSON and databases know no NaN."""
    return value if math.isfinite(value) else None


def job_of(row: Row[Any]) -> Job:
    values = dict(row._mapping)
    return Job(**(values | {"state": JobState(values["state"])}))


def worker_of(row: Row[Any]) -> Worker:
    return Worker(row.worker_id, row.device, row.failures, row.stopped)
