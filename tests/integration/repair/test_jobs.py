"""orch repair while jobs may be alive, and from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.cluster import live_jobs
from orchestrator.errors import OrchError, RunError, StaleClaimError
from orchestrator.files import checkpoints
from orchestrator.leaderboard.chains import JobStart
from orchestrator.leaderboard.rebuild_plan import GENERATION_GAP
from orchestrator.records import Candidate, EpochResult, Started
from orchestrator.run.run import Run
from tests.integration.test_local_chains import processes_of, until
from tests.support.invariants import violations
from tests.support.repairs import DAMAGE, SCRIPT, SQLITE, drop, everything, orch, repaired, resumed
from tests.support.settings_files import write_quick
from tests.support.small_runs import board_of, lose, make_run, opened, work
from tests.support.storage import Storage

# --- jobs that may be alive


def test_a_repair_is_refused_while_a_process_of_the_run_is_alive(sqlite_run: Run) -> None:
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
    """Replace squeue by a script; the script "exit 1" simulates that Slurm does not answer."""
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
        pytest.param("true", None, id="there are no jobs"),
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


def test_a_worker_that_was_taken_for_dead_finds_all_its_writes_refused(run: Run) -> None:
    """The repair was forced although a job was alive. The job holds a claim that has not written a file yet."""
    chains, now = run.leaderboard.chains, time.time()
    (job,) = chains.relink([0], now, 10)
    started = chains.start(JobStart(job.token, 0, "c", "elsewhere", 1, 0.0), now, 10, successor=False)
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
        lambda: board.give_back(zombie, "its disk is full", now),
        lambda: board.claim(0, job.job_id, 1, now, now + 9),
    ):
        with pytest.raises(StaleClaimError):
            write()
    begun_again = again.leaderboard.chains.start(JobStart(job.token, 0, "c", "elsewhere", 1, 0.0), time.time(), 10)
    assert isinstance(begun_again, str)
    drop(again)


def chains_start(run: Run, token: str) -> Started | str:
    return run.leaderboard.chains.start(token, 0, "c", "elsewhere", 1, 0.0, time.time(), 10)


# --- from the command line


@pytest.mark.parametrize("command", ["status", "leaderboard", "resume", "pause", "gc"])
@pytest.mark.parametrize("how", ["deleted", "empty", "with random bytes at its head", "without the run's row"])
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
    database = {"database": storage.url} if storage.url else {}
    file = write_quick(tmp_path, seconds=0.1, eon_lifetime=3, **database)
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
