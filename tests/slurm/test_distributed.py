"""Workers with two GPUs on a real cluster: each process has its own GPU, all end together, and the chain continues."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from devcluster import DevCluster

from orchestrator.run.run import Run
from tests.support.invariants import violations
from tests.support.slurm_runs import epochs, jobs, launch, over, settings, until, worked

TWO_GPUS: dict[str, Any] = {
    "job": "tests.support.distributed_jobs:Paced",
    "gpus_per_worker": 2,
    "slurm": {"gpus": 2, "cpus": 1, "mem_gb": 1},
    "eon_lifetime": 200,
    "validation_fraction": 0.2,
}


def start(name: str, folder: Path, **changes: Any) -> Run:
    return launch(settings(name, **TWO_GPUS | changes, job_params={"seen": str(folder)}), folder)


def seen(folder: Path) -> list[dict[str, Any]]:
    """Return what the job's processes recorded when they made their first model, rank 0 first."""
    return [json.loads((folder / f"rank-{rank}").read_text().splitlines()[0]) for rank in (0, 1)]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_each_process_sees_a_gpu_of_its_own_and_the_run_ends_by_itself(cluster: DevCluster, tmp_path: Path) -> None:
    run = start("two", tmp_path, stop_after_epochs=8, job="tests.support.distributed_jobs:Watched")
    until("work", lambda: epochs(run) >= 1, 120)
    shown = cluster.run(["squeue", "-h", "-t", "R", "-O", "NumNodes:5,NumTasks:5,tres-alloc:80"]).stdout
    assert shown.split()[:2] == ["1", "2"]
    assert "gres/gpu=2" in shown
    until("the end", lambda: over(run), 120)

    first, second = seen(tmp_path)
    assert (first["CUDA_VISIBLE_DEVICES"], second["CUDA_VISIBLE_DEVICES"]) == ("0", "1")
    assert (first["SLURM_LOCALID"], second["SLURM_LOCALID"]) == ("0", "1")
    assert first["SLURM_JOB_ID"] == second["SLURM_JOB_ID"]
    assert first["cores"] == second["cores"] == 1
    assert run.leaderboard.run_state.snapshot().state == "finished"
    assert len(run.board()["entries"]) == 4
    assert violations(run) == []
    links = jobs(run)
    assert [(job["worker_id"], job["link"]) for job in links] == [(0, link) for link in range(len(links))]
    assert len(worked(run)) == 1
    assert worked(run)[0]["pid"] == first["pid"], "rank 0 is the worker"
    until("an empty queue", lambda: not cluster.squeue())


@pytest.mark.slow
def test_a_warning_reaches_all_processes_and_those_of_a_requeued_job_meet_again(
    cluster: DevCluster, tmp_path: Path
) -> None:
    """Slurm sends a warning signal to each process of a job. Then a job is requeued and starts again."""
    run = start("warned", tmp_path)
    until("work", lambda: epochs(run) >= 1, 120)
    (job,) = jobs(run, "running")
    cluster.run(["scancel", "--signal=USR2", job["cluster_id"]])
    until("the successor to work", lambda: len(worked(run)) == 2 and jobs(run, "running"), 120)
    assert worked(run)[0]["outcome"] == "stopped by SIGUSR2"

    done = epochs(run)
    until("its work", lambda: epochs(run) > done, 120)
    (job,) = jobs(run, "running")
    cluster.run(["scontrol", "requeue", job["cluster_id"]])
    until("the job to start again", lambda: jobs(run, "running") and jobs(run, "running")[0]["starts"] == 2, 120)
    run.amend([f"stop_after_epochs={epochs(run) + 2}"], time.time())
    until("the end", lambda: over(run), 240)
    (again,) = [j for j in worked(run) if j["job_id"] == job["job_id"]]
    assert again["starts"] == 2
    assert violations(run) == []
    until("an empty queue", lambda: not cluster.squeue())


@pytest.mark.parametrize(  # tests/integration/test_distributed_ends.py kills rank 1 on this machine
    "victim", [pytest.param(0, id="rank 0"), pytest.param(1, id="rank 1", marks=pytest.mark.long)]
)
def test_a_killed_process_ends_the_others_and_the_chain_continues(
    cluster: DevCluster, tmp_path: Path, victim: int
) -> None:
    run = start(f"killed-{victim}", tmp_path)
    until("work", lambda: epochs(run) >= 1, 120)
    processes = [one["pid"] for one in seen(tmp_path)]
    killed_at = time.monotonic()
    os.kill(processes[victim], signal.SIGKILL)
    until("all processes to be gone", lambda: all(map(gone, processes)), 30)
    print(f"after {time.monotonic() - killed_at:.1f} s")
    run.amend([f"stop_after_epochs={epochs(run) + 4}"], time.time())

    until("the end", lambda: over(run), 120)
    assert [job["link"] for job in worked(run)] == [0, 1]
    assert run.leaderboard.run_state.snapshot().state == "finished"
    assert violations(run) == []
    until("an empty queue", lambda: not cluster.squeue())
