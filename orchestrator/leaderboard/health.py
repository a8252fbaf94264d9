"""Is a run's database there, whole, and consistent with itself? Looks only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, inspect, select, text
from sqlalchemy.exc import DatabaseError

from orchestrator import __version__
from orchestrator.errors import LeaderboardError
from orchestrator.leaderboard import schema
from orchestrator.leaderboard.engine import Database, is_damage
from orchestrator.leaderboard.links import OPEN
from orchestrator.leaderboard.moves import job_of
from orchestrator.records import ChainJob, ChunkState, JobState, RunState

STATES = {"run": RunState, "job": JobState, "chunk": ChunkState}

Tables = Mapping[str, Sequence[Mapping[str, Any]]]


class Condition(StrEnum):
    HEALTHY = "healthy"
    DAMAGED = "damaged"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Health:
    """What was found, and what is wrong."""

    condition: Condition
    problems: tuple[str, ...] = ()


def check_version(database: Database, schema_version: int, orch_version: str) -> None:
    """Raises LeaderboardError if this version of orch does not know the tables."""
    if schema_version != schema.SCHEMA_VERSION:
        raise LeaderboardError(
            f"{database.name} was written by orch {orch_version} (schema {schema_version}); this is orch "
            f"{__version__} (schema {schema.SCHEMA_VERSION}). Use that version for this run."
        )


def examine(database: Database) -> Health:
    """Raises LeaderboardError if that can't be found out now (the server does not answer, the file is locked or must
    not be read), or if another version of orch wrote the database."""
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
    except (ValueError, TypeError, LookupError) as error:  # a column that holds no JSON, no text, no number
        return Health(Condition.DAMAGED, (f"{database.name}: {error}",))


def _original(error: BaseException) -> BaseException | None:
    cause = error.__cause__
    return cause.orig if isinstance(cause, DatabaseError) else cause


def _examine(tx: Connection, database: Database) -> Health:
    there = set(inspect(tx).get_table_names(schema=database.schema_name))
    missing = sorted(set(schema.metadata.tables) - there)
    if schema.run.name in there:
        _check_version(tx, database)
    if missing:
        lost = len(missing) == len(schema.metadata.tables)
        condition = Condition.LOST if lost and database.file is None else Condition.DAMAGED
        where = f"{database.name}{f', schema {database.schema_name}' if database.schema_name else ''}"
        return Health(condition, (f"{where}: the tables {', '.join(missing)} are missing",))
    if database.file:
        said = tx.execute(text("PRAGMA integrity_check")).scalars().all()
        if said != ["ok"]:
            return Health(Condition.DAMAGED, tuple(str(line) for line in said[:10]))
        orphans = tx.execute(text("PRAGMA foreign_key_check")).all()
        if orphans:
            return Health(Condition.DAMAGED, tuple(f"{o[0]}: row {o[1]} refers to a missing {o[2]}" for o in orphans))
    tables = {name: [dict(r._mapping) for r in tx.execute(select(t))] for name, t in schema.metadata.tables.items()}
    problems = inconsistencies(tables)
    return Health(Condition.DAMAGED if problems else Condition.HEALTHY, tuple(problems))


def _check_version(tx: Connection, database: Database) -> None:
    """As far as it can be read: what is damaged is found afterwards."""
    if database.file is None:
        names = {column["name"] for column in inspect(tx).get_columns(schema.run.name, schema=database.schema_name)}
        if not {"schema_version", "orch_version"} <= names:
            return
    try:
        row = tx.execute(select(schema.run.c.schema_version, schema.run.c.orch_version)).first()
    except DatabaseError:
        return
    if row is not None and isinstance(row.schema_version, int):
        check_version(database, row.schema_version, str(row.orch_version))


@dataclass(frozen=True, slots=True)
class RunRow:
    """Of a damaged database, what a new one needs."""

    settings: str  # JSON
    import_paths: tuple[str, ...]
    launched_at: float


def run_row(database: Database) -> RunRow | None:
    """None where the run's row can't be read, or is not what orch wrote."""
    run = schema.run
    try:
        database.refuse_empty()
        with database.transaction(own_lock=False) as tx:
            row = tx.execute(select(run.c.settings, run.c.import_paths, run.c.created_at)).one_or_none()
    except (LeaderboardError, ValueError, TypeError, LookupError):
        return None
    if row is None or not isinstance(row.settings, str) or not isinstance(row.created_at, float):
        return None
    paths = row.import_paths
    whole = isinstance(paths, list) and all(isinstance(path, str) for path in paths)
    return RunRow(row.settings, tuple(paths), row.created_at) if whole else None


def open_jobs(database: Database) -> list[ChainJob]:
    """Of a damaged database, the jobs that were not over; none where that can't be read."""
    job = schema.job
    try:
        database.refuse_empty()
        with database.transaction(own_lock=False) as tx:
            return [job_of(row) for row in tx.execute(select(job).where(job.c.state.in_(OPEN))).all()]
    except (LeaderboardError, ValueError, TypeError, LookupError):
        return []


def inconsistencies(tables: Tables) -> list[str]:
    """What orch never writes, in the rows of all its tables: a line for each, at most ten."""
    if len(tables["run"]) != 1:
        return [f"run: {len(tables['run'])} rows, not 1"]
    found = [
        f"{name}: the state {row['state']!r} of a row is none"
        for name, states in STATES.items()
        for row in tables[name]
        if row["state"] not in {str(state) for state in states}
    ]
    by_id = {c["checkpoint_id"]: c for c in tables["checkpoint"]}
    entered = {e["checkpoint_id"] for e in tables["entry"]}
    found += [f"checkpoint {key} has no entry" for key in by_id if key not in entered]
    found += [
        f"checkpoint {key}: its founder {row['founder_id']} is missing"
        for key, row in by_id.items()
        if row["founder_id"] not in by_id
    ]
    found += [
        f"entry {e['entry_id']} is on the board, and its checkpoint's file is released"
        for e in tables["entry"]
        if e["on_board"] and by_id[e["checkpoint_id"]]["released"]
    ]
    highest = max((c["generation"] for c in tables["chunk"]), default=0)
    if highest > tables["run"][0]["generation"]:
        found.append(f"chunk: generation {highest} was never given; the run's last is {tables['run'][0]['generation']}")
    return found[:10]
