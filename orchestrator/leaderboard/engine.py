"""Short transactions on SQLite (one file, one fair lock around it) or on a database server."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from filelock import Timeout
from sqlalchemy import Connection, create_engine, event, select
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, NoSuchModuleError
from sqlalchemy.pool import NullPool

from orchestrator.errors import LeaderboardError
from orchestrator.leaderboard import schema
from orchestrator.locks import FairFileLock, lock_path

DATABASE_NAME = "orch.db"


class Database:
    """Where the tables are, and how to get at them for one transaction at a time."""

    def __init__(self, url: str | None, run_folder: Path) -> None:
        """url: any SQLAlchemy URL; None is SQLite in the run folder. Nothing is opened yet."""
        try:
            self.url: URL = make_url(url or f"sqlite:///{run_folder / DATABASE_NAME}")
            self.file = Path(self.url.database) if self.url.database and self._sqlite else None
            self._engine: Engine = create_engine(self.url, poolclass=NullPool)
        except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
            raise LeaderboardError(
                f"database {_without_password(url)}: {error}; allowed is a SQLAlchemy URL such as "
                "postgresql+psycopg://user@host/name (pip install 'orch[postgres]'), or nothing for SQLite"
            ) from error
        self._lock = FairFileLock(lock_path(self.file)) if self.file else None
        if self.file:
            event.listen(self._engine, "connect", _prepare_sqlite)
            event.listen(self._engine, "begin", _begin_immediate)

    @property
    def _sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    @property
    def name(self) -> str:
        """For messages: without a password."""
        return str(self.file) if self.file else self.url.render_as_string(hide_password=True)

    def exists(self) -> bool:
        return self.file is None or self.file.exists()

    @contextmanager
    def transaction(self, row_lock: bool = True) -> Iterator[Connection]:
        """One transaction, serialised with all others of this run: the outer lock and BEGIN IMMEDIATE on
        SQLite, the lock of the run's row elsewhere. Commits at the end, rolls back on an exception.

        Raises LeaderboardError where the database does not answer or is damaged.
        """
        with self._open() as connection:
            if row_lock and not self.file:
                connection.execute(select(schema.run.c.run_id).with_for_update())
            yield connection

    @contextmanager
    def _open(self) -> Iterator[Connection]:
        if not self.exists():
            raise LeaderboardError(f"{self.file} is missing. Put it back from a backup, or launch under a new name")
        try:
            with self._lock or nullcontext(), self._engine.begin() as connection:
                yield connection
        except Timeout as error:
            raise LeaderboardError(
                f"{error.lock_file} was held by another process for {self._lock.timeout if self._lock else 0:.0f} s; "
                "is a process of this run stopped (SIGSTOP)?"
            ) from error
        except DatabaseError as error:
            raise LeaderboardError(f"{self.name}: {error.orig or error}") from error

    def create(self) -> None:
        """Create the tables; for SQLite the file too. Raises LeaderboardError if they are there already."""
        if self.file:
            if self.file.exists():
                raise LeaderboardError(f"{self.file} exists already")
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.touch()
        with self._open() as connection:
            schema.metadata.create_all(connection, checkfirst=False)


def _without_password(url: str | None) -> str:
    """For messages, whether it is a URL that SQLAlchemy understands or not."""
    return re.sub(r"(://[^:/@]*:)[^@]*@", r"\1***@", url or "")


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # transactions are begun by _begin_immediate, not by the driver
    # DELETE, never WAL: WAL needs shared memory, which a network file system does not have. FULL: a commit
    # that was reported survives a power cut. The timeout serves a reader from outside that takes no lock.
    for pragma in ("journal_mode=DELETE", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=60000"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
