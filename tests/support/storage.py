"""Leaderboards for tests: in SQLite files in the run's folder, or in schemas of a PostgreSQL server."""

from __future__ import annotations

import secrets
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy

from orchestrator.leaderboard.leaderboard import Leaderboard
from orchestrator.settings.settings import Settings

TABLES = ("run", "worker", "job", "checkpoint", "entry", "chunk", "epoch", "event")


@dataclass(frozen=True, slots=True)
class Storage:
    url: str | None  # None: SQLite

    def make(self, folder: Path, settings: Settings, durable: bool = True) -> Leaderboard:
        """Make a new run's leaderboard. durable: commits wait for the disk, which takes minutes in some tests."""
        schema = f"test_{secrets.token_hex(6)}" if self.url else None
        Leaderboard.create(folder, self.url, schema, settings=settings, import_paths=[], now=0.0, deadline=1e12)
        board = Leaderboard.open(folder, self.url, schema)
        if self.url is None and not durable:
            sqlalchemy.event.listen(board.database._engine, "connect", do_not_wait_for_the_disk)
        return board

    def remove(self, board: Leaderboard) -> None:
        board.database.drop(schema_too=True)
        board.database.release_connection()

    def rows(self, board: Leaderboard, *names: str) -> list[list[dict[str, Any]]]:
        """Return the rows of these tables, ordered by key. SQLite is read directly, which is faster."""
        if self.url is None:
            assert board.database.file is not None
            with closing(sqlite3.connect(board.database.file)) as connection:
                connection.row_factory = sqlite3.Row
                return [[dict(r) for r in connection.execute(f"SELECT * FROM {name} ORDER BY 1")] for name in names]
        with board.database.transaction() as tx:
            where = board.database.schema_name
            select = [sqlalchemy.text(f"SELECT * FROM {where}.{name} ORDER BY 1") for name in names]
            return [[dict(r._mapping) for r in tx.execute(query)] for query in select]

    def contents(self, board: Leaderboard) -> list[list[dict[str, Any]]]:
        """Return all rows of the database."""
        return self.rows(board, *TABLES)


def do_not_wait_for_the_disk(connection: sqlite3.Connection, _record: object) -> None:
    for pragma in ("synchronous=OFF", "journal_mode=MEMORY"):
        connection.execute(f"PRAGMA {pragma}")
