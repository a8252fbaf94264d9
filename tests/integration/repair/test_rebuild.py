"""orch repair: a lost or damaged database is rebuilt from the checkpoints' records."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from orchestrator.errors import LeaderboardError
from orchestrator.leaderboard.engine import is_damage
from orchestrator.run.run import Run
from tests.support.invariants import violations
from tests.support.repairs import DAMAGE, MEMORY, SCRIPT, SQLITE, drop, everything, repaired, resumed
from tests.support.small_runs import CUT, board_of, lose, make_run, opened, work
from tests.support.storage import Storage

# --- the rebuilt board equals the lost one

scores = st.floats(0.0, 1.0)
scripts = st.lists(st.lists(st.one_of(scores, scores, scores, st.just(CUT)), max_size=8), min_size=1, max_size=3)


def rebuilt_is_the_same(storage: Storage, script: list[list[float | str]], num_models: int, epochs: int) -> None:
    folder = Path(tempfile.mkdtemp(dir=MEMORY)) / "run"
    run = make_run(storage, folder, num_models=num_models, epochs_per_chunk=epochs)
    try:
        for part in script:
            work(run, part)
        before = board_of(run)
        lines = {e["file"]: line_of(run, e["checkpoint"]) for e in run.leaderboard.reader.entries()}
        suspended = [c for c in run.leaderboard.reader.rows("chunk") if c["state"] == "suspended"]
        lose(run)
        repaired(folder)
        run = opened(folder)
        assert board_of(run) == before
        assert {e["file"]: line_of(run, e["checkpoint"]) for e in run.leaderboard.reader.entries()} == lines
        after = [c for c in run.leaderboard.reader.rows("chunk") if c["state"] == "suspended"]
        keys = ("chunk_id", "position", "suspended_file", "suspended_sha256", "profile", "worker_id")
        assert [[c[key] for key in keys] for c in after] == [[c[key] for key in keys] for c in suspended]
        assert violations(run, over=False) == []
        run.leaderboard.run_state.change_state("active", ["paused"], None, time.time())
        work(run, [0.5, 0.25, 0.75])
        assert violations(run, over=False) == []
    finally:
        drop(run)
        shutil.rmtree(folder.parent)


def line_of(run: Run, checkpoint_id: int | None) -> list[str]:
    """Return the files of a checkpoint and its ancestors, its own first."""
    by_id = {c["checkpoint_id"]: c for c in run.leaderboard.reader.rows("checkpoint")}
    line = []
    while checkpoint_id is not None:
        line.append(by_id[checkpoint_id]["file"])
        checkpoint_id = by_id[checkpoint_id]["parent_id"]
    return line


@hypothesis_settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(scripts, st.integers(1, 3), st.integers(1, 2))
@example([[0.5, 0.5, 0.5, 0.5]], 2, 1)  # equal scores don't enter a full board
@example([[0.1, 0.2, 0.3, CUT]], 2, 1)  # a chunk is suspended at the end
@example([[CUT], [0.1, CUT], [0.9]], 1, 2)
def test_after_any_promotions_the_rebuilt_board_is_the_board_that_was_lost(
    script: list[list[float | str]], num_models: int, epochs: int
) -> None:
    rebuilt_is_the_same(SQLITE, script, num_models, epochs)


@hypothesis_settings(
    max_examples=3, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(scripts, st.integers(1, 3))
def test_on_a_server_as_well(postgres_server: Any, script: list[list[float | str]], num_models: int) -> None:
    rebuilt_is_the_same(Storage(postgres_server.url), script, num_models, 1)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_database_that_is(sqlite_run: Run, damage: Callable[[Path], None]) -> None:
    """A damaged or missing database is rebuilt; the damaged file is kept under another name."""
    folder = sqlite_run.folder
    before, counts = board_of(sqlite_run), sqlite_run.leaderboard.reader.counts()
    file = folder / "orch.db"
    damage(file)
    left = file.read_bytes() if file.exists() else None
    assert repaired(folder, dry_run=True).condition in ("lost", "damaged")
    assert (file.read_bytes() if file.exists() else None) == left, "a dry run does nothing"

    report = repaired(folder)

    kept = list(folder.glob("orch.db.damaged-*"))
    assert [path.read_bytes() for path in kept] == ([] if left is None else [left])
    assert report.kept == [str(path) for path in kept]
    run = opened(folder)
    assert board_of(run) == before
    assert run.summary()["state"] == "paused"
    assert violations(run, over=False) == []
    assert counts["chunks"]["discarded"] > 0
    assert any("discarded are forgotten" in line for line in report.unknown)
    assert [e["kind"] for e in run.leaderboard.reader.rows("event")] == ["repaired"]
    assert not list(folder.glob(".repair-*"))
    assert repaired(folder).condition == "healthy"


def test_a_journal_without_its_database_is_kept_and_not_played_into_the_new_one(sqlite_run: Run) -> None:
    folder, before = sqlite_run.folder, board_of(sqlite_run)
    journal = folder / "orch.db-journal"
    with closing(sqlite3.connect(folder / "orch.db", isolation_level=None)) as connection:
        connection.execute("PRAGMA cache_spill=1")
        connection.execute("PRAGMA cache_size=2")
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("UPDATE event SET kind = 'x'")
        connection.execute("UPDATE epoch SET seconds = 7")
        hot = journal.read_bytes()
        connection.execute("ROLLBACK")
    assert len(hot) > 512
    journal.write_bytes(hot)
    (folder / "orch.db").unlink()
    report = repaired(folder)
    assert [Path(path).read_bytes() for path in report.kept] == [hot]
    assert report.kept[0].endswith("-journal")
    assert board_of(opened(folder)) == before
    assert not journal.exists()


@pytest.mark.parametrize("how", ["the schema", "a table"])
def test_tables_that_a_server_has_lost_are_rebuilt_in_a_new_schema(
    postgres_server: Any, tmp_path: Path, how: str
) -> None:
    run = make_run(Storage(postgres_server.url), tmp_path / "run", workers=2)
    work(run, SCRIPT)
    before, had = board_of(run), run.settings.database_schema
    if how == "the schema":
        lose(run)
    else:
        with run.leaderboard.database.transaction() as tx:
            tx.execute(sqlalchemy.text(f"DROP TABLE {had}.event"))
    report = repaired(run.folder)
    assert report.condition == ("lost" if how == "the schema" else "damaged")
    again = opened(run.folder)
    try:
        assert again.settings.database_schema != had
        assert board_of(again) == before
        work(resumed(again), [0.8, 0.9])
        assert violations(again, over=False) == []
    finally:
        drop(again)
        if how == "a table":
            drop(run)


# --- databases that are not rebuilt


def test_a_healthy_database_stays_as_it_is(run: Run) -> None:
    before, tables = everything(run.folder), _tables(run)
    report = repaired(run.folder)
    assert (report.condition, report.problems, report.done, report.kept) == ("healthy", [], [], [])
    assert everything(run.folder) == before
    assert _tables(run) == tables
    drop(run)


def _tables(run: Run) -> list[list[dict[str, Any]]]:
    names = ("run", "job", "checkpoint", "entry", "chunk", "epoch", "event")
    return [run.leaderboard.reader.rows(name) for name in names]


def test_a_database_of_another_version_is_refused_and_not_taken_for_damaged(run: Run) -> None:
    with run.leaderboard.database.transaction() as tx:
        where = f"{run.settings.database_schema}." if run.settings.database_schema else ""
        tx.execute(sqlalchemy.text(f"UPDATE {where}run SET schema_version = 99, orch_version = '9.9.9'"))
    before = everything(run.folder)
    for attempt in (lambda: Run.open(run.folder), lambda: repaired(run.folder), lambda: repaired(run.folder, True)):
        with pytest.raises(LeaderboardError, match=r"was written by orch 9\.9\.9 \(schema 99\).*Use orch 9\.9\.9"):
            attempt()
    assert everything(run.folder) == before
    drop(run)


@pytest.mark.parametrize(
    ("code", "damaged"),
    [
        (sqlite3.SQLITE_CORRUPT, True),
        (sqlite3.SQLITE_CORRUPT_INDEX, True),
        (sqlite3.SQLITE_NOTADB, True),
        (sqlite3.SQLITE_IOERR_SHORT_READ, True),
        (sqlite3.SQLITE_IOERR_READ, False),
        (sqlite3.SQLITE_BUSY, False),
        (sqlite3.SQLITE_FULL, False),
        (sqlite3.SQLITE_CANTOPEN, False),
        (sqlite3.SQLITE_READONLY, False),
        (sqlite3.SQLITE_PERM, False),
    ],
)
def test_only_bytes_that_sqlite_did_not_write_are_damage(code: int, damaged: bool) -> None:
    error = sqlite3.OperationalError("an error")
    error.sqlite_errorcode = code
    assert is_damage(error) is damaged


def test_a_server_that_does_not_answer_has_lost_nothing(tmp_path: Path, postgres_server: Any) -> None:
    run = make_run(Storage(postgres_server.url), tmp_path / "run")
    drop(run)
    path = run.folder / "settings.json"
    path.write_text(path.read_text().replace(f":{postgres_server.port}/", ":1/"))
    with pytest.raises(LeaderboardError, match="refused"):
        repaired(run.folder)
