"""Statements that every chunk executes: written in SQLAlchemy Core, turned into SQL once a process.

All that happens between taking a run's lock and giving it back is waited for by every other worker. Core's own way
from a statement to the driver costs about as much there as the database's work, at some fifteen statements a chunk.
"""

from __future__ import annotations

import sqlite3
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import Connection, Delete, Insert, Select, Update
from sqlalchemy.sql.compiler import SQLCompiler

Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Compiled:
    """For a driver."""

    sql: str
    names: tuple[str, ...]  # of its parameters; for SQLite, which wants them by place, in their order
    constants: Mapping[str, Any]
    processors: Mapping[str, Callable[[Any], Any]]  # such as a dict to JSON

    def by_place(self, values: Values) -> list[Any]:
        return [self._parameter(name, values) for name in self.names]

    def by_name(self, values: Values) -> dict[str, Any]:
        return {name: self._parameter(name, values) for name in self.names}

    def _parameter(self, name: str, values: Values) -> Any:
        value = values[name] if name in values else self.constants[name]
        return self.processors[name](value) if name in self.processors else value


class Statement:
    """One statement with named parameters, which the driver gets as it is.

    Rows have their columns as attributes. Values are as the driver gives them: of SQLite's no JSON, and 0 or 1 for a
    Boolean, so these two are not for reading here.
    """

    def __init__(self, core: Select[Any] | Insert | Update | Delete) -> None:
        self._core = core
        self._compiled: dict[tuple[str, str | None, tuple[str, ...]], _Compiled] = {}
        self._make_row = _row_maker(core.selected_columns.keys()) if isinstance(core, Select) else tuple

    def all(self, tx: Connection, **values: Any) -> Sequence[Any]:
        return [self._make_row(row) for row in self._execute(tx, values).fetchall()]

    def first(self, tx: Connection, **values: Any) -> Any:
        """The first row, or None."""
        row = self._execute(tx, values).fetchone()
        return None if row is None else self._make_row(row)

    def write(self, tx: Connection, **values: Any) -> int:
        """How many rows it has changed."""
        count: int = self._execute(tx, values).rowcount
        return count

    def insert(self, tx: Connection, **values: Any) -> int:
        """The new row's key."""
        done = self._execute(tx, values)
        key = done.lastrowid if isinstance(done, sqlite3.Cursor) else done.fetchone()[0]
        assert isinstance(key, int)
        return key

    def insert_all(self, tx: Connection, rows: Sequence[Values]) -> None:
        """Rows of the same columns, at least one."""
        compiled = self._for_driver(tx, tuple(rows[0]))
        driver = tx.connection.driver_connection
        if isinstance(driver, sqlite3.Connection):
            driver.executemany(compiled.sql, [compiled.by_place(row) for row in rows])
        elif len(rows) == 1:
            driver.execute(compiled.sql, compiled.by_name(rows[0]))  # type: ignore[union-attr]
        else:
            driver.cursor().executemany(compiled.sql, [compiled.by_name(row) for row in rows])  # type: ignore[union-attr]

    def _execute(self, tx: Connection, values: Values) -> Any:
        compiled = self._for_driver(tx, tuple(values))
        driver = tx.connection.driver_connection
        if isinstance(driver, sqlite3.Connection):
            return driver.execute(compiled.sql, compiled.by_place(values))
        return driver.execute(compiled.sql, compiled.by_name(values))  # type: ignore[union-attr]

    def _for_driver(self, tx: Connection, names: tuple[str, ...]) -> _Compiled:
        dialect = tx.dialect
        tables = tx.get_execution_options().get("schema_translate_map")  # which schema this run's tables are in
        key = (dialect.name, tables[None] if tables else None, names)
        if key in self._compiled:
            return self._compiled[key]
        # Of an insert or update, the names that are columns say what is written. render_schema_translate: now, not by
        # Core at each execution.
        core = self._core.compile(
            dialect=dialect,
            column_keys=list(names),
            schema_translate_map=tables,
            render_schema_translate=bool(tables),
        )
        assert isinstance(core, SQLCompiler)
        binds = core.binds.items()
        found = {name: bind.type.dialect_impl(dialect).bind_processor(dialect) for name, bind in binds}
        compiled = self._compiled[key] = _Compiled(
            core.string,
            tuple(core.positiontup or core.bind_names.values()),
            {name: bind.value for name, bind in binds},
            {name: processor for name, processor in found.items() if processor is not None},
        )
        return compiled


def _row_maker(columns: Sequence[str]) -> Callable[[Sequence[Any]], Any]:
    return cast(Callable[[Sequence[Any]], Any], cast(Any, namedtuple)("Row", columns)._make)
