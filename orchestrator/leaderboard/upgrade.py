"""Upgrade databases of earlier versions in place when they are opened, so that queued jobs continue."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Column, Connection, Table, case, select, text, update

from orchestrator import __version__
from orchestrator.errors import LeaderboardError
from orchestrator.leaderboard.engine import Database
from orchestrator.leaderboard.schema import SCHEMA_VERSION, chunk, run, worker
from orchestrator.records import ChunkState, ExpiredBy, StopKind

ADDED = {  # columns, by the version that added them
    2: (worker.c.stop_kind, chunk.c.expired_by),
    3: (worker.c.failed_at, worker.c.early_failure, chunk.c.error_at, chunk.c.failures),
}
# Version 1 stored these reasons as text. Those of chunks were in the column `error`.
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
    """Raise LeaderboardError unless the tables have this version or a version that can be upgraded."""
    if schema_version not in range(1, SCHEMA_VERSION + 1):
        raise LeaderboardError(
            f"{database.name} was written by orch {orch_version} (schema {schema_version}); this is orch "
            f"{__version__} (schema {SCHEMA_VERSION}). Use orch {orch_version} for this run."
        )


def columns_in(schema_version: int, table: Table) -> list[Column[Any]]:
    """Return the columns of a table in a database of the given version."""
    later = [column for version, added in ADDED.items() if version > schema_version for column in added]
    return [c for c in table.columns if all(c is not added for added in later)]


def upgrade(database: Database) -> None:
    """Upgrade a database of an earlier version in one transaction; do nothing if it has the current version."""
    with database.transaction() as tx:
        had: int = tx.execute(select(run.c.schema_version)).scalar_one()
        if had == SCHEMA_VERSION:
            return  # another process has upgraded it
        for column in (column for version, added in ADDED.items() if version > had for column in added):
            table = f"{database.schema_name}.{column.table.name}" if database.schema_name else column.table.name
            tx.execute(text(f"ALTER TABLE {table} ADD COLUMN {column.name} {column.type.compile(tx.dialect)}"))
        if had == 1:
            _reasons_as_values(tx)
        tx.execute(update(chunk).values(failures=case((chunk.c.state == ChunkState.FAILED, 1), else_=0)))
        tx.execute(update(run).values(schema_version=SCHEMA_VERSION, orch_version=__version__))


def _reasons_as_values(tx: Connection) -> None:
    """Replace the texts of version 1 by values."""
    stopped = update(worker).where(worker.c.stopped.is_not(None))
    tx.execute(stopped.values(stop_kind=StopKind.FAILURES))
    tx.execute(stopped.where(worker.c.stopped.like(SURPLUS_IN_1)).values(stop_kind=StopKind.SURPLUS))
    for reason, expired_by in REASONS_IN_1.items():
        of_reason = update(chunk).where(chunk.c.error == reason)
        tx.execute(of_reason.where(chunk.c.state == ChunkState.EXPIRED).values(expired_by=expired_by))
        tx.execute(of_reason.values(error=None))
