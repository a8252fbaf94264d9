"""orch repair: the database is lost or damaged, and comes back from the checkpoints' records."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from orchestrator.cluster import live_jobs
from orchestrator.errors import LeaderboardError, OrchError, RunError, StaleClaimError
from orchestrator.files import checkpoints
from orchestrator.leaderboard.engine import is_damage
from orchestrator.leaderboard.rebuild_plan import GENERATION_GAP
from orchestrator.records import Candidate, EpochResult, Started
from orchestrator.run.repair import RepairReport, repair
from orchestrator.run.run import Run
from tests.integration.test_local_chains import processes_of, until
from tests.support.invariants import violations
from tests.support.small_runs import CUT, ROOT, board_of, lose, make_run, opened, work
from tests.support.storage import Storage

ORCH = Path(sys.executable).with_name("orch")
SQLITE = Storage(None)
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # what is shown there holds on a disk too
# Founders, children, discarded ones; a board of three.
SCRIPT = [0.3, 0.5, 0.4, 0.6, 0.1, 0.2, 0.7, 0.55, 0.65, 0.05, 0.75]


def orch(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ORCH), *arguments, "--runs-dir", str(folder)], capture_output=True, text=True, timeout=120, cwd=ROOT,
        env={**os.environ, **(env or {})}, check=False,
    )  # fmt: skip


def repaired(folder: Path, dry_run: bool = False, force: bool = False) -> RepairReport:
    return repair(folder, dry_run, force, time.time())


def everything(folder: Path) -> dict[str, bytes]:
    """All files of a run but the locks."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".lock" not in path.name
    }


def drop(run: Run) -> None:
    if run.leaderboard.database.file is None:
        run.leaderboard.database.drop(schema_too=True)
        run.leaderboard.database.release_connection()


@pytest.fixture
def run(storage: Storage, tmp_path: Path) -> Iterator[Run]:
    """It has trained a little, on either database."""
    made = make_run(storage, tmp_path / "run", workers=2)
    work(made, SCRIPT)
    yield made
    with contextlib.suppress(OrchError):
        made.leaderboard.database.drop(schema_too=True)


@pytest.fixture
def sqlite_run(tmp_path: Path) -> Run:
    made = make_run(SQLITE, tmp_path / "run", workers=2)
    work(made, SCRIPT)
    return made


# --- the board comes back as it was

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
    """The files of a checkpoint's line, itself first."""
    by_id = {c["checkpoint_id"]: c for c in run.leaderboard.reader.rows("checkpoint")}
    line = []
    while checkpoint_id is not None:
        line.append(by_id[checkpoint_id]["file"])
        checkpoint_id = by_id[checkpoint_id]["parent_id"]
    return line


@hypothesis_settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(scripts, st.integers(1, 3), st.integers(1, 2))
@example([[0.5, 0.5, 0.5, 0.5]], 2, 1)  # ties lose
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


# --- how a database is lost


def _delete(file: Path) -> None:
    file.unlink()


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _random_bytes(file: Path) -> None:
    data = bytearray(file.read_bytes())
    third = len(data) // 3
    data[third : 2 * third] = random.Random(3).randbytes(third)
    file.write_bytes(data)


def _random_head(file: Path) -> None:
    file.write_bytes(random.Random(4).randbytes(200) + file.read_bytes()[200:])


def _text(file: Path) -> None:
    file.write_text("all work and no play\n" * 500)


def _sql(*statements: str) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        with closing(sqlite3.connect(file)) as connection:
            for statement in statements:
                connection.execute(statement)
            connection.commit()

    return damage


DAMAGE = {
    "deleted": _delete,
    "of no bytes": _empty,
    "truncated": _truncate,
    "with random bytes in the middle": _random_bytes,
    "with random bytes at its head": _random_head,
    "a text": _text,
    "without a table": _sql("DROP TABLE epoch"),
    "without the run's row": _sql("DELETE FROM run"),
    "with orphans": _sql("PRAGMA foreign_keys=OFF", "DELETE FROM checkpoint WHERE checkpoint_id = 1"),
    "with a state that is none": _sql("UPDATE chunk SET state = 'sleeping'"),
    "with a generation that was never given": _sql("UPDATE run SET generation = 1"),
    "with a score that its record contradicts": _sql("UPDATE checkpoint SET score = 0.99"),
    "with settings that are none": _sql("UPDATE run SET settings = '{'"),
    "with metrics that are no JSON": _sql("UPDATE checkpoint SET metrics = '{'"),
    "with more entries than slots": _sql(
        "UPDATE checkpoint SET released = 0", "UPDATE entry SET on_board = 1, evicted_at = NULL, evicted_by = NULL"
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_database_that_is(sqlite_run: Run, damage: Callable[[Path], None]) -> None:
    """...is kept under another name, and rebuilt."""
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
def test_what_a_server_has_lost_is_rebuilt_in_a_new_schema(postgres_server: Any, tmp_path: Path, how: str) -> None:
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


def resumed(run: Run) -> Run:
    run.leaderboard.run_state.change_state("active", ["paused"], None, time.time())
    return run


# --- what is healthy, or not ours to judge


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


def test_another_version_s_database_is_refused_and_not_taken_for_damaged(run: Run) -> None:
    with run.leaderboard.database.transaction() as tx:
        where = f"{run.settings.database_schema}." if run.settings.database_schema else ""
        tx.execute(sqlalchemy.text(f"UPDATE {where}run SET schema_version = 99, orch_version = '9.9.9'"))
    before = everything(run.folder)
    for attempt in (lambda: Run.open(run.folder), lambda: repaired(run.folder), lambda: repaired(run.folder, True)):
        with pytest.raises(LeaderboardError, match=r"was written by orch 9\.9\.9 \(schema 99\).*Use that version"):
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


# --- damaged checkpoints and records


def test_a_damaged_checkpoint_of_a_healthy_database_leaves_the_board(run: Run) -> None:
    files = run.folder / "checkpoints"
    before = board_of(run)
    damaged, missing, kept = (entry["file"] for entry in before)
    (files / damaged).write_bytes(b"x" * (files / damaged).stat().st_size)
    (files / missing).unlink()

    dry = repaired(run.folder, dry_run=True)
    assert len(dry.done) == 2
    assert board_of(run) == before
    report = repaired(run.folder)

    assert report.condition == "healthy"
    assert [word in " ".join(report.problems) for word in (damaged, missing, kept)] == [True, True, False]
    assert [entry["file"] for entry in board_of(run)] == [kept]
    assert [e["kind"] for e in run.leaderboard.reader.rows("event")][-2:] == ["condemned", "condemned"]
    work(run, [0.9, 0.8])
    assert len(board_of(run)) == 3
    assert violations(run, over=False) == []
    drop(run)


def _no_record(path: Path) -> None:
    path.unlink()


def _no_json(path: Path) -> None:
    path.write_text("{")


def _no_object(path: Path) -> None:
    path.write_text("[]")


def _without(key: str) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))

    return spoil


def _with(**changes: Any) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(_no_record, id="missing"),
        pytest.param(_no_json, id="no JSON"),
        pytest.param(_no_object, id="no object"),
        pytest.param(_without("sha256"), id="without a checksum"),
        pytest.param(_without("position"), id="without a position"),
        pytest.param(_with(score=None), id="without a score"),
        pytest.param(_with(score="high"), id="with a word for a score"),
        pytest.param(_with(generation=1), id="of another claim"),
        pytest.param(_with(sha256="0" * 64), id="with another checksum"),
    ],
)
def test_a_checkpoint_whose_record_is(sqlite_run: Run, spoil: Callable[[Path], None]) -> None:
    """...is no entry of the rebuilt board; it is set aside, since the next collection would delete it."""
    folder = sqlite_run.folder
    best, *others = sorted(board_of(sqlite_run), key=lambda e: -e["score"])
    file, record = best["file"], best["file"].replace(".pt", ".json")
    content = (folder / "checkpoints" / file).read_bytes()
    spoil(folder / "checkpoints" / record)
    lose(sqlite_run)

    report = repaired(folder)

    assert any(file in problem or record in problem for problem in report.problems)
    (aside,) = folder.glob("checkpoints.damaged-*")
    assert (aside / file).read_bytes() == content
    run = resumed(opened(folder))
    assert sorted(e["file"] for e in board_of(run)) == sorted(e["file"] for e in others)
    work(run, [0.9])
    assert len(board_of(run)) == 3, "its slot is filled again"
    assert violations(run, over=False) == []


def test_a_damaged_checkpoint_and_a_lost_database_leave_the_others(sqlite_run: Run) -> None:
    folder = sqlite_run.folder
    first, *others = board_of(sqlite_run)
    os.truncate(folder / "checkpoints" / first["file"], 3)
    lose(sqlite_run)
    report = repaired(folder)
    assert any("it is damaged" in problem for problem in report.problems)
    assert any("2 of 3 models are left" in line for line in report.unknown)
    assert board_of(opened(folder)) == others


def test_records_of_before_ancestors_were_kept_are_enough_for_a_board(sqlite_run: Run) -> None:
    folder, before = sqlite_run.folder, board_of(sqlite_run)
    for path in (folder / "checkpoints").glob("*.json"):
        for key in ("ancestors", "results", "train_seconds", "launched_at", "import_paths"):
            _without(key)(path)
    lose(sqlite_run)
    report = repaired(folder)
    assert any("the founder is unknown of" in line for line in report.unknown)
    assert any("no record tells when the run was launched" in line for line in report.unknown)
    run = resumed(opened(folder))
    assert board_of(run) == before
    work(run, [0.9, 0.95])
    assert len(board_of(run)) == 3


def test_with_no_checkpoint_at_all_the_run_begins_anew(sqlite_run: Run) -> None:
    folder = sqlite_run.folder
    lose(sqlite_run)
    for part in ("checkpoints", "jobs", "logs"):
        shutil.rmtree(folder / part)
    report = repaired(folder)
    assert report.entries == []
    run = resumed(opened(folder))
    work(run, [0.1, 0.2, 0.3, 0.4])
    assert len(board_of(run)) == 3
    assert violations(run, over=False) == []


# --- settings


def test_lost_settings_are_written_again_from_the_database(sqlite_run: Run) -> None:
    path = sqlite_run.folder / "settings.json"
    before = path.read_text()
    for lost in (None, "{", before.replace('"num_models": 3', '"num_models": 0')):
        path.unlink() if lost is None else path.write_text(lost)
        if lost is not None:
            with pytest.raises(RunError, match=r"settings\.json: .*`orch repair run` writes settings\.json again"):
                Run.open(sqlite_run.folder)
        assert repaired(sqlite_run.folder).condition == "healthy"
        assert path.read_text() == before


def test_settings_come_from_a_damaged_database_if_that_still_tells_them(sqlite_run: Run) -> None:
    path, before = sqlite_run.folder / "settings.json", board_of(sqlite_run)
    settings = path.read_text()
    path.unlink()
    DAMAGE["without a table"](sqlite_run.folder / "orch.db")
    repaired(sqlite_run.folder)
    assert path.read_text() == settings
    assert board_of(opened(sqlite_run.folder)) == before


def test_without_settings_and_database_it_says_what_is_needed(sqlite_run: Run) -> None:
    (sqlite_run.folder / "settings.json").write_text("{")
    lose(sqlite_run)
    with pytest.raises(RunError, match=r"Put back the settings file .* as .*settings\.json"):
        repaired(sqlite_run.folder)


# --- jobs that may be alive


def test_it_is_refused_while_a_process_of_the_run_is_alive(sqlite_run: Run) -> None:
    lose(sqlite_run)
    folder = sqlite_run.folder
    code = "import time; time.sleep(60)"
    before = everything(folder)
    with subprocess.Popen([sys.executable, "-c", code, str(folder / "jobs" / "0123456789abcdef-0")]) as job:
        try:
            for force in (False, True):
                with pytest.raises(RunError, match=rf"alive on this machine \(processes {job.pid}\).*orch cancel run"):
                    repaired(folder, force=force)
        finally:
            job.kill()
    assert everything(folder) == before
    assert repaired(folder).condition == "lost"


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Slurm's answer, at the boundary of the process; an answer of "exit 1" is none."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")

    def answers(script: str) -> None:
        (bin_ / "squeue").write_text(f"#!/bin/sh\n{script}\n")
        (bin_ / "squeue").chmod(0o755)

    return answers


BASE = "0123456789abcdef"


@pytest.mark.parametrize(
    ("answer", "refused"),
    [
        pytest.param("exit 1", "Slurm does not answer", id="Slurm does not answer"),
        pytest.param(f"echo '7_0|RUNNING|N/A|orch-run-{BASE}'", "alive: 7_0.*scancel 7_0", id="a job works"),
        pytest.param(f"echo '7|PENDING|N/A|orch-run-{BASE}'", "alive: 7", id="a job waits"),
        pytest.param(f"echo '7_0|COMPLETED|N/A|orch-run-{BASE}'", None, id="a job is over"),
        pytest.param(f"echo '7_0|RUNNING|N/A|orch-run-two-{BASE}'", None, id="another run's"),
        pytest.param(f"echo '7_0|RUNNING|N/A|orch-run-{BASE[::-1]}'", None, id="a run of this name elsewhere"),
        pytest.param("true", None, id="no jobs"),
    ],
)
def test_what_slurm_says_of_the_run_s_jobs(
    tmp_path: Path, squeue: Callable[[str], None], answer: str, refused: str | None
) -> None:
    squeue(answer)
    run = make_run(SQLITE, tmp_path / "run", executor="slurm")
    work(run, SCRIPT)
    (run.folder / "jobs" / BASE).mkdir()
    lose(run)
    if refused is None:
        assert repaired(run.folder).condition == "lost"
        return
    with pytest.raises(RunError, match=refused):
        repaired(run.folder)
    assert not (run.folder / "orch.db").exists()
    if "answer" in refused:
        assert repaired(run.folder, force=True).condition == "lost"


def test_who_was_taken_for_dead_finds_all_its_writes_refused(run: Run) -> None:
    """--force, and a job was alive after all: it holds a claim that left no file."""
    chains, now = run.leaderboard.chains, time.time()
    (job,) = chains.relink([0], now, 10)
    started = chains.start(job.token, 0, "c", "elsewhere", 1, 0.0, now, 10, successor=False)
    assert isinstance(started, Started)
    zombie = run.leaderboard.board.claim(0, job.job_id, 1, now, now + 1e6)
    lose(run)
    repaired(run.folder, force=True)
    again = resumed(opened(run.folder))
    work(again, [0.8, 0.9])
    newest = max(c["generation"] for c in again.leaderboard.reader.rows("chunk"))
    assert newest > GENERATION_GAP > zombie.generation
    candidate = Candidate(1.0, 9, (EpochResult(9, 1.0, {}),), 1.0, file="x.pt", sha256="0" * 64)
    board = again.leaderboard.board
    for write in (
        lambda: board.record(zombie, candidate, now),
        lambda: board.give_back(zombie, "", now),
        lambda: board.claim(0, job.job_id, 1, now, now + 9),
    ):
        with pytest.raises(StaleClaimError):
            write()
    assert isinstance(chains_start(again, job.token), str)
    drop(again)


def chains_start(run: Run, token: str) -> Started | str:
    return run.leaderboard.chains.start(token, 0, "c", "elsewhere", 1, 0.0, time.time(), 10)


# --- from the command line


@pytest.mark.parametrize("command", ["status", "leaderboard", "resume", "pause", "gc"])
@pytest.mark.parametrize("how", ["deleted", "of no bytes", "with random bytes at its head", "without the run's row"])
def test_every_command_says_in_one_line_how_to_mend_it(sqlite_run: Run, how: str, command: str) -> None:
    DAMAGE[how](sqlite_run.folder / "orch.db")
    from typer.testing import CliRunner

    from orchestrator.cli.main import app

    done = CliRunner().invoke(app, [command, "run", "--runs-dir", str(sqlite_run.folder.parent)])
    assert isinstance(done.exception, OrchError)
    assert "`orch repair run`" in str(done.exception)
    assert len(str(done.exception).splitlines()) == 1


def test_the_command_says_what_it_found_and_did(sqlite_run: Run) -> None:
    lose(sqlite_run)
    runs_dir = sqlite_run.folder.parent
    dry = orch(runs_dir, "repair", "run", "--dry-run")
    assert (dry.returncode, dry.stderr) == (0, "")
    assert "would be done: 3 entries" in dry.stdout
    assert not (sqlite_run.folder / "orch.db").exists()
    done = orch(runs_dir, "repair", "run", "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["condition"], len(report["entries"])) == (0, "lost", 3)
    assert orch(runs_dir, "repair", "run").stdout == "run: the database is healthy\n"


@pytest.fixture
def launched(storage: Storage, tmp_path: Path) -> Iterator[Path]:
    """A run with two local workers that trains for real; all its processes are killed at the end."""
    profiles = [{"name": "a", "learning_rate": 0.1}, {"name": "b", "learning_rate": 0.01}]
    settings = {
        "job": "tests.support.quick_job:Quick", "job_params": {"seconds": 0.1}, "training_profiles": profiles,
        "workers": 2,
        "num_models": 3, "eon_lifetime": 3, "total_lifetime": 300, "stop_after_stale_cycles": None,
        "stop_after_epochs": 40, "executor": "local", "max_failures": 50,
    }  # fmt: skip
    file = tmp_path / "quick.json"
    file.write_text(json.dumps(settings | ({"database": storage.url} if storage.url else {})))
    done = orch(tmp_path / "runs", "launch", str(file))
    assert done.returncode == 0, done.stderr
    yield tmp_path / "runs" / "quick"
    for process in processes_of(tmp_path):
        process.kill()


def test_a_run_that_lost_its_database_is_repaired_resumed_and_finished(launched: Path) -> None:
    run = Run.open(launched)
    until("a full board and more", lambda: run.leaderboard.reader.counts()["epochs"] >= 10)
    runs_dir = launched.parent
    assert live_jobs.processes(launched), "submitit's command lines name their folders"
    for process in processes_of(launched):
        process.kill()
    until("every process to be gone", lambda: not processes_of(launched))
    assert live_jobs.processes(launched) == []
    before = board_of(run)
    referred_to, _ = run.leaderboard.reader.references()
    unrecorded = {path.name for path in (launched / "checkpoints").glob("*.pt")} - referred_to
    lose(run)

    assert orch(runs_dir, "resume", "quick").returncode == 2
    done = orch(runs_dir, "repair", "quick")
    assert done.returncode == 0, done.stderr
    run = Run.open(launched)
    new = {e["file"] for e in board_of(run)} - {e["file"] for e in before}
    assert new <= unrecorded, "a candidate that was written when its worker died is not lost"
    assert [e for e in board_of(run) if e["file"] not in new] == [e for e in before if e in board_of(run)]
    assert len(new) + len([e for e in before if e in board_of(run)]) == 3
    assert orch(runs_dir, "resume", "quick").returncode == 0
    until("the end", lambda: run.status()["state"] == "finished" and not processes_of(launched), 60)

    assert violations(run) == []
    assert len(run.board()["entries"]) == 3
    assert min(e["score"] for e in board_of(run)) >= min(e["score"] for e in before)
    assert {j["worker_id"] for j in run.leaderboard.reader.rows("job") if j["started_at"]} == {0, 1}
    assert checkpoints.collect(launched / "checkpoints", run.leaderboard.reader.references) == []
    drop(run)
