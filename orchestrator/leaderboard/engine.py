"""Short transactions on SQLite (a file protected by a fair lock) or on a PostgreSQL server (a schema and an
advisory lock for each run)."""

from __future__ import annotations

import re
import sqlite3
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import Timeout
from sqlalchemy import BigInteger, Connection, bindparam, create_engine, event, func, inspect, literal_column, select
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, NoSuchModuleError, OperationalError
from sqlalchemy.pool import NullPool, QueuePool
from sqlalchemy.schema import CreateSchema, DropSchema
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from orchestrator.errors import LeaderboardError
from orchestrator.files.run_folder import DATABASE_NAME
from orchestrator.leaderboard import schema
from orchestrator.leaderboard.statements import Statement
from orchestrator.locking.choice import Choice, lock_of, read_record
from orchestrator.locking.mounts import LOCAL, mount_here
from orchestrator.locking.soft_lock import HeldError

# The server releases this lock when the transaction ends: by a commit, a rollback or a lost connection. Advisory locks
# are granted in the order of the requests. Row locks are not: with a row lock and 64 processes, some processes waited
# 3 s, and a third fewer chunks were finished.
_RUN_LOCK = Statement(select(func.pg_advisory_xact_lock(bindparam("key", type_=BigInteger))))
_ANYTHING = Statement(select(literal_column("1").label("one")))
DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
SHORT_READ = sqlite3.SQLITE_IOERR | (2 << 8)  # SQLITE_IOERR_SHORT_READ: the file is truncated
# How long commands and jobs try to connect while the server restarts or has no free connection. Jobs try longer,
# because a job that gives up loses its work.
CONNECT_FOR_S, JOB_CONNECTS_FOR_S = 3.0, 300.0
# The server ends a transaction whose client hangs or is disconnected. Then the other clients, which wait up to
# lock_timeout for the run's lock, can continue. Don't use psycopg's pipelines: they send a Flush after a Sync, and the
# Flush stops the server's timer for idle transactions.
SERVER_LIMITS = "-c idle_in_transaction_session_timeout=60s -c lock_timeout=300s -c tcp_keepalives_idle=60"


class Database:
    """A database with the tables of one run. It allows only one transaction at a time."""

    def __init__(
        self, url: str | None, run_folder: Path, schema_name: str | None = None, connect_for_s: float = CONNECT_FOR_S
    ) -> None:
        """Prepare the database without connecting. url: a PostgreSQL server or a SQLite file; None: SQLite in the run
        folder. schema_name: the server's schema for this run. connect_for_s: how long to try to connect to a server.

        Raises LeaderboardError if the URL can't be used.
        """
        try:
            self.url: URL = make_url(url or f"sqlite:///{run_folder / DATABASE_NAME}")
            is_file = self.url.get_backend_name() == "sqlite"
            self.file = Path(self.url.database) if self.url.database and is_file else None
            self.lock_choice = read_record(self.file) if self.file else None  # None: a server, which has its own locks
            self._engine = self._make_engine(schema_name)
        except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
            raise LeaderboardError(
                f"database {_without_password(url)}: {error}; use a SQLAlchemy URL such as "
                "postgresql+psycopg://user@host/name (pip install 'orch[postgres]'), or leave it out to use SQLite"
            ) from error
        self.schema_name = schema_name
        self._lock_key = int.from_bytes(sha256(f"orch {schema_name}".encode()).digest()[:8], signed=True)
        self._run_name = run_folder.absolute().name
        self.connect_for_s = connect_for_s
        self._opened: tuple[int, int] | None = None  # device and inode of the SQLite file when it was last opened
        self._lock = lock_of(self.lock_choice, self.file) if self.lock_choice and self.file else None
        weakref.finalize(self, self._engine.dispose)

    def _make_engine(self, schema_name: str | None) -> Engine:
        if self.file:
            engine = create_engine(self.url, **_sqlite_options(self.file, self.lock_choice))
            event.listen(engine, "connect", _prepare_sqlite)
            event.listen(engine, "begin", _begin_immediate)
            return engine
        # Keep at most one connection, and only until `release_connection`: a large run has more workers than
        # a server allows connections.
        engine = create_engine(
            self.url,
            poolclass=QueuePool,
            pool_size=1,
            max_overflow=0,
            isolation_level="READ COMMITTED",  # enough, since the run's lock is taken first
            connect_args={"options": SERVER_LIMITS, "connect_timeout": 30},
        )
        return engine.execution_options(schema_translate_map={None: schema_name})

    def release_connection(self) -> None:
        """Close the server connection before a time without transactions, such as the training of a chunk."""
        if not self.file:
            self._engine.dispose()

    @property
    def name(self) -> str:
        """The database's file or URL for messages, without the password."""
        return str(self.file) if self.file else self.url.render_as_string(hide_password=True)

    @property
    def advice(self) -> str:
        """For messages: how to restore a lost database."""
        return f"`orch repair {self._run_name}` rebuilds it from the checkpoints' records"

    def _hint(self, error: BaseException) -> str:
        if is_damage(error):
            return f". {self.advice}"
        unreached = not self.file and isinstance(error, self._engine.dialect.loaded_dbapi.OperationalError)
        return ". See docs/postgresql.md for what the server needs" if unreached else ""

    def exists(self) -> bool:
        return self.file is None or self.file.exists()

    def refuse_empty(self) -> None:
        """Raise LeaderboardError if the file is empty, since SQLite would treat it as a new database."""
        if self.file and self.file.exists() and not self.file.stat().st_size:
            raise LeaderboardError(f"{self.file} is empty. {self.advice}")

    @contextmanager
    def transaction(self, own_lock: bool = True, keep: bool = True) -> Iterator[Connection]:
        """Run one transaction. Transactions of a run do not overlap: on SQLite because of the file lock and BEGIN
        IMMEDIATE, on a server because of an advisory lock. Commits at the end, rolls back on an exception. own_lock:
        whether to take the server's lock, which is not needed for reading. keep: if False, roll back at the end.

        Raises LeaderboardError if the database does not respond or is damaged.
        """
        if not self.exists():
            raise LeaderboardError(f"{self.file} is missing. {self.advice}")
        try:
            with self._lock or nullcontext(), self._begin(own_lock) as connection:
                yield connection
                if not keep:
                    connection.rollback()
        except Timeout as error:
            held_for_s = self._lock.timeout if self._lock else 0
            raise LeaderboardError(
                str(error)
                if isinstance(error, HeldError)
                else f"{error.lock_file} was held by another process for {held_for_s:.0f} s; "
                "is a process of this run stopped (SIGSTOP)?"
            ) from error
        except OSError as error:  # a lock file can't be opened or locked
            raise LeaderboardError(f"{self.name}: lock file {error.filename}: {error.strerror or error}") from error
        except (DatabaseError, self._engine.dialect.loaded_dbapi.DatabaseError) as error:
            cause = getattr(error, "orig", None) or error  # no orig: Statement uses the driver directly
            text = " ".join(str(cause).split())  # a server's message may have several lines
            raise LeaderboardError(f"{self.name}: {text}{self._hint(cause)}") from error

    @contextmanager
    def _begin(self, own_lock: bool) -> Iterator[Connection]:
        """Begin a transaction. On a server, retries the connection and the run's lock, but no statement after these."""
        if self.file:
            self._forget_if_replaced(self.file)
            try:
                with self._engine.begin() as connection:
                    yield connection
            except BaseException:  # after an error, don't keep the connection: its cache of the file may be wrong
                self._engine.dispose()
                raise
            return
        for attempt in Retrying(
            retry=retry_if_exception(self._is_worth_another_try),
            stop=stop_after_delay(self.connect_for_s),
            wait=wait_random_exponential(multiplier=0.1, max=5.0),
            reraise=True,
        ):
            with attempt:
                connection = self._on_server(own_lock)
        with connection:
            yield connection
            connection.commit()

    def _on_server(self, own_lock: bool) -> Connection:
        """Begin a transaction on the server and execute a statement, so that a broken connection is noticed here."""
        connection = self._engine.connect()
        try:
            connection.begin()
            if own_lock:
                _RUN_LOCK.first(connection, key=self._lock_key)
            else:
                _ANYTHING.first(connection)
        except BaseException:
            connection.invalidate()
            connection.close()
            raise
        return connection

    def _forget_if_replaced(self, file: Path) -> None:
        """Close the kept connection if the file was replaced, as `orch repair` does."""
        stat = file.stat()
        opened = (stat.st_dev, stat.st_ino)
        if opened != self._opened:
            self._engine.dispose()
            self._opened = opened

    def _is_worth_another_try(self, error: BaseException) -> bool:
        """Is the server starting, stopping, out of connections or unreachable? Then the SQLSTATE is missing or of class
        53 (insufficient resources), 57 (operator intervention) or 08 (connection). It is also missing if the login is
        refused, which only libpq's message shows."""
        cause = error.orig if isinstance(error, OperationalError) else error
        if not isinstance(cause, self._engine.dialect.loaded_dbapi.OperationalError):
            return False
        state = getattr(cause, "sqlstate", None)
        refused = "password" in str(cause) or "does not exist" in str(cause)
        return not refused and (state is None or state[:2] in ("53", "57", "08"))

    @contextmanager
    def creation(self) -> Iterator[Connection]:
        """Create the tables, and the SQLite file or, if missing, the server's schema. The caller writes the first rows
        in the same transaction. Raises LeaderboardError if the tables or the file already exist.
        """
        if self.file:
            if self.file.exists():
                raise LeaderboardError(f"{self.file} already exists")
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.touch()
        with self.transaction(own_lock=False) as connection:
            if self.schema_name:
                inspector = inspect(connection)
                if inspector.has_table(schema.run.name, schema=self.schema_name):
                    raise LeaderboardError(
                        f"{self.name}: the schema {self.schema_name} holds a run already; choose another "
                        '"database_schema", or leave it out to give each run its own schema'
                    )
                if not inspector.has_schema(self.schema_name):
                    connection.execute(CreateSchema(self.schema_name))
            schema.metadata.create_all(connection, checkfirst=False)
            yield connection

    def drop(self, schema_too: bool) -> None:
        """Undo `creation`. schema_too: also drop the schema (if created for this run). Raises LeaderboardError."""
        if self.file:
            self.file.unlink(missing_ok=True)
            journal_of(self.file).unlink(missing_ok=True)
            return
        with self.transaction(own_lock=False) as connection:
            schema.metadata.drop_all(connection)
            if self.schema_name and schema_too:
                connection.execute(DropSchema(self.schema_name))


def journal_of(file: Path) -> Path:
    """Return the path of SQLite's rollback journal, beside its file."""
    return file.with_name(f"{file.name}-journal")


def is_damage(error: BaseException | None) -> bool:
    """Does SQLite report a damaged file? Other errors (a lock, permissions, a full disk) may be temporary."""
    if not isinstance(error, sqlite3.DatabaseError):
        return False
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:
        return "decode" in str(error)  # for a text that is not UTF-8, sqlite3 sets no code, only this message
    return code & 0xFF in DAMAGE or code == SHORT_READ


def _without_password(url: str | None) -> str:
    """Mask the password in a URL for messages, even if SQLAlchemy can't parse the URL."""
    return re.sub(r"(://[^:/@]*:)[^@]*@", r"\1***@", url or "")


def _sqlite_options(file: Path, lock: Choice | None) -> dict[str, Any]:
    """Return create_engine's options for opening and keeping connections to a SQLite file.

    On a local file system, the connection is kept. SQLite then reads the schema and compiles the statements only once,
    which saves half of the work of a short transaction. A network file system shows the writes of other nodes only when
    a file is opened, so on such a file system, each transaction opens the file after it has taken the lock.
    """
    options: dict[str, Any] = {"pool_reset_on_return": None}  # a returned connection has no open transaction
    mount = mount_here(file.parent.resolve())
    kept = mount is not None and mount.fstype in LOCAL
    options |= {"poolclass": QueuePool, "pool_size": 1, "max_overflow": 0} if kept else {"poolclass": NullPool}
    if lock and not lock.sqlite_locks:  # the mount refuses SQLite's own locks; orch's lock is enough
        uri = f"{file.absolute().as_uri()}?vfs=unix-none"
        options["creator"] = lambda: sqlite3.connect(uri, uri=True)
    return options


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    """Configure a new connection.

    With the journal mode PERSIST, a commit overwrites the header of the rollback journal and never deletes the journal.
    DELETE would create and delete a journal in each transaction. This is a quarter slower on a local disk. On a network
    file system, it costs two more requests to the metadata server, and other nodes may not see the journal at once.
    Also, the deletion survives a power cut only with synchronous=EXTRA. WAL needs shared memory, which the processes of
    different nodes do not have.
    """
    connection.isolation_level = None  # the driver begins no transactions; _begin_immediate does
    connection.execute("PRAGMA journal_mode=PERSIST")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")
    connection.execute("PRAGMA busy_timeout=60000")  # wait for other programs, which do not take orch's lock


def _begin_immediate(connection: Connection) -> None:
    connection.connection.execute("BEGIN IMMEDIATE")
