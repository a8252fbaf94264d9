"""The writes at the end of a claim. `close` refuses them if the claim is no longer live."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, bindparam, insert, update

from orchestrator.errors import StaleClaimError
from orchestrator.leaderboard.moves import ON_BOARD, BoardView, json_safe, log_event
from orchestrator.leaderboard.schema import checkpoint, chunk, entry
from orchestrator.leaderboard.statements import Statement
from orchestrator.profile import Metric
from orchestrator.records import Candidate, ChunkState, Claim, Entry
from orchestrator.rules import claiming

_OF_CLAIM = Statement(
    update(chunk).where(
        chunk.c.chunk_id == bindparam("of_chunk"),
        chunk.c.generation == bindparam("of_generation"),
        chunk.c.state == ChunkState.LIVE,
    )
)
_EVICT = Statement(update(entry).where(entry.c.entry_id == bindparam("of_entry"), ON_BOARD))
_ENTER, _ADD_CHECKPOINT = Statement(insert(entry)), Statement(insert(checkpoint))


def close(tx: Connection, claim: Claim, state: ChunkState, finished_at: float | None, **values: Any) -> None:
    """Set the chunk's state at the end of a claim. Raises StaleClaimError if the claim is no longer live."""
    guard = {"of_chunk": claim.chunk_id, "of_generation": claim.generation}
    if _OF_CLAIM.write(tx, **guard, state=state, finished_at=finished_at, **values) != 1:
        raise StaleClaimError(
            f"chunk {claim.chunk_id}: generation {claim.generation} of worker {claim.worker_id} is stale; "
            "the claim expired and its result is refused"
        )


def promote(
    tx: Connection,
    claim: Claim,
    candidate: Candidate,
    view: BoardView,
    now: float,
    *,
    evicted: Entry | None,
    metric: Metric,
) -> None:
    """Put the candidate on the board, in place of `evicted` or in a free slot."""
    parent_id, founder_id = view.context.parent_id, view.context.founder_id
    founder = parent_id is None
    last = candidate.results[-1].metrics if candidate.results else {}
    checkpoint_id = _ADD_CHECKPOINT.insert(
        tx,
        chunk_id=claim.chunk_id,
        parent_id=parent_id,
        founder_id=founder_id or 0,
        worker_id=claim.worker_id,
        epochs=candidate.epochs,
        score=candidate.score,
        profile=claim.profile.name,
        metrics=json_safe(last),
        file=candidate.file,
        sha256=candidate.sha256,
        size_bytes=candidate.size_bytes,
        created_at=now,
        released=False,
    )
    entry_id = _ENTER.insert(
        tx,
        checkpoint_id=checkpoint_id,
        start_position=0 if founder else claiming.child_start(claim.position),
        floor=claiming.child_start(claim.position),  # a founder's chunk consumed position 0
        worked_on=0,
        promoted_at=now,
        on_board=True,
    )
    if founder:  # a founder is its own founder, and its chunk belongs to its own entry
        own = update(checkpoint).where(checkpoint.c.checkpoint_id == checkpoint_id)
        tx.execute(own.values(founder_id=checkpoint_id))
        tx.execute(update(chunk).where(chunk.c.chunk_id == claim.chunk_id).values(entry_id=entry_id))
    if evicted is not None:
        done = _EVICT.write(tx, of_entry=evicted.entry_id, on_board=False, evicted_at=now, evicted_by=entry_id)
        assert done == 1, "the entry was read in the same transaction"
    scores = [candidate.score, *(e.score for e in view.entries if e is not evicted)]
    what: dict[str, Any] = {
        "score": candidate.score,
        "position": claim.position,
        "profile": claim.profile.name,
        "epochs": candidate.epochs,
        "evicted": evicted.entry_id if evicted else None,
        "entries": len(scores),
        "worst": min(scores, key=metric.key),
        "best": max(scores, key=metric.key),
    }
    log_event(tx, now, "promoted", worker_id=claim.worker_id, chunk_id=claim.chunk_id, entry_id=entry_id, **what)
