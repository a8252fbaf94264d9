"""A database of an earlier version is upgraded when it is opened, and its run continues."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from orchestrator.errors import LeaderboardError
from orchestrator.leaderboard.health import Condition, examine
from orchestrator.leaderboard.leaderboard import Leaderboard
from orchestrator.leaderboard.schema import SCHEMA_VERSION
from orchestrator.run.repair import repair
from orchestrator.run.run import Run
from orchestrator.worker.job_main import job_main
from tests.support.invariants import violations
from tests.support.small_runs import CUT, board_of, make_run, opened, work
from tests.support.storage import Storage

SURPLUS = "the run was amended to 2 workers"
# The text that version 1 stored as a chunk's error, and the values of version 2: (expired_by, error).
REASONS = {
    "its job ended without a word": ("job_silent", None),
    "its job is gone": ("job_gone", None),
    "its job ended before it": ("job_ended", None),
    "its lease ended": ("lease_ended", None),
    "the profiles were amended": ("amended", None),
    "what came of it was lost with the database": ("lost_with_database", None),
    "max_disk_gb is 1: the run takes more": (None, "max_disk_gb is 1: the run takes more"),
}
TO_VERSION_2 = (
    *(f"ALTER TABLE @chunk DROP COLUMN {name}" for name in ("failures", "error_at")),
    *(f"ALTER TABLE @worker DROP COLUMN {name}" for name in ("failed_at", "early_failure")),
)


def sql(run: Run, *statements: str) -> None:
    where = f"{run.settings.database_schema}." if run.settings.database_schema else ""
    with run.leaderboard.database.transaction() as tx:
        for statement in statements:
            tx.execute(sqlalchemy.text(statement.replace("@", where)))


@pytest.fixture
def run(storage: Storage, tmp_path: Path) -> Iterator[Run]:
    """A run of version 1: without the columns of version 2, and with reasons stored as text."""
    made = make_run(storage, tmp_path / "run", workers=4, executor="inline")
    work(made, [0.5, 0.4, 0.6, 0.1, 0.7, CUT])
    now = 1.0
    for _ in REASONS:
        (link,) = made.leaderboard.chains.relink([1], now, 10**6)
        made.leaderboard.chains.close([link], "lost", "never there", now)
    sql(
        made,
        *(
            "INSERT INTO @chunk (chunk_id, position, profile, worker_id, generation, state, claimed_at, lease_until, "
            f"finished_at, error) VALUES ({1000 + n}, 0, 'a', 0, {1000 + n}, 'expired', {n}, {n}, {n}, '{reason}')"
            for n, reason in enumerate(REASONS)
        ),
        "UPDATE @run SET generation = 2000",
        f"UPDATE @worker SET stopped = '{SURPLUS}' WHERE worker_id = 2",
        "UPDATE @worker SET stopped = '5 failures in a row' WHERE worker_id = 3",
        *TO_VERSION_2,
        "ALTER TABLE @chunk DROP COLUMN expired_by",
        "ALTER TABLE @worker DROP COLUMN stop_kind",
        "UPDATE @run SET schema_version = 1, orch_version = '0.0.9'",
    )
    made.leaderboard.database.release_connection()
    yield made
    storage.remove(made.leaderboard)


def test_a_database_of_version_1_is_upgraded_and_its_run_goes_on(run: Run) -> None:
    before = board_of(run)
    again = opened(run.folder)
    assert again.leaderboard.run_state.row()["schema_version"] == SCHEMA_VERSION
    chunks = {c["chunk_id"]: c for c in again.leaderboard.reader.rows("chunk")}
    converted = [(chunks[1000 + n]["expired_by"], chunks[1000 + n]["error"]) for n in range(len(REASONS))]
    assert converted == list(REASONS.values())
    assert again.status()["last_error"] == "max_disk_gb is 1: the run takes more"
    assert board_of(again) == before
    work(again, [0.8, 0.9])
    assert len(board_of(again)) == 3
    assert violations(again, over=False) == []


def test_a_database_of_version_2_is_upgraded_with_the_failures_that_it_has(storage: Storage, tmp_path: Path) -> None:
    made = make_run(storage, tmp_path / "run", executor="inline")
    work(made, [0.5, 0.4])
    sql(
        made,
        "INSERT INTO @chunk (chunk_id, position, profile, worker_id, generation, state, claimed_at, lease_until, "
        "finished_at, error) VALUES (1000, 0, 'a', 0, 1000, 'failed', 1, 1, 1, 'ValueError: no')",
        "UPDATE @run SET generation = 2000, schema_version = 2",
        *TO_VERSION_2,
    )
    made.leaderboard.database.release_connection()
    again = opened(made.folder)
    assert again.leaderboard.run_state.row()["schema_version"] == SCHEMA_VERSION
    assert [c["failures"] for c in again.leaderboard.reader.rows("chunk")] == [0, 0, 1]
    assert again.leaderboard.reader.last_error() == ("ValueError: no", 1.0)
    work(again, [0.8, 0.9])
    assert len(board_of(again)) == 3
    storage.remove(again.leaderboard)


def test_workers_that_were_too_many_are_told_from_those_that_failed(run: Run) -> None:
    again = opened(run.folder)
    again.leaderboard.run_state.change_state("paused", ["active"], None, 1.0)
    again.amend(["workers=5"], 1.0)
    assert [w.worker_id for w in again.leaderboard.chains.workers() if w.stopped is not None] == [3]


def test_processes_that_open_it_at_the_same_time_upgrade_it_once(run: Run) -> None:
    errors: list[Exception] = []
    barrier = threading.Barrier(4)

    def open_it() -> None:
        barrier.wait()
        try:
            Leaderboard.open(run.folder, run.settings.database, run.settings.database_schema)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert opened(run.folder).leaderboard.run_state.row()["schema_version"] == SCHEMA_VERSION


def test_a_database_of_version_1_is_healthy_and_repair_upgrades_it(run: Run) -> None:
    assert examine(run.leaderboard.database).condition is Condition.HEALTHY
    assert version(run) == 1, "looking changes nothing"
    report = repair(run.folder, dry_run=False, force=False, now=1.0)
    assert (report.condition, report.problems) == ("healthy", [])
    assert version(run) == SCHEMA_VERSION


def version(run: Run) -> Any:
    return run.leaderboard.run_state.row()["schema_version"]


@pytest.mark.parametrize("unknown", [0, SCHEMA_VERSION + 1])
def test_a_database_of_an_unknown_version_is_refused(run: Run, unknown: int) -> None:
    sql(run, f"UPDATE @run SET schema_version = {unknown}")
    with pytest.raises(LeaderboardError, match=rf"written by orch 0\.0\.9 \(schema {unknown}\).*Use orch 0\.0\.9"):
        opened(run.folder)
    assert version(run) == unknown


def test_a_job_that_was_queued_before_the_upgrade_finds_its_entry_point() -> None:
    as_submitit_pickled_it = b"corchestrator.entry\njob_main\n."
    assert pickle.loads(as_submitit_pickled_it) is job_main
