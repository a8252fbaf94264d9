"""Runs whose leaderboard is on a real PostgreSQL server, from the command line to the last job."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
from sqlalchemy import update

from orchestrator.cluster.inline import InlineJob
from orchestrator.errors import LeaderboardError, SubmissionError
from orchestrator.leaderboard import engine, schema
from orchestrator.leaderboard.engine import Database
from orchestrator.run.launch import launch
from orchestrator.run.run import Run
from orchestrator.settings.loading import load
from orchestrator.worker.job_main import be_worker
from orchestrator.worker.trainer import StopFlag
from tests.integration.test_local_chains import processes_of, until, working
from tests.support import postgres
from tests.support.invariants import violations
from tests.support.settings_files import write_quick
from tests.support.small_runs import make_run
from tests.support.storage import Storage

ROOT = Path(__file__).parents[2]
ORCH = Path(sys.executable).with_name("orch")
pytestmark = pytest.mark.xdist_group("postgres")


@pytest.fixture
def server(postgres_server: postgres.Postgres, tmp_path: Path) -> Iterator[postgres.Postgres]:
    yield postgres_server
    for process in processes_of(tmp_path):
        process.kill()


def schemas(server: postgres.Postgres) -> list[str]:
    with psycopg.connect(server.url.replace("+psycopg", "")) as connection:
        rows = connection.execute("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'orch%' ORDER BY 1").fetchall()
    return [row[0] for row in rows]


def settings_file(folder: Path, server: postgres.Postgres | None, **changes: Any) -> Path:
    database = {"database": server.url} if server else {}
    return write_quick(folder, seconds=0.2, eon_lifetime=4, **(database | changes))


def orch(folder: Path, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ORCH), *arguments, "--runs-dir", str(folder / "runs")], capture_output=True, text=True, timeout=240,
        cwd=ROOT, env={**os.environ, **(environment or {})}, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_outlives_kill_9_and_a_restart_of_the_server(tmp_path: Path, server: postgres.Postgres) -> None:
    """Every process has the password in its environment, but no file of the run contains it."""
    file = settings_file(tmp_path, server, stop_after_epochs=None, job_params={"seconds": 0.1})
    done = orch(tmp_path, "launch", str(file))
    assert done.returncode == 0, done.stderr
    run = Run.open(tmp_path / "runs/quick")

    def kill_one() -> bool:
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):  # the process has ended meanwhile
            psutil.Process(working(run)[0]["pid"]).kill()
            return True
        return False

    until("a worker to kill", lambda: run.leaderboard.reader.counts()["chunks"]["live"] and kill_one())
    until("more epochs", lambda: run.leaderboard.reader.counts()["epochs"] >= 10)
    run.leaderboard.database.release_connection()
    server.stop("immediate")  # as in a crash, without a message to the clients
    time.sleep(2)
    server.start()
    enough = run.leaderboard.reader.counts()["epochs"] + 20
    run.amend([f"stop_after_epochs={enough}"], time.time())

    def over() -> bool:
        run.reconcile(time.time())  # starts the chain of the killed worker again, as `orch launch --wait` does
        return run.status()["state"] == "finished" and not processes_of(tmp_path)

    until("the end", over)
    assert violations(run) == []
    assert run.leaderboard.reader.counts()["epochs"] >= enough
    assert len(run.board()["entries"]) == 3
    assert not (run.folder / "orch.db").exists()
    written = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert len(written) > 10
    secret = server.password.encode()
    assert [path for path in written if secret in path.read_bytes()] == []
    assert server.password not in done.stdout + done.stderr
    for command in ("status", "leaderboard"):
        shown = orch(tmp_path, command, "quick", "--json")
        assert shown.returncode == 0
        assert server.password not in shown.stdout


def test_runs_share_a_database_and_no_table(tmp_path: Path, server: postgres.Postgres) -> None:
    before = schemas(server)
    for name in ("one", "two"):
        file = settings_file(tmp_path, server, name=name, stop_after_epochs=4, executor="inline")
        done = orch(tmp_path, "launch", str(file))
        assert done.returncode == 0, done.stderr
    assert len(schemas(server)) == len(before) + 2
    for name in ("one", "two"):
        run = Run.open(tmp_path / "runs" / name)
        assert run.leaderboard.reader.counts()["epochs"] == 4
        assert violations(run) == []


def test_launched_again_the_same_file_goes_on_with_its_run(tmp_path: Path, server: postgres.Postgres) -> None:
    file = settings_file(tmp_path, server, stop_after_epochs=4, workers=1)
    assert orch(tmp_path, "launch", str(file), "--wait").returncode == 0
    before = schemas(server)
    again = orch(tmp_path, "launch", str(file), "--wait")
    assert "is over" in again.stderr
    assert schemas(server) == before


def test_a_launch_that_fails_leaves_neither_schema_nor_folder(
    tmp_path: Path, server: postgres.Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    before = schemas(server)
    settings, _ = load(settings_file(tmp_path, server, executor="slurm", slurm={"gpus": 0}))
    with pytest.raises(SubmissionError, match="sbatch or srun is not on"):
        launch(settings, tmp_path / "runs", [str(ROOT)])
    assert schemas(server) == before
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_user_s_own_schema_is_used_and_outlives_a_failed_launch(
    tmp_path: Path, server: postgres.Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with psycopg.connect(server.url.replace("+psycopg", "")) as connection:
        connection.execute("CREATE SCHEMA mine")
    settings, _ = load(settings_file(tmp_path, server, executor="slurm", slurm={"gpus": 0}, database_schema="mine"))
    with pytest.raises(SubmissionError, match="sbatch or srun is not on"):
        launch(settings, tmp_path / "runs", [str(ROOT)])
    monkeypatch.undo()
    file = settings_file(tmp_path, server, database_schema="mine", stop_after_epochs=2, executor="inline")
    assert orch(tmp_path, "launch", str(file)).returncode == 0
    second = orch(tmp_path, "launch", str(file), "--set", "name=another")
    assert second.returncode == 2
    assert re.search(r"mine.* holds a run already", second.stderr), second.stderr
    assert not (tmp_path / "runs/another").exists()


@pytest.mark.parametrize(
    ("change", "environment", "message"),
    [
        pytest.param({}, {"PGPASSWORD": "wrong"}, "password authentication failed", id="a wrong password"),
        pytest.param({}, {"PGPASSWORD": "", "PGPASSFILE": "/dev/null"}, "no password supplied", id="no password"),
        pytest.param({"database": "@/nowhere"}, {}, 'database "nowhere" does not exist', id="no such database"),
        pytest.param({"database": ":1/orch"}, {}, r"connection failed.*refused.*docs/postgresql\.md", id="no server"),
    ],
)
def test_a_database_that_can_t_be_used_is_one_clear_error(
    tmp_path: Path, server: postgres.Postgres, change: dict[str, str], environment: dict[str, str], message: str
) -> None:
    urls = {
        "@/nowhere": server.url.removesuffix("/orch") + "/nowhere",
        ":1/orch": server.url.replace(f":{server.port}/", ":1/"),
    }
    given = {key: urls[value] for key, value in change.items()}
    done = orch(tmp_path, "launch", str(settings_file(tmp_path, server, **given)), environment=environment)
    assert done.returncode == 2
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3
    assert not list((tmp_path / "runs").glob("*"))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql+psycopg://me:secret@host/db", "contains a password"),
        ("postgresql+psycopg://host/db?user=me&password=secret", "contains a password"),
        ("postgresql://me:secret@host/db", "orch does not support the database 'postgresql'"),
        ("mysql://me:secret@host/db", "does not support the database 'mysql'"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("secret", "does not support the database ''"),
    ],
)
def test_a_url_that_can_not_be_used_is_refused_without_repeating_its_password(
    tmp_path: Path, url: str, message: str
) -> None:
    done = orch(tmp_path, "launch", str(settings_file(tmp_path, None, database=url)))
    assert done.returncode == 2
    assert re.search(f"database: .*{message}", done.stderr), done.stderr
    assert "secret" not in done.stderr.replace("'secret'", "") or url == "secret"


def test_a_job_whose_turn_comes_while_the_server_is_away_waits_for_it(
    tmp_path: Path, server: postgres.Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(Storage(server.url), tmp_path / "run")
    (job,) = run.leaderboard.chains.relink([0], time.time(), 1)
    back = threading.Timer(3 * engine.CONNECT_FOR_S, server.start)  # a command would have given up by then

    def its_turn(*_: Any) -> None:
        run.cancel(at_once=False, now=time.time())  # so that the job has nothing to do
        run.leaderboard.database.release_connection()
        server.stop("immediate")
        back.start()

    monkeypatch.setattr(InlineJob, "wait_turn", its_turn)
    of_the_job = Run.open(run.folder, engine.JOB_CONNECTS_FOR_S)
    try:
        ending = be_worker(of_the_job, InlineJob(run.settings, job.token), 0, StopFlag())
        assert ending.outcome == "this job was cancelled: cancelled by the user"
    finally:
        back.join()


def test_a_process_that_asks_again_waits_behind_those_that_wait_already(
    tmp_path: Path, server: postgres.Postgres
) -> None:
    """Otherwise a few workers would do all the work while others wait for seconds."""
    run = make_run(Storage(server.url), tmp_path / "run")
    place = run.settings.database, tmp_path, run.settings.database_schema
    turns: list[int] = []

    def take_turns(number: int, times: int) -> None:
        database = Database(*place)
        for _ in range(times):
            with database.transaction() as tx:
                turns.append(number)
                tx.execute(update(schema.run).values(generation=schema.run.c.generation + 1))  # as each claim does
                if len(turns) == 1:
                    for waiting in range(1, 4):
                        others[waiting - 1].start()
                        until("the next waits", lambda waiting=waiting: waiters(server) == waiting)  # type: ignore[misc]
        database.release_connection()

    others = [threading.Thread(target=take_turns, args=(number, 1)) for number in range(1, 4)]
    take_turns(0, 2)
    for other in others:
        other.join(30)
    assert turns == [0, 1, 2, 3, 0]


def waiters(server: postgres.Postgres) -> int:
    with psycopg.connect(server.url.replace("+psycopg", "")) as connection:
        (count,) = connection.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone() or (0,)
    return int(count)


def test_the_server_ends_a_transaction_whose_process_was_stopped(
    tmp_path: Path, server: postgres.Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a worker that is stopped in the middle of its claim would block all others forever."""
    monkeypatch.setattr(engine, "SERVER_LIMITS", engine.SERVER_LIMITS.replace("=60s", "=1s"))
    assert "idle_in_transaction_session_timeout=1s" in engine.SERVER_LIMITS
    settings = make_run(Storage(server.url), tmp_path / "run").settings
    stopped, other = (Database(settings.database, tmp_path, settings.database_schema) for _ in range(2))
    holding = stopped.transaction()
    holding.__enter__()
    started = time.monotonic()
    with other.transaction():
        waited_s = time.monotonic() - started
    assert 0.5 < waited_s < 30
    with pytest.raises(LeaderboardError, match=r"idle-in-transaction timeout|closed"):
        holding.__exit__(None, None, None)
