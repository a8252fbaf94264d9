"""Real workers on this machine: submitit's local executor and real signals. Tests that do not need training use a job
that starts five times faster."""

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
    file = tmp_path / "digits.json"
    job = {"job": "tests.support.quick_job:Quick", "job_params": {"seconds": 0.1}}
    file.write_text(json.dumps(json.loads(DIGITS.read_text()) | job))
    return file


def command(runs_dir: Path, file: Path, *options: str) -> list[str]:
    return [str(ORCH), "launch", str(file), "--executor", "local", "--runs-dir", str(runs_dir), *options]


def launch(runs_dir: Path, *options: str, file: Path = DIGITS) -> subprocess.CompletedProcess[str]:
    line = command(runs_dir, file, *options)
    return subprocess.run(line, capture_output=True, text=True, check=True, timeout=240, cwd=ROOT)


def working(run: Run) -> list[dict[str, Any]]:
    return [j for j in run.leaderboard.reader.rows("job") if j["state"] == "running"]


def test_two_workers_train_at_the_same_time_through_several_jobs_and_leave_nothing_behind(runs_dir: Path) -> None:
    launch(runs_dir, "--wait", "--workers", "2", "--set", "eon_lifetime=8")
    run = Run.open(runs_dir / "digits")
    board, status = run.board(), run.status()

    assert len(board["entries"]) == 5
    assert board["entries"][0]["score"] >= 0.9  # guessing scores 0.1
    assert status["state"] in ("converged", "finished")
    assert violations(run) == []
    assert max(j["link"] for j in run.leaderboard.reader.rows("job") if j["started_at"]) >= 2
    assert overlap(run) >= 0.7  # 0.85 on an idle machine, because each job first imports torch
    until("every process to be gone", lambda: not processes_of(runs_dir))


def overlap(run: Run) -> float:
    """Return the share of time in which both workers had a job, between the later start and the earlier end."""
    spans: dict[int, list[tuple[float, float]]] = {0: [], 1: []}
    for job in run.leaderboard.reader.rows("job"):
        if job["started_at"]:
            spans[job["worker_id"]].append((job["started_at"], job["ended_at"]))
    begun = max(min(start for start, _ in worker) for worker in spans.values())
    ended = min(max(end for _, end in worker) for worker in spans.values())
    both = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in spans[0] for b in spans[1])
    return both / (ended - begun)


@pytest.mark.slow
def test_workers_killed_with_sigkill_lose_nothing_and_the_resumed_run_keeps_every_invariant(
    runs_dir: Path, quick: Path
) -> None:
    options = ["--workers", "2", "--set", "total_lifetime=150", "--set", "eon_lifetime=5", "--set", "max_failures=50"]
    options += ["--set", "stop_after_stale_cycles=null", "--set", "stop_after_epochs=210"]
    options += ["--set", "epochs_per_chunk=2"]
    launch(runs_dir, *options, file=quick)
    run = Run.open(runs_dir / "digits")
    moments = random.Random(7)
    kills = 0
    while kills < 6:
        until("a worker at work", lambda: working(run) and run.leaderboard.reader.counts()["chunks"]["live"])
        time.sleep(moments.uniform(0.0, 0.6))
        victim = moments.choice(working(run) or [None])
        if victim is not None and psutil.pid_exists(victim["pid"]):
            psutil.Process(victim["pid"]).kill()
            kills += 1
    until("every process to be gone, as the whole machine goes", lambda: not killed(runs_dir))
    assert violations(run, over=False) == []

    launch(runs_dir, *options, "--wait", file=quick)

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
def test_a_signal_suspends_the_chunk_and_the_successor_continues_it(runs_dir: Path, signum: signal.Signals) -> None:
    options = ["--workers", "1", "--set", "epochs_per_chunk=20", "--set", "stop_after_epochs=20"]
    options += ["--set", "eon_lifetime=200", "--set", "total_lifetime=300"]
    launch(runs_dir, *options)
    run = Run.open(runs_dir / "digits")
    log = run.folder / "logs/worker-0.log"
    until("the first epoch", lambda: log.exists() and "epoch 2" in log.read_text())

    psutil.Process(working(run)[0]["pid"]).send_signal(signum)
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
