"""The leaderboard of one run: its database and the operations on it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.exc import DatabaseError

from orchestrator.errors import LeaderboardError
from orchestrator.leaderboard import schema
from orchestrator.leaderboard.board import Board
from orchestrator.leaderboard.chains import Chains
from orchestrator.leaderboard.engine import CONNECT_FOR_S, Database
from orchestrator.leaderboard.moves import log_event
from orchestrator.leaderboard.reader import Reader
from orchestrator.leaderboard.run_state import RunStateStore, insert_run
from orchestrator.leaderboard.upgrade import check_version, upgrade
from orchestrator.settings.loading import freeze, thaw
from orchestrator.settings.settings import Settings


class Leaderboard:
    """One run's database. A launch calls `create`; later commands and jobs call `open`."""

    def __init__(self, database: Database, settings: Settings, version: int) -> None:
        """settings, version: the run's current settings and their version."""
        self.database = database
        self.settings, self.version = settings, version
        policy = settings.policy(version)
        self.board = Board(database, policy)
        self.chains = Chains(database)
        self.run_state = RunStateStore(database, policy.metric)
        self.reader = Reader(database, policy.metric)

    @staticmethod
    def create(
        run_folder: Path,
        url: str | None,
        schema_name: str | None,
        *,
        settings: Settings,
        import_paths: Sequence[str],
        now: float,
        deadline: float,
    ) -> None:
        """Create the tables and the run's row. Raises LeaderboardError if the tables already exist."""
        with Database(url, run_folder, schema_name).creation() as tx:
            insert_run(
                tx,
                name=settings.name,
                settings=freeze(settings),
                import_paths=list(import_paths),
                created_at=now,
                deadline=deadline,
            )
            log_event(tx, now, "launched", name=settings.name, deadline=deadline)

    @staticmethod
    def discard(run_folder: Path, url: str | None, schema_name: str | None, schema_too: bool) -> None:
        """Undo `create`, if the database responds. schema_too: also drop the schema (if created for this run)."""
        with suppress(LeaderboardError):
            Database(url, run_folder, schema_name).drop(schema_too)

    @classmethod
    def open(
        cls, run_folder: Path, url: str | None, schema_name: str | None, connect_for_s: float = CONNECT_FOR_S
    ) -> Leaderboard:
        """Open a database, upgrading version 1. Raises LeaderboardError if it is missing or of an unknown version."""
        database = Database(url, run_folder, schema_name, connect_for_s)
        database.refuse_empty()
        with database.transaction(own_lock=False) as tx:
            try:
                row = tx.execute(select(schema.run)).one_or_none()
            except DatabaseError as error:
                raise LeaderboardError(
                    f"{database.name} is not an orch leaderboard: {error.orig}. {database.advice}"
                ) from error
        if row is None:
            raise LeaderboardError(f"{database.name} holds no run; was its launch interrupted? {database.advice}")
        check_version(database, row.schema_version, row.orch_version)
        if row.schema_version != schema.SCHEMA_VERSION:
            upgrade(database)
        return cls(database, thaw(row.settings), row.settings_version)
