"""Statements executed for every chunk: written in SQLAlchemy Core, compiled to SQL once per process.

This saves time while a transaction holds the run's lock and all other workers wait. Measured on one machine (median of
three alternating runs): with 1 process, 299 chunks/s, but 187 if Core executes the statements; with 16 processes, 201
and 156; with 64 processes, 187 and 144 (docs/decisions/0006).
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
    """A statement compiled for one driver."""

    sql: str
    names: tuple[str, ...]  # of the parameters, in the order of the SQL, since SQLite takes values by position
    constants: Mapping[str, Any]
    processors: Mapping[str, Callable[[Any], Any]]  # convert values for the driver, such as a dict to JSON

    def by_position(self, values: Values) -> list[Any]:
        return [self._parameter(name, values) for name in self.names]

    def by_name(self, values: Values) -> dict[str, Any]:
        return {name: self._parameter(name, values) for name in self.names}

    def _parameter(self, name: str, values: Values) -> Any:
        value = values[name] if name in values else self.constants[name]
        return self.processors[name](value) if name in self.processors else value


class Statement:
    """One statement with named parameters.

    Rows have their columns as attributes. The driver's values are not converted: SQLite returns JSON as text and
    Booleans as 0 or 1, so do not select JSON or Boolean columns.
    """

    def __init__(self, core: Select[Any] | Insert | Update | Delete) -> None:
        self._core = core
        self._compiled: dict[tuple[str, str | None, tuple[str, ...]], _Compiled] = {}
        self._make_row = _row_maker(core.selected_columns.keys()) if isinstance(core, Select) else tuple

    def all(self, tx: Connection, **values: Any) -> Sequence[Any]:
        return [self._make_row(row) for row in self._execute(tx, values).fetchall()]

    def first(self, tx: Connection, **values: Any) -> Any:
        """Return the first row, or None."""
        row = self._execute(tx, values).fetchone()
        return None if row is None else self._make_row(row)

    def write(self, tx: Connection, **values: Any) -> int:
        """Execute the statement. Returns the number of changed rows."""
        count: int = self._execute(tx, values).rowcount
        return count

    def insert(self, tx: Connection, **values: Any) -> int:
        """Insert a row. Returns its key."""
        done = self._execute(tx, values)
        key = done.lastrowid if isinstance(done, sqlite3.Cursor) else done.fetchone()[0]
        assert isinstance(key, int)
        return key

    def insert_all(self, tx: Connection, rows: Sequence[Values]) -> None:
        """Insert several rows. rows: at least one, all with the same columns."""
        compiled = self._for_driver(tx, tuple(rows[0]))
        driver = tx.connection.driver_connection
        if isinstance(driver, sqlite3.Connection):
            driver.executemany(compiled.sql, [compiled.by_position(row) for row in rows])
        elif len(rows) == 1:
            driver.execute(compiled.sql, compiled.by_name(rows[0]))  # type: ignore[union-attr]
        else:
            driver.cursor().executemany(compiled.sql, [compiled.by_name(row) for row in rows])  # type: ignore[union-attr]

    def _execute(self, tx: Connection, values: Values) -> Any:
        compiled = self._for_driver(tx, tuple(values))
        driver = tx.connection.driver_connection
        if isinstance(driver, sqlite3.Connection):
            return driver.execute(compiled.sql, compiled.by_position(values))
        return driver.execute(compiled.sql, compiled.by_name(values))  # type: ignore[union-attr]

    def _for_driver(self, tx: Connection, names: tuple[str, ...]) -> _Compiled:
        dialect = tx.dialect
        tables = tx.get_execution_options().get("schema_translate_map")  # the schema of this run's tables
        key = (dialect.name, tables[None] if tables else None, names)
        if key in self._compiled:
            return self._compiled[key]
        # column_keys: the columns to write. render_schema_translate: write the schema's name into the SQL now.
        core = self._core.compile(
            dialect=dialect, column_keys=list(names), schema_translate_map=tables, render_schema_translate=bool(tables)
        )
        assert isinstance(core, SQLCompiler)
        binds = core.binds.items()
        processors = {name: bind.type.dialect_impl(dialect).bind_processor(dialect) for name, bind in binds}
        compiled = self._compiled[key] = _Compiled(
            core.string,
            tuple(core.positiontup or core.bind_names.values()),
            {name: bind.value for name, bind in binds},
            {name: processor for name, processor in processors.items() if processor is not None},
        )
        return compiled


def _row_maker(columns: Sequence[str]) -> Callable[[Sequence[Any]], Any]:
    return cast(Callable[[Sequence[Any]], Any], cast(Any, namedtuple)("Row", columns)._make)
