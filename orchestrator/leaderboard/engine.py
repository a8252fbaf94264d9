"""Short transactions on SQLite (one file, one fair lock around it) or on a PostgreSQL server (a schema a run, one
advisory lock)."""

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
from orchestrator.locking.choice import lock_of, read_record
from orchestrator.locking.mounts import is_local, mount_here
from orchestrator.locking.soft_lock import HeldError

# Released by the server at the transaction's end, whatever ends it. Its waiters have a queue; those of a row's lock
# have none: with 64 processes some waited for 3 s, and a third fewer chunks were done.
_RUN_LOCK = Statement(select(func.pg_advisory_xact_lock(bindparam("key", type_=BigInteger))))
_ANYTHING = Statement(select(literal_column("1").label("one")))
DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
SHORT_READ = sqlite3.SQLITE_IOERR | (2 << 8)  # a file that ends too early
# A server that restarts, or has no connection to spare, is asked again for so long: by a command, and by a job,
# which has work to lose.
CONNECT_FOR_S, JOB_CONNECTS_FOR_S = 3.0, 300.0
# What the server does by itself about a client that was stopped or lost in the middle of a transaction, so that
# the others go on; and how long these wait for the run's lock before they say so. (No pipeline of psycopg's: it ends
# with a Flush after its Sync, which stops the server's clock for idle transactions.)
SERVER_LIMITS = "-c idle_in_transaction_session_timeout=60s -c lock_timeout=300s -c tcp_keepalives_idle=60"


class Database:
    """Where the tables are, and how to get at them for one transaction at a time."""

    def __init__(
        self, url: str | None, run_folder: Path, schema_name: str | None = None, connect_for_s: float = CONNECT_FOR_S
    ) -> None:
        """url: of PostgreSQL or of a SQLite file; None is SQLite in the run folder. schema_name: where this run's
        tables are on a server, so that runs share a database and never a table. connect_for_s: how long a server that
        does not answer is tried. Nothing is opened yet.
        """
        try:
            self.url: URL = make_url(url or f"sqlite:///{run_folder / DATABASE_NAME}")
            self.file = Path(self.url.database) if self.url.database and self._sqlite else None
            self.lock_choice = read_record(self.file) if self.file else None  # a server keeps its own
            self._engine = self._make_engine(schema_name)
        except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
            raise LeaderboardError(
                f"database {_without_password(url)}: {error}; allowed is a SQLAlchemy URL such as "
                "postgresql+psycopg://user@host/name (pip install 'orch[postgres]'), or nothing for SQLite"
            ) from error
        self.schema_name = schema_name
        self._lock_key = int.from_bytes(sha256(f"orch {schema_name}".encode()).digest()[:8], signed=True)
        self._run_name = run_folder.absolute().name
        self.connect_for_s = connect_for_s
        self._opened: tuple[int, int] | None = None  # device and inode of the file that a kept connection is to
        self._lock = lock_of(self.lock_choice, self.file) if self.lock_choice and self.file else None
        weakref.finalize(self, self._engine.dispose)

    def _make_engine(self, schema_name: str | None) -> Engine:
        if self.file:
            # There is nothing to reset: a connection is closed after its one transaction, or has committed it.
            engine = create_engine(self.url, pool_reset_on_return=None, **self._pool(), **self._without_fcntl())
            event.listen(engine, "connect", _prepare_sqlite)
            event.listen(engine, "begin", _begin_immediate)
            return engine
        # One connection, kept between transactions that follow each other and let go by `rest`: a server has
        # fewer connections than a large run has workers.
        engine = create_engine(
            self.url,
            poolclass=QueuePool,
            pool_size=1,
            max_overflow=0,
            isolation_level="READ COMMITTED",  # with the run's lock taken first, each statement sees all of it
            connect_args={"options": SERVER_LIMITS, "connect_timeout": 30},
        )
        return engine.execution_options(schema_translate_map={None: schema_name})

    def _pool(self) -> dict[str, Any]:
        """Where no other node sees the file, its connection is kept: SQLite then reads the schema and compiles the
        statements once, half of its work in a short transaction. Network file systems show what other nodes have
        written when a file is opened, so there it is opened within the lock, each time.
        """
        mount = mount_here(self.file.parent.resolve()) if self.file else None
        if mount and is_local(mount.fstype):
            return {"poolclass": QueuePool, "pool_size": 1, "max_overflow": 0}
        return {"poolclass": NullPool}

    def _without_fcntl(self) -> dict[str, Any]:
        """Where a mount refuses SQLite's own locks, the lock around it has to do."""
        if self.file is None or self.lock_choice is None or self.lock_choice.sqlite_locks:
            return {}
        uri = f"{self.file.absolute().as_uri()}?vfs=unix-none"
        return {"creator": lambda: sqlite3.connect(uri, uri=True)}

    def rest(self) -> None:
        """Nothing will be asked for a while (a chunk is trained): give the server its connection back."""
        if not self.file:
            self._engine.dispose()

    @property
    def _sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    @property
    def name(self) -> str:
        """For messages: without a password."""
        return str(self.file) if self.file else self.url.render_as_string(hide_password=True)

    @property
    def advice(self) -> str:
        """For a database that is lost."""
        return f"`orch repair {self._run_name}` rebuilds it from the checkpoints' records"

    def _hint(self, error: BaseException | None) -> str:
        if is_damage(error):
            return f". {self.advice}"
        unreached = not self.file and isinstance(error, self._engine.dialect.loaded_dbapi.OperationalError)
        return ". docs/postgresql.md says what a server needs" if unreached else ""

    def exists(self) -> bool:
        return self.file is None or self.file.exists()

    def refuse_empty(self) -> None:
        """Raises LeaderboardError for a file of no bytes, which SQLite would take for a new database."""
        if self.file and self.file.exists() and not self.file.stat().st_size:
            raise LeaderboardError(f"{self.file} is empty. {self.advice}")

    @contextmanager
    def transaction(self, own_lock: bool = True) -> Iterator[Connection]:
        """One transaction, serialised with all others of this run: the outer lock and BEGIN IMMEDIATE on SQLite, an
        advisory lock on a server. Commits at the end, rolls back on an exception. own_lock: False where there may be
        no run yet, to look only.

        Raises LeaderboardError where the database does not answer or is damaged.
        """
        with self._open(own_lock) as connection:
            yield connection

    @contextmanager
    def _open(self, own_lock: bool = False) -> Iterator[Connection]:
        if not self.exists():
            raise LeaderboardError(f"{self.file} is missing. {self.advice}")
        try:
            with self._lock or nullcontext(), self._begin(own_lock) as connection:
                yield connection
        except Timeout as error:
            held_for_s = self._lock.timeout if self._lock else 0
            raise LeaderboardError(
                str(error)
                if isinstance(error, HeldError)
                else f"{error.lock_file} was held by another process for {held_for_s:.0f} s; "
                "is a process of this run stopped (SIGSTOP)?"
            ) from error
        except DatabaseError as error:
            raise LeaderboardError(f"{self.name}: {_in_a_line(error.orig or error)}{self._hint(error.orig)}") from error
        except OSError as error:  # of the lock's files
            raise LeaderboardError(f"{self.name}: its lock: {error.filename}: {error.strerror or error}") from error
        except self._engine.dialect.loaded_dbapi.DatabaseError as error:  # of a Statement: from the driver directly
            raise LeaderboardError(f"{self.name}: {_in_a_line(error)}{self._hint(error)}") from error

    @contextmanager
    def _begin(self, own_lock: bool) -> Iterator[Connection]:
        """Connecting to a server and waiting for its lock are tried again, since nothing was asked yet; what was begun
        never is."""
        if self.file:
            self._forget_if_replaced(self.file)
            try:
                with self._engine.begin() as connection:
                    yield connection
            except BaseException:  # what a kept connection thinks of the file may be wrong now
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
        """A connection in a transaction. A kept one may be lost: the first statement finds out."""
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
        """`orch repair` puts another file in the place of a damaged one."""
        found = file.stat()
        opened = (found.st_dev, found.st_ino)
        if opened != self._opened:
            self._engine.dispose()
            self._opened = opened

    def _is_worth_another_try(self, error: BaseException) -> bool:
        """A server that starts or ends, that can't be reached just now or has too many clients: SQLSTATE classes
        53 (insufficient resources), 57 (operator intervention) and 08 (connection), or none at all."""
        cause = error.orig if isinstance(error, OperationalError) else error
        if not isinstance(cause, self._engine.dialect.loaded_dbapi.OperationalError):
            return False
        state = getattr(cause, "sqlstate", None)
        refused = "password" in str(cause) or "does not exist" in str(cause)
        return not refused and (state is None or state[:2] in ("53", "57", "08"))

    @contextmanager
    def creation(self) -> Iterator[Connection]:
        """Create the tables, for SQLite the file too, for a server the schema if it is not there yet; what the
        caller then writes belongs to the same transaction: all of it or nothing is there.

        Raises LeaderboardError if the tables are there already.
        """
        if self.file:
            if self.file.exists():
                raise LeaderboardError(f"{self.file} exists already")
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.touch()
        with self._open() as connection:
            if self.schema_name:
                there = inspect(connection)
                if there.has_table(schema.run.name, schema=self.schema_name):
                    raise LeaderboardError(
                        f"{self.name}: the schema {self.schema_name} holds a run already; choose another "
                        '"database_schema", or leave it out and each run gets one of its own'
                    )
                if not there.has_schema(self.schema_name):
                    connection.execute(CreateSchema(self.schema_name))
            schema.metadata.create_all(connection, checkfirst=False)
            yield connection

    def drop(self, schema_too: bool) -> None:
        """Undo `create`. schema_too: it was made for this run. Raises LeaderboardError."""
        if self.file:
            self.file.unlink(missing_ok=True)
            journal_of(self.file).unlink(missing_ok=True)
            return
        with self._open() as connection:
            schema.metadata.drop_all(connection)
            if self.schema_name and schema_too:
                connection.execute(DropSchema(self.schema_name))


def journal_of(file: Path) -> Path:
    """Where SQLite keeps what undoes a transaction, beside its file."""
    return file.with_name(f"{file.name}-journal")


def is_damage(error: BaseException | None) -> bool:
    """Does SQLite say that the file is not what it wrote? All else (a lock, a right, a full disk) may be over soon."""
    if not isinstance(error, sqlite3.DatabaseError):
        return False
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:
        return "decode" in str(error)  # of text that is none
    return code & 0xFF in DAMAGE or code == SHORT_READ


def _in_a_line(error: BaseException) -> str:
    """Servers explain themselves in several."""
    return " ".join(str(error).split())


def _without_password(url: str | None) -> str:
    """For messages, whether it is a URL that SQLAlchemy understands or not."""
    return re.sub(r"(://[^:/@]*:)[^@]*@", r"\1***@", url or "")


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    """What each new connection is told.

    PERSIST: a rollback journal whose header is overwritten to commit, and which is never deleted. DELETE makes and
    deletes it in each transaction, two changes of the folder: slower by a quarter on a local disk, two more requests to
    the metadata server of a network file system, whose other nodes may not see at once that it is there; and only
    with synchronous=EXTRA does the deletion outlast a power cut. Never WAL: that needs shared memory between the nodes.
    """
    connection.isolation_level = None  # transactions are begun by _begin_immediate, not by the driver
    connection.execute("PRAGMA journal_mode=PERSIST")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")
    connection.execute("PRAGMA busy_timeout=60000")  # serves a reader from outside that takes no lock


def _begin_immediate(connection: Connection) -> None:
    connection.connection.execute("BEGIN IMMEDIATE")
