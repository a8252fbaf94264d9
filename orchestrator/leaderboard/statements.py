"""Statements that every chunk executes: written in SQLAlchemy Core, turned into SQL once a process.

All that happens between taking the lock around SQLite and giving it back is waited for by every other worker. Core's
own way from a statement to the driver costs about as much there as SQLite's work, at some fifteen statements a chunk.
"""

from __future__ import annotations

import sqlite3
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import Connection, CursorResult, Delete, Insert, Select, Update
from sqlalchemy.sql.compiler import SQLCompiler

Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Compiled:
    """For SQLite's driver."""

    sql: str
    names: tuple[str, ...]  # of its parameters, in their order
    constants: Mapping[str, Any]
    processors: Mapping[str, Callable[[Any], Any]]  # such as a dict to JSON

    def parameters(self, values: Values) -> list[Any]:
        return [self._parameter(name, values) for name in self.names]

    def _parameter(self, name: str, values: Values) -> Any:
        value = values[name] if name in values else self.constants[name]
        return self.processors[name](value) if name in self.processors else value


class Statement:
    """One statement with named parameters. On SQLite the driver gets it as it is, elsewhere SQLAlchemy executes it.

    Rows have their columns as attributes. Values of SQLite's rows are as it stores them: no JSON, and 0 or 1 for a
    Boolean, so these two are not for reading here.
    """

    def __init__(self, core: Select[Any] | Insert | Update | Delete) -> None:
        self._core = core
        self._compiled: dict[tuple[str, ...], _Compiled] = {}  # by the names of the values
        self._make_row = _row_maker(core.selected_columns.keys()) if isinstance(core, Select) else None

    def all(self, tx: Connection, **values: Any) -> Sequence[Any]:
        return self._execute(tx, values).fetchall()

    def first(self, tx: Connection, **values: Any) -> Any:
        """The first row, or None."""
        return self._execute(tx, values).fetchone()

    def write(self, tx: Connection, **values: Any) -> int:
        """How many rows it has changed."""
        return self._execute(tx, values).rowcount

    def insert(self, tx: Connection, **values: Any) -> int:
        """The new row's key."""
        done = self._execute(tx, values)
        key = done.lastrowid if isinstance(done, sqlite3.Cursor) else done.inserted_primary_key[0]  # type: ignore[index]
        assert isinstance(key, int)
        return key

    def insert_all(self, tx: Connection, rows: Sequence[Values]) -> None:
        """Rows of the same columns, at least one."""
        if tx.dialect.name != "sqlite":
            tx.execute(self._core, rows)
            return
        compiled = self._for_driver(tx, tuple(rows[0]))
        _driver(tx).executemany(compiled.sql, [compiled.parameters(row) for row in rows])

    def _execute(self, tx: Connection, values: Values) -> sqlite3.Cursor | CursorResult[Any]:
        if tx.dialect.name != "sqlite":
            return tx.execute(self._core, values)
        compiled = self._for_driver(tx, tuple(values))
        cursor = _driver(tx).execute(compiled.sql, compiled.parameters(values))
        cursor.row_factory = self._make_row
        return cursor

    def _for_driver(self, tx: Connection, names: tuple[str, ...]) -> _Compiled:
        if names in self._compiled:
            return self._compiled[names]
        # Of an insert or update, the names that are columns say what is written.
        core = self._core.compile(dialect=tx.dialect, column_keys=list(names))
        assert isinstance(core, SQLCompiler)
        assert core.positiontup is not None, "SQLite's parameters have places"
        binds = core.binds.items()
        found = {name: bind.type.dialect_impl(tx.dialect).bind_processor(tx.dialect) for name, bind in binds}
        compiled = self._compiled[names] = _Compiled(
            core.string,
            tuple(core.positiontup),
            {name: bind.value for name, bind in binds},
            {name: processor for name, processor in found.items() if processor is not None},
        )
        return compiled


def _row_maker(columns: Sequence[str]) -> Callable[[sqlite3.Cursor, tuple[Any, ...]], Any]:
    make = cast(Any, namedtuple)("Row", columns)._make
    return lambda _cursor, values: make(values)


def _driver(tx: Connection) -> sqlite3.Connection:
    connection = tx.connection.driver_connection
    assert isinstance(connection, sqlite3.Connection)
    return connection
