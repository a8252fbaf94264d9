"""Databases of earlier versions are upgraded in place when they are opened, so that their queued jobs go on."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Column, Table, select, text, update

from orchestrator import __version__
from orchestrator.errors import LeaderboardError
from orchestrator.leaderboard.engine import Database
from orchestrator.leaderboard.schema import SCHEMA_VERSION, chunk, run, worker
from orchestrator.records import ChunkState, ExpiredBy, StopKind

ADDED_IN_2 = (worker.c.stop_kind, chunk.c.expired_by)
# Version 1 kept these reasons as text, those of chunks in the column of their errors.
SURPLUS_IN_1 = "the run was amended to %"
REASONS_IN_1 = {
    "its job ended without a word": ExpiredBy.JOB_SILENT,
    "its job is gone": ExpiredBy.JOB_GONE,
    "its job ended before it": ExpiredBy.JOB_ENDED,
    "its lease ended": ExpiredBy.LEASE_ENDED,
    "the profiles were amended": ExpiredBy.AMENDED,
    "what came of it was lost with the database": ExpiredBy.LOST_WITH_DATABASE,
}


def check_version(database: Database, schema_version: int, orch_version: str) -> None:
    """Raises LeaderboardError unless the tables are of this version or of one that can be upgraded."""
    if schema_version not in (1, SCHEMA_VERSION):
        raise LeaderboardError(
            f"{database.name} was written by orch {orch_version} (schema {schema_version}); this is orch "
            f"{__version__} (schema {SCHEMA_VERSION}). Use that version for this run."
        )


def columns_in(schema_version: int, table: Table) -> list[Column[Any]]:
    """The columns that a table has in a database of this version."""
    return [c for c in table.columns if schema_version > 1 or all(c is not added for added in ADDED_IN_2)]


def upgrade(database: Database) -> None:
    """Bring a database of version 1 to this version, in one transaction; one of this version stays as it is."""
    with database.transaction() as tx:
        if tx.execute(select(run.c.schema_version)).scalar_one() != 1:
            return  # another process has upgraded it
        for column in ADDED_IN_2:
            table = f"{database.schema_name}.{column.table.name}" if database.schema_name else column.table.name
            tx.execute(text(f"ALTER TABLE {table} ADD COLUMN {column.name} {column.type.compile(tx.dialect)}"))
        stopped = update(worker).where(worker.c.stopped.is_not(None))
        tx.execute(stopped.values(stop_kind=StopKind.FAILURES))
        tx.execute(stopped.where(worker.c.stopped.like(SURPLUS_IN_1)).values(stop_kind=StopKind.SURPLUS))
        for reason, expired_by in REASONS_IN_1.items():
            of_reason = update(chunk).where(chunk.c.error == reason)
            tx.execute(of_reason.where(chunk.c.state == ChunkState.EXPIRED).values(expired_by=expired_by))
            tx.execute(of_reason.values(error=None))
        tx.execute(update(run).values(schema_version=SCHEMA_VERSION, orch_version=__version__))
