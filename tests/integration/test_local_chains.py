"""Real workers on this machine: submitit's local executor and real signals. Most tests use a job that starts without
torch, which takes seconds."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.errors import OrchError
from orchestrator.run.launch import launch as launch_run
from orchestrator.run.run import Run
from orchestrator.settings.loading import load
from tests.support.invariants import violations
from tests.support.processes import processes_of, until
from tests.support.quick_job import MEETINGS

ROOT = Path(__file__).parents[2]
ORCH = Path(sys.executable).with_name("orch")


def killed(folder: Path) -> list[psutil.Process]:
    """Kill the processes of a run and return them. They may have started others meanwhile."""
    found = processes_of(folder)
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return found


@pytest.fixture
def runs_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "runs"
    until("every process to be gone", lambda: not killed(tmp_path))


DIGITS = ROOT / "settings/digits.json"


@pytest.fixture
def quick(tmp_path: Path) -> Path:
    """A settings file like digits.json, for a job that waits instead of training."""
    return quick_file(tmp_path)


def quick_file(folder: Path, **job_params: Any) -> Path:
    file = folder / "digits.json"
    job = {"job": "tests.support.quick_job:Quick", "job_params": {"seconds": 0.1} | job_params}
    file.write_text(json.dumps(json.loads(DIGITS.read_text()) | job))
    return file


def command(runs_dir: Path, file: Path, *options: str) -> list[str]:
    return [str(ORCH), "launch", str(file), "--executor", "local", "--runs-dir", str(runs_dir), *options]


def launch(runs_dir: Path, *options: str, file: Path = DIGITS) -> subprocess.CompletedProcess[str]:
    line = command(runs_dir, file, *options)
    return subprocess.run(line, capture_output=True, text=True, check=True, timeout=240, cwd=ROOT)


def working(run: Run) -> list[dict[str, Any]]:
    return [j for j in run.leaderboard.reader.rows("job") if j["state"] == "running"]


def test_two_workers_train_at_the_same_time_through_several_jobs_and_leave_nothing_behind(
    runs_dir: Path, tmp_path: Path
) -> None:
    """Each of a worker's first jobs trains only after the other worker's job of that number has begun to train. Workers
    that take turns would wait in vain, and their chunks would fail."""
    (tmp_path / "meetings").mkdir()
    file = quick_file(tmp_path, meet=str(tmp_path / "meetings"))
    launch(runs_dir, "--workers", "2", "--set", "eon_lifetime=1.5", "--set", "stop_after_stale_cycles=null", file=file)
    run = Run.open(runs_dir / "digits")

    def met() -> bool:
        begun = [path.name[0] for path in (tmp_path / "meetings").iterdir()]
        return min(begun.count("0"), begun.count("1")) >= MEETINGS and len(run.board()["entries"]) == 5

    until("several jobs of each worker, and a full board", met)
    run.drain(time.time())
    until("every process to be gone", lambda: not processes_of(runs_dir))

    status = run.status()
    assert (status["state"], status["chunks"]["failed"]) == ("finished", 0)
    assert violations(run) == []
    began = [(j["worker_id"], j["link"]) for j in run.leaderboard.reader.rows("job") if j["started_at"]]
    assert {(worker, link) for worker in (0, 1) for link in range(MEETINGS)} <= set(began)


@pytest.mark.long
def test_two_workers_learn_digits_through_several_jobs(runs_dir: Path) -> None:
    launch(runs_dir, "--wait", "--workers", "2", "--set", "eon_lifetime=8")
    run = Run.open(runs_dir / "digits")
    board, status = run.board(), run.status()

    assert len(board["entries"]) == 5
    assert board["entries"][0]["score"] >= 0.9  # guessing scores 0.1
    assert status["state"] in ("converged", "finished")
    assert violations(run) == []
    assert max(j["link"] for j in run.leaderboard.reader.rows("job") if j["started_at"]) >= 2
    until("every process to be gone", lambda: not processes_of(runs_dir))


def test_workers_killed_with_sigkill_lose_nothing_and_the_resumed_run_keeps_every_invariant(
    runs_dir: Path, quick: Path
) -> None:
    options = ["--workers", "2", "--set", "total_lifetime=150", "--set", "eon_lifetime=5", "--set", "max_failures=50"]
    options += ["--set", "stop_after_stale_cycles=null", "--set", "epochs_per_chunk=2"]
    launch(runs_dir, *options, file=quick)
    run = Run.open(runs_dir / "digits")
    moments = random.Random(7)
    kills = 0
    while kills < 4:
        until("a worker at work", lambda: working(run) and run.leaderboard.reader.counts()["chunks"]["live"])
        time.sleep(moments.uniform(0.0, 0.6))
        victim = moments.choice(working(run) or [None])
        if victim is not None and psutil.pid_exists(victim["pid"]):
            psutil.Process(victim["pid"]).kill()
            kills += 1
    until("every process to be gone, as the whole machine goes", lambda: not killed(runs_dir))
    assert violations(run, over=False) == []

    stop = f"stop_after_epochs={run.leaderboard.reader.counts()['epochs'] + 20}"
    run.amend([stop], time.time())
    launch(runs_dir, *options, "--set", stop, "--wait", file=quick)

    expired = [e for e in run.leaderboard.reader.rows("event") if e["kind"] == "expired"]
    assert expired, "the kills left claims behind, which were given back"
    assert run.status()["state"] == "finished"
    assert violations(run) == []
    assert profiles_follow_the_cycle(run)
    until("every process to be gone", lambda: not processes_of(runs_dir))


def profiles_follow_the_cycle(run: Run) -> bool:
    cycle = [p.name for p in run.settings.training_profiles]
    chunks = run.leaderboard.reader.rows("chunk")
    return all(c["profile"] == cycle[c["position"] % len(cycle)] for c in chunks)


@pytest.mark.parametrize(
    "signum",
    [
        pytest.param(signal.SIGUSR2, id="SIGUSR2"),
        pytest.param(signal.SIGTERM, id="SIGTERM", marks=pytest.mark.long),
        pytest.param(signal.SIGINT, id="SIGINT", marks=pytest.mark.long),
    ],
)
def test_a_signal_suspends_the_chunk_and_the_successor_continues_it(
    runs_dir: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    """The chunk waits in its third epoch for the signal. test_distributed_ends.py sends a signal to real training."""
    hold = tmp_path / "hold"
    hold.touch()
    options = ["--workers", "1", "--set", "epochs_per_chunk=20", "--set", "stop_after_epochs=20"]
    options += ["--set", "eon_lifetime=200", "--set", "total_lifetime=300"]
    launch(runs_dir, *options, file=quick_file(tmp_path, hold=[str(hold), 25]))
    run = Run.open(runs_dir / "digits")
    log = run.folder / "logs/worker-0.log"
    until("the second epoch", lambda: log.exists() and "epoch 2" in log.read_text())

    psutil.Process(working(run)[0]["pid"]).send_signal(signum)
    until("the chunk to be suspended", lambda: run.leaderboard.reader.counts()["chunks"]["suspended"])
    hold.unlink()
    until("the end", lambda: run.status()["state"] == "finished" and not processes_of(runs_dir))

    jobs, chunks = run.leaderboard.reader.rows("job"), run.leaderboard.reader.rows("chunk")
    assert jobs[0]["outcome"] == f"stopped by {signum.name}"
    assert [e["kind"] for e in run.leaderboard.reader.rows("event")].count("suspended") == 1
    assert [(c["state"], c["epochs"], c["job_id"]) for c in chunks] == [("promoted", 20, jobs[1]["job_id"])]
    assert violations(run) == []


def test_cancel_ends_every_job_and_a_resume_continues_the_run(runs_dir: Path, quick: Path) -> None:
    launch(runs_dir, "--set", "stop_after_stale_cycles=null", "--set", "epochs_per_chunk=5", file=quick)
    run = Run.open(runs_dir / "digits")
    until("some work", lambda: run.leaderboard.reader.counts()["epochs"] >= 5)

    assert run.cancel(at_once=False, now=time.time()) == []
    until("every process to be gone", lambda: not processes_of(runs_dir))
    assert run.status()["state"] == "cancelled"
    assert violations(run) == []
    before = run.leaderboard.reader.counts()["epochs"]

    run.resume(time.time())
    until("more work", lambda: run.leaderboard.reader.counts()["epochs"] > before)
    run.cancel(at_once=True, now=time.time())
    until("every process to be gone", lambda: not processes_of(runs_dir))


def test_launch_in_a_pipe_returns_at_once(runs_dir: Path, quick: Path) -> None:
    launch(runs_dir, file=quick)
    run = Run.open(runs_dir / "digits")
    assert {w["state"] for w in run.status()["workers"]} <= {"running", "queued"}
    run.cancel(at_once=True, now=time.time())
    until("every process to be gone", lambda: not processes_of(runs_dir))


def test_two_launches_at_the_same_moment_make_one_run(runs_dir: Path, quick: Path) -> None:
    line = command(runs_dir, quick, "--workers", "2")
    twins = [subprocess.Popen(line, stderr=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)]
    errors = [twin.communicate(timeout=60)[1] for twin in twins]

    run = Run.open(runs_dir / "digits")
    assert len({j["worker_id"] for j in run.leaderboard.reader.rows("job")}) == 2
    assert [j["link"] for j in run.leaderboard.reader.rows("job") if j["link"] == 0] == [0, 0]
    assert sorted(twin.returncode for twin in twins) in ([0, 0], [0, 2]), errors
    assert [p.name for p in runs_dir.iterdir()] == ["digits"]
    run.cancel(at_once=True, now=time.time())
    until("every process to be gone", lambda: not processes_of(runs_dir))


def test_a_launch_that_can_not_start_a_process_leaves_no_run(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_process(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    settings, _ = load(DIGITS, executor="local")
    monkeypatch.setattr("subprocess.Popen", no_process)
    with pytest.raises(OrchError, match="Resource temporarily unavailable"):
        launch_run(settings, runs_dir)
    assert not (runs_dir / "digits").exists()
