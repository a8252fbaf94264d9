"""Check whether a run's database exists, is intact and is consistent. Changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, Row, Select, inspect, select, text
from sqlalchemy.exc import DatabaseError

from orchestrator.errors import LeaderboardError, SettingsError
from orchestrator.leaderboard import schema
from orchestrator.leaderboard.engine import Database, is_damage
from orchestrator.leaderboard.links import IS_OPEN
from orchestrator.leaderboard.moves import job_of
from orchestrator.leaderboard.upgrade import check_version, columns_in
from orchestrator.records import ChainJob, ChunkState, ExpiredBy, JobState, RunState, StopKind
from orchestrator.settings.loading import thaw
from orchestrator.settings.settings import Settings

ALLOWED: Mapping[tuple[str, str], frozenset[str | None]] = {  # allowed values, by table and column
    ("run", "state"): frozenset(map(str, RunState)),
    ("job", "state"): frozenset(map(str, JobState)),
    ("chunk", "state"): frozenset(map(str, ChunkState)),
    ("chunk", "expired_by"): frozenset([None, *map(str, ExpiredBy)]),
    ("worker", "stop_kind"): frozenset([None, *map(str, StopKind)]),
}

Tables = Mapping[str, Sequence[Mapping[str, Any]]]


class Condition(StrEnum):
    HEALTHY = "healthy"
    DAMAGED = "damaged"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Health:
    """The condition of a database, and its problems."""

    condition: Condition
    problems: tuple[str, ...] = ()


def examine(database: Database) -> Health:
    """Examine the database. Raises LeaderboardError if this is not possible now (the server does not respond, the file
    is locked or not readable), or if an unknown version of orch wrote the database."""
    if not database.exists():
        return Health(Condition.LOST, (f"{database.name} is missing",))
    if database.file and not database.file.stat().st_size:
        return Health(Condition.DAMAGED, (f"{database.name} is empty",))
    try:
        with database.transaction(own_lock=False) as tx:
            return _examine(tx, database)
    except LeaderboardError as error:
        if not is_damage(_original(error)):
            raise
        return Health(Condition.DAMAGED, (f"{database.name}: {_original(error)}",))
    except (ValueError, TypeError, LookupError) as error:  # a value of the wrong type in a column
        return Health(Condition.DAMAGED, (f"{database.name}: {error}",))


def _original(error: BaseException) -> BaseException | None:
    cause = error.__cause__
    return cause.orig if isinstance(cause, DatabaseError) else cause


def _examine(tx: Connection, database: Database) -> Health:
    tables = set(inspect(tx).get_table_names(schema=database.schema_name))
    missing = sorted(set(schema.metadata.tables) - tables)
    version = _checked_version(tx, database) if schema.run.name in tables else schema.SCHEMA_VERSION
    if missing:
        lost = len(missing) == len(schema.metadata.tables)
        condition = Condition.LOST if lost and database.file is None else Condition.DAMAGED
        where = f"{database.name}{f', schema {database.schema_name}' if database.schema_name else ''}"
        return Health(condition, (f"{where}: the tables {', '.join(missing)} are missing",))
    if database.file:
        report = tx.execute(text("PRAGMA integrity_check")).scalars().all()
        if report != ["ok"]:
            return Health(Condition.DAMAGED, tuple(str(line) for line in report[:10]))
        orphans = tx.execute(text("PRAGMA foreign_key_check")).all()
        if orphans:
            return Health(Condition.DAMAGED, tuple(f"{o[0]}: row {o[1]} refers to a missing {o[2]}" for o in orphans))
    problems = inconsistencies(
        {
            name: [dict(row._mapping) for row in tx.execute(select(*columns_in(version, table)))]
            for name, table in schema.metadata.tables.items()
        }
    )
    return Health(Condition.DAMAGED if problems else Condition.HEALTHY, tuple(problems))


def _checked_version(tx: Connection, database: Database) -> int:
    """Return the version of the tables. If it can't be read, return the current version: the caller reports the damage
    later. Raises LeaderboardError for an unknown version."""
    if database.file is None:  # on a server, a query that fails would end the transaction
        names = {column["name"] for column in inspect(tx).get_columns(schema.run.name, schema=database.schema_name)}
        if not {"schema_version", "orch_version"} <= names:
            return schema.SCHEMA_VERSION
    try:
        row = tx.execute(select(schema.run.c.schema_version, schema.run.c.orch_version)).first()
    except DatabaseError:
        return schema.SCHEMA_VERSION
    if row is None or not isinstance(row.schema_version, int):
        return schema.SCHEMA_VERSION
    check_version(database, row.schema_version, str(row.orch_version))
    return int(row.schema_version)


@dataclass(frozen=True, slots=True)
class RunRow:
    """The values that a new database needs from the run's row of the damaged one."""

    settings: Settings
    import_paths: list[str]
    launched_at: float


def run_row(database: Database) -> RunRow | None:
    """Return the run's row, or None if it can't be read or holds values that orch never writes."""
    rows = _salvaged(database, select(*schema.run.c["settings", "import_paths", "created_at"]))
    if len(rows) != 1 or not isinstance(rows[0].settings, str) or not isinstance(rows[0].created_at, float):
        return None
    paths = rows[0].import_paths
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        return None
    try:
        return RunRow(thaw(rows[0].settings), paths, rows[0].created_at)
    except SettingsError:
        return None


def open_jobs(database: Database) -> list[ChainJob]:
    """Return the open jobs in a damaged database; an empty list if they can't be read."""
    try:
        return [job_of(row) for row in _salvaged(database, select(schema.job).where(IS_OPEN))]
    except ValueError:
        return []


def _salvaged(database: Database, query: Select[Any]) -> Sequence[Row[Any]]:
    """Return rows of a damaged database; an empty list if they can't be read."""
    try:
        database.refuse_empty()
        with database.transaction(own_lock=False) as tx:
            return tx.execute(query).all()
    except (LeaderboardError, ValueError, TypeError, LookupError):
        return []


def inconsistencies(tables: Tables) -> list[str]:
    """Return at most ten lines, each describing a contradiction in the tables. orch itself never writes such tables."""
    if len(tables["run"]) != 1:
        return [f"run: {len(tables['run'])} rows, not 1"]
    problems = [
        f"{table}: a row has the unknown {column} {row[column]!r}"
        for (table, column), allowed in ALLOWED.items()
        for row in tables[table]
        if row.get(column) not in allowed
    ]
    by_id = {c["checkpoint_id"]: c for c in tables["checkpoint"]}
    entered = {e["checkpoint_id"] for e in tables["entry"]}
    problems += [f"checkpoint {key} has no entry" for key in by_id if key not in entered]
    problems += [
        f"checkpoint {key}: its founder {row['founder_id']} is missing"
        for key, row in by_id.items()
        if row["founder_id"] not in by_id
    ]
    problems += [
        f"entry {e['entry_id']} is on the board, but its checkpoint is marked as released"
        for e in tables["entry"]
        if e["on_board"] and by_id[e["checkpoint_id"]]["released"]
    ]
    highest = max((c["generation"] for c in tables["chunk"]), default=0)
    if highest > tables["run"][0]["generation"]:
        problems.append(
            f"chunk: generation {highest} was never issued; the run's latest is {tables['run'][0]['generation']}"
        )
    return problems[:10]
