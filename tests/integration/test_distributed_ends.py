"""Workers with several processes: how the processes end, and whole runs."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from jobs.errors import JobError
from jobs.training.distributed import dismiss, own_gpu
from jobs.training.ranks import RankLostError, Ranks, meet
from orchestrator.cluster import host
from orchestrator.run.run import Run
from tests.support.command_line import orch_here, output
from tests.support.distributed_jobs import (
    AT_ONCE_S,
    ROOT,
    Unlucky,
    Watched,
    check_equal,
    founder,
    settings,
    team_of,
    train,
)
from tests.support.invariants import violations
from tests.support.settings import settings as common_settings


def test_three_processes_train_as_a_single_process_does(tmp_path: Path) -> None:
    with team_of(3, tmp_path) as three:
        check_equal(three, settings(), tmp_path)
        dismiss(three.ranks)
        assert three.endings() == [(0, "stopped by rank 0")] * 2


# --- deaths


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.long), 3])
def test_a_follower_that_is_killed_ends_the_others_at_once(count: int, tmp_path: Path) -> None:
    with team_of(count, tmp_path) as team:
        session = team.open(settings(Unlucky, job_params={"what": "dies"}))
        started = time.monotonic()
        with pytest.raises(RankLostError, match="another process of this job died or hangs"):
            train(session, founder())
        assert time.monotonic() - started < AT_ONCE_S
        assert team.failed, "the worker is told that no chunk can be trained any more"
        codes = [code for code, _ in team.endings()]
        assert codes == [-signal.SIGKILL, *[0] * (count - 2)], "exit code 0, or Slurm would kill rank 0"


def test_rank_0_reports_a_followers_error(tmp_path: Path) -> None:
    with team_of(2, tmp_path) as team:
        session = team.open(settings(Unlucky, job_params={"what": "fails"}))
        with pytest.raises(RankLostError, match=r"^rank 1: ValueError: no luck on rank 1$"):
            train(session, founder())
        assert team.endings() == [(0, "failed: ValueError: no luck on rank 1")]


def test_rank_0_reports_its_own_error(tmp_path: Path) -> None:
    with team_of(2, tmp_path) as team:
        session = team.open(settings(Unlucky, job_params={"what": "fails", "who": 0}))
        with pytest.raises(ValueError, match=r"^no luck on rank 0$"):
            train(session, founder())
        assert team.failed
        assert [code for code, _ in team.endings()] == [0]


def test_a_hanging_follower_is_given_up_after_the_step_limit(tmp_path: Path) -> None:
    with team_of(2, tmp_path, step_s=8.0) as team:
        session = team.open(settings(Unlucky, job_params={"what": "hangs"}))
        started = time.monotonic()
        with pytest.raises(RankLostError, match=r"died or hangs .*Timed out waiting 8000ms"):
            train(session, founder())
        assert time.monotonic() - started < 8.0 + AT_ONCE_S
        team.followers[0].kill()


def test_a_job_that_cannot_be_opened_ends_all_processes(tmp_path: Path) -> None:
    with team_of(2, tmp_path) as team:
        with pytest.raises(JobError, match="nowhere can't be imported"):
            team.open(common_settings(job="nowhere:Nothing"))
        assert [code for code, _ in team.endings()] == [0]


def test_waiting_for_missing_processes_has_a_limit(tmp_path: Path) -> None:
    with pytest.raises(RankLostError, match=r"rank 0 did not write its port to .* within 0\.2 s"):
        meet(1, 2, tmp_path / "meeting", meeting_s=0.2)
    with pytest.raises(RankLostError, match="here 1"):
        meet(0, 2, tmp_path / "meeting", meeting_s=0.2)


# --- GPUs


def test_each_process_needs_a_gpu_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with team_of(2, tmp_path) as team:
        monkeypatch.setattr(
            "torch.cuda.get_device_properties", lambda _device: type("Properties", (), {"uuid": "GPU-7"})
        )
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        with pytest.raises(JobError, match="no GPU for each: rank 0 has GPU-7, rank 1 has none"):
            team.open(settings())
        assert [code for code, _ in team.endings()] == [0]


@pytest.mark.parametrize(
    ("visible", "count", "own"),
    [
        (["0", "1"], 2, ["0", "1"]),
        (["GPU-a", "GPU-b", "GPU-c"], 2, ["GPU-a", "GPU-b"]),
        (["0"], 2, ["0", "0"]),  # this rank's own GPU, or too few GPUs; Ranks.use finds out which
        ([], 2, ["", ""]),
        ([""], 2, ["", ""]),
    ],
)
def test_a_process_uses_one_of_the_gpus_that_it_sees(visible: list[str], count: int, own: list[str]) -> None:
    assert [own_gpu(visible, rank, count) for rank in range(count)] == own


@pytest.mark.parametrize(
    ("visible", "each", "shares"),
    [
        ("0,1,2,3", 1, ["0", "1", "2"]),
        ("0,1,2,3", 2, ["0,1", "2,3", "0,1"]),
        ("0,1,2", 2, ["0,1", "0,1", "0,1"]),
        ("0", 1, ["0", "0", "0"]),
        ("0", 2, [None, None, None]),
        ("", 1, [None, None, None]),
    ],
)
def test_local_workers_share_the_gpus(
    visible: str, each: int, shares: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert host.gpus_of(range(3), each) == shares


@pytest.mark.parametrize("rank", [0, 1])
def test_the_part_of_a_nested_batch_has_the_part_of_each_tensor(rank: int) -> None:
    ranks = Ranks.__new__(Ranks)
    ranks.rank, ranks.count = rank, 2
    part = slice(0, 2) if rank == 0 else slice(2, 5)
    names, numbers, scale = ["a", "b", "c", "d", "e"], torch.arange(5), torch.tensor(2.0)
    inputs, targets = ranks.share(({"names": names, "pair": [numbers, scale], "what": 7}, numbers), 5)
    assert inputs["names"] == names[part]
    assert (inputs["pair"][0].tolist(), inputs["pair"][1], inputs["what"]) == (numbers[part].tolist(), scale, 7)
    assert targets.tolist() == numbers[part].tolist()


# --- whole runs


def processes_of(folder: Path) -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(str(folder) in part for part in process.info["cmdline"] or ())
    ]


def until(what: str, condition: Callable[[], Any], timeout_s: float = 90) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"waited {timeout_s} s for: {what}"
        time.sleep(0.05)


@pytest.fixture
def runs_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "runs"
    for process in processes_of(tmp_path):
        process.kill()


def launch(runs_dir: Path, *options: str) -> Run:
    runs_dir.mkdir()
    changes = ["gpus_per_worker=2", f"job={Watched.__module__}:Watched", "stop_after_stale_cycles=null"]
    changes += [f"job_params.seen={json.dumps(str(runs_dir.parent))}", "cores_per_worker=2"]
    changes += ["eon_lifetime=200", "total_lifetime=300"]
    command = ["launch", str(ROOT / "settings/digits.json"), "--executor", "local", "--workers", "1"]
    command += ["--runs-dir", str(runs_dir), *options]
    for change in changes:
        command += ["--set", change]
    output(orch_here(ROOT, *command))
    return Run.open(runs_dir / "digits")


def seen_by(runs_dir: Path, rank: int) -> list[dict[str, Any]]:
    """Return what the processes of a rank recorded, except the launch, which makes a model to estimate its size."""
    lines = [json.loads(line) for line in (runs_dir.parent / f"rank-{rank}").read_text().splitlines()]
    return [line for line in lines if rank > 0 or line["pid"] != lines[0]["pid"]]


def pids(runs_dir: Path) -> list[int]:
    """Return the process ids of the first job, rank 0 first."""
    return [seen_by(runs_dir, rank)[0]["pid"] for rank in (0, 1)]


def outputs(run: Run, rank: int) -> list[str]:
    return [path.read_text() for path in sorted((run.folder / "jobs").glob(f"*/*_{rank}_log.out"))]


def test_a_run_with_two_processes_per_worker_has_one_writer_and_leaves_no_process(runs_dir: Path) -> None:
    run = launch(runs_dir, "--set", "stop_after_epochs=30")
    until("some work", lambda: run.leaderboard.reader.counts()["epochs"] >= 3)
    for pid in pids(runs_dir):  # on a cluster, a signal reaches all processes of a job
        psutil.Process(pid).send_signal(signal.SIGUSR2)
    until("the end", lambda: run.status()["state"] == "finished" and not processes_of(runs_dir))

    assert violations(run) == []
    entries = run.board()["entries"]
    assert len(entries) == 5
    assert entries[0]["score"] >= 0.9
    links = run.leaderboard.reader.rows("job")
    assert [(job["worker_id"], job["link"]) for job in links] == [(0, link) for link in range(len(links))]
    assert links[0]["outcome"] == "stopped by SIGUSR2"
    worked = [job for job in links if job["started_at"]]
    assert len(worked) == 2
    assert {line["pid"] for line in seen_by(runs_dir, 0)} == {job["pid"] for job in worked}, "rank 0 is the worker"
    followed = outputs(run, 1)
    assert len(followed) == len(links)
    assert all("rank 1 ends: " in output for output in followed)
    assert not any("chunk" in output for output in followed), "followers know of no claim"
    seen = seen_by(runs_dir, 0) + seen_by(runs_dir, 1)
    assert {line["cores"] for line in seen} == {1}, "the worker's cores are shared"
    assert not list(run.folder.glob("jobs/*/*.meeting"))


@pytest.mark.slow
@pytest.mark.parametrize(  # tests/slurm/test_distributed.py tests this on a real cluster
    "victim", [pytest.param(0, id="rank 0", marks=pytest.mark.long), pytest.param(1, id="rank 1")]
)
def test_a_killed_process_ends_the_others_and_the_chain_continues(runs_dir: Path, victim: int) -> None:
    run = launch(runs_dir, "--set", "stop_after_epochs=15")
    until("some work", lambda: run.leaderboard.reader.counts()["epochs"] >= 3)
    processes = pids(runs_dir)
    psutil.Process(processes[victim]).kill()
    until("all of the job to be gone", lambda: not any(psutil.pid_exists(pid) for pid in processes), AT_ONCE_S)

    until("the end", lambda: run.status()["state"] == "finished" and not processes_of(runs_dir))
    jobs = run.leaderboard.reader.rows("job")
    assert [job["link"] for job in jobs if job["started_at"]] == [0, 1]
    if victim == 1:  # rank 0 was still alive and recorded the failure
        assert jobs[0]["outcome"] == "stopped by the failure of one of its processes"
        (failed,) = [e for e in run.leaderboard.reader.rows("event") if e["kind"] == "failed"]
        assert "another process of this job died or hangs" in failed["data"]["error"]
    assert violations(run) == []
