"""What a finished, suspended or lost claim writes, always under the guard of its generation."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, insert, select, update

from orchestrator import rules
from orchestrator.errors import StaleClaimError
from orchestrator.leaderboard.moves import finite, log_event
from orchestrator.leaderboard.schema import checkpoint, chunk, entry
from orchestrator.records import Candidate, ChunkState, Claim, Entry, Policy


def close(tx: Connection, claim: Claim, state: ChunkState, finished_at: float | None, **values: Any) -> None:
    """The guarded write: only the live claim of this very generation."""
    done = tx.execute(
        update(chunk)
        .where(
            chunk.c.chunk_id == claim.chunk_id,
            chunk.c.generation == claim.generation,
            chunk.c.state == ChunkState.LIVE,
        )
        .values(state=state, finished_at=finished_at, **values)
    )
    if done.rowcount != 1:
        raise StaleClaimError(
            f"chunk {claim.chunk_id}: generation {claim.generation} of worker {claim.worker_id} is stale; "
            "the claim expired and its result is refused"
        )


def promote(
    tx: Connection,
    claim: Claim,
    candidate: Candidate,
    evicted: Entry | None,
    parent_id: int | None,
    policy: Policy,
    now: float,
) -> None:
    """Put the candidate on the board, in place of `evicted` or in a free slot."""
    checkpoint_id = _add_checkpoint(tx, claim, candidate, parent_id, now)
    entry_id = tx.execute(
        insert(entry).values(
            checkpoint_id=checkpoint_id,
            start_position=0 if parent_id is None else rules.child_start(claim.position),
            floor=rules.child_start(claim.position),  # a founder's own chunk consumed its position 0
            worked_on=0,
            promoted_at=now,
            on_board=True,
        )
    ).inserted_primary_key[0]  # type: ignore[index]
    if parent_id is None:
        tx.execute(update(chunk).where(chunk.c.chunk_id == claim.chunk_id).values(entry_id=entry_id))
    if evicted is not None:
        done = tx.execute(
            update(entry)
            .where(entry.c.entry_id == evicted.entry_id, entry.c.on_board.is_(True))
            .values(on_board=False, evicted_at=now, evicted_by=entry_id)
        )
        assert done.rowcount == 1, "read and written in one transaction"
    on_board = select(checkpoint.c.score).join(entry, entry.c.checkpoint_id == checkpoint.c.checkpoint_id)
    scores = tx.execute(on_board.where(entry.c.on_board.is_(True))).scalars().all()
    what = {
        "score": candidate.score,
        "position": claim.position,
        "profile": claim.profile.name,
        "epochs": candidate.epochs,
        "evicted": evicted.entry_id if evicted else None,
        "entries": len(scores),
        "worst": min(scores, key=policy.metric.key),
        "best": max(scores, key=policy.metric.key),
    }
    log_event(tx, now, "promoted", claim.worker_id, claim.chunk_id, entry_id, **what)


def _add_checkpoint(tx: Connection, claim: Claim, candidate: Candidate, parent_id: int | None, now: float) -> int:
    """The row of a checkpoint; a founder is its own founder."""
    of_parent = select(checkpoint.c.founder_id).where(checkpoint.c.checkpoint_id == parent_id)
    founder_id = None if parent_id is None else tx.execute(of_parent).scalar_one()
    last = candidate.results[-1].metrics if candidate.results else {}
    checkpoint_id: int = tx.execute(
        insert(checkpoint).values(
            chunk_id=claim.chunk_id,
            parent_id=parent_id,
            founder_id=founder_id or 0,
            worker_id=claim.worker_id,
            epochs=candidate.epochs,
            score=candidate.score,
            profile=claim.profile.name,
            metrics={name: finite(value) for name, value in last.items()},
            file=candidate.file,
            sha256=candidate.sha256,
            size_bytes=candidate.size_bytes,
            created_at=now,
            released=False,
        )
    ).inserted_primary_key[0]  # type: ignore[index]
    if founder_id is None:
        own = update(checkpoint).where(checkpoint.c.checkpoint_id == checkpoint_id)
        tx.execute(own.values(founder_id=checkpoint_id))
    return checkpoint_id
