"""Write a new database from a RebuildPlan, for `orch repair`."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, func, insert, select, text, update

from orchestrator.files.checkpoint_record import CheckpointRecord
from orchestrator.leaderboard import schema
from orchestrator.leaderboard.engine import Database
from orchestrator.leaderboard.moves import log_event
from orchestrator.leaderboard.rebuild_plan import GENERATION_GAP, RebuildPlan
from orchestrator.leaderboard.run_state import insert_run
from orchestrator.leaderboard.schema import checkpoint, chunk, entry, epoch, job, worker
from orchestrator.records import ChunkState, ExpiredBy, JobState, RunState, StopKind

REPAIRED = "repaired; `orch resume` continues it"
COPIED = {"epochs", "score", "profile", "metrics", "file", "sha256", "size_bytes", "created_at"}  # from a record


@dataclass(frozen=True, slots=True)
class Origin:
    """Values for the new rows of the run and its workers."""

    name: str
    settings: str  # JSON
    import_paths: Sequence[str]
    launched_at: float
    deadline: float
    devices: Sequence[str | None]  # CUDA_VISIBLE_DEVICES of each worker in the settings


def rebuild(database: Database, origin: Origin, plan: RebuildPlan, kept: str | None, now: float) -> None:
    """Create and fill the tables in one transaction. kept: where the old database is kept; None: there is none.

    Raises LeaderboardError.
    """
    with database.creation() as tx:
        insert_run(
            tx,
            name=origin.name,
            settings=origin.settings,
            import_paths=list(origin.import_paths),
            created_at=origin.launched_at,
            deadline=origin.deadline,
            state=RunState.PAUSED,
            reason=REPAIRED,
            generation=plan.generation + len(plan.gaps),
            epochs=sum(len(c.record.trained) for c in plan.checkpoints if c.known),
        )
        _add_workers(tx, origin, plan, now)
        ids = {c.record.file: number for number, c in enumerate(plan.checkpoints, start=1)}
        _add_chunks(tx, plan, now)
        _add_checkpoints(tx, plan, ids)
        entries = _add_entries(tx, plan, ids)
        _add_references(tx, plan, ids, entries, now)
        entered = [c.record.file for c in plan.board]
        log_event(tx, now, "repaired", kept=kept, entries=entered, notes=list(plan.notes))
        if tx.dialect.name == "postgresql":
            _move_sequences(tx, database.schema_name)


def _add_workers(tx: Connection, origin: Origin, plan: RebuildPlan, now: float) -> None:
    """Add the workers, each with one link in the state LOST. The links' job_ids are higher than all job_ids from before
    the repair, so that no new job gets the job_id of an old job that is still running."""
    wanted = len(origin.devices)
    for worker_id in range(max(wanted, plan.workers)):
        values: dict[str, Any] = {"stopped": f"the run now has {wanted} workers", "stop_kind": StopKind.SURPLUS}
        if worker_id < wanted:
            values = {"device": origin.devices[worker_id]}
        tx.execute(insert(worker).values(worker_id=worker_id, failures=0, **values))
        tx.execute(
            insert(job).values(
                job_id=GENERATION_GAP + worker_id,
                worker_id=worker_id,
                link=0,
                token=f"lost-{secrets.token_hex(8)}",
                state=JobState.LOST,
                starts=0,
                submitted_at=origin.launched_at,
                ended_at=now,
                outcome="the jobs before the repair were lost with the database",
            )
        )


def _add_chunks(tx: Connection, plan: RebuildPlan, now: float) -> None:
    """Add the promoted and suspended chunks. `_add_references` later sets their entries and parents."""
    for made in plan.checkpoints:
        record = made.record
        values: dict[str, Any] = {"state": ChunkState.PROMOTED, "finished_at": record.created_at, "score": record.score}
        if made.known:
            values |= {"epochs": len(record.trained), "train_seconds": record.train_seconds}
        tx.execute(insert(chunk).values(_chunk(record) | values))
        if made.known:
            rows = [{"chunk_id": record.chunk, **result.model_dump()} for result in record.trained]
            tx.execute(insert(epoch), rows)
    for record in plan.suspended:
        files = {"suspended_file": record.file, "suspended_sha256": record.sha256}
        tx.execute(insert(chunk).values(_chunk(record) | files | {"state": ChunkState.SUSPENDED}))


def _chunk(record: CheckpointRecord) -> dict[str, Any]:
    return {
        "chunk_id": record.chunk,
        "position": record.position,
        "profile": record.profile,
        "worker_id": record.worker,
        "generation": record.generation,
        "claimed_at": record.created_at - (record.train_seconds or 0.0),
        "lease_until": record.created_at,
    }


def _add_checkpoints(tx: Connection, plan: RebuildPlan, ids: Mapping[str, int]) -> None:
    in_use = {record.parent_file for record in plan.suspended}
    for made in plan.checkpoints:
        record = made.record
        same = record.model_dump(include=COPIED)
        tx.execute(
            insert(checkpoint).values(
                **same,
                checkpoint_id=ids[record.file],
                chunk_id=record.chunk,
                parent_id=ids[record.parent_file] if record.parent_file else None,
                founder_id=ids[made.founder],
                worker_id=record.worker,
                released=not made.on_board and record.file not in in_use,
            )
        )


def _add_entries(tx: Connection, plan: RebuildPlan, ids: Mapping[str, int]) -> dict[str, int]:
    """Add the entries in order of creation, since a tie goes to the lower entry_id. Returns the entry_ids, by file."""
    in_order = sorted(plan.checkpoints, key=lambda c: (c.record.created_at, c.record.generation))
    entries = {c.record.file: number for number, c in enumerate(in_order, start=1)}
    for made in in_order:
        tx.execute(
            insert(entry).values(
                entry_id=entries[made.record.file],
                checkpoint_id=ids[made.record.file],
                start_position=made.start,
                floor=made.floor,
                worked_on=made.worked_on,
                promoted_at=made.record.created_at,
                on_board=made.on_board,
            )
        )
    return entries


def _add_references(
    tx: Connection, plan: RebuildPlan, ids: Mapping[str, int], entries: Mapping[str, int], now: float
) -> None:
    """Set the entry and parent of each chunk, and add an expired chunk for each gap of the plan."""
    for record in (*(c.record for c in plan.checkpoints), *plan.suspended):
        if record.parent_file:
            whose = {"entry_id": entries[record.parent_file], "parent_id": ids[record.parent_file]}
        elif record.file in entries:
            whose = {"entry_id": entries[record.file]}  # a founder's chunk belongs to the founder's entry
        else:
            continue
        tx.execute(update(chunk).where(chunk.c.chunk_id == record.chunk).values(whose))
    first = (tx.execute(select(func.max(chunk.c.chunk_id))).scalar_one() or 0) + 1
    for number, gap in enumerate(plan.gaps):
        tx.execute(
            insert(chunk).values(
                chunk_id=first + number,
                entry_id=entries[gap.file],
                parent_id=ids[gap.file],
                position=gap.position,
                profile=gap.profile,
                worker_id=gap.worker,
                generation=plan.generation + 1 + number,
                state=ChunkState.EXPIRED,
                claimed_at=now,
                lease_until=now,
                finished_at=now,
                expired_by=ExpiredBy.LOST_WITH_DATABASE,
            )
        )


def _move_sequences(tx: Connection, schema_name: str | None) -> None:
    """Advance the server's key sequences beyond the keys inserted above, so that new rows get unused keys."""
    for table in schema.metadata.sorted_tables:
        (key,) = table.primary_key.columns
        name = f"{schema_name}.{table.name}" if schema_name else table.name
        sequence = tx.execute(select(func.pg_get_serial_sequence(name, key.name))).scalar_one()
        if sequence is not None:
            tx.execute(text(f"SELECT setval('{sequence}', (SELECT max({key.name}) + 1 FROM {name}), false)"))
