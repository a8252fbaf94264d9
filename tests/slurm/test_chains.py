"""Worker chains on a real cluster: they end by themselves, are paused, amended, refused, and never fork."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from devcluster import DevCluster

from orchestrator.cluster.slurm import SlurmQueue
from orchestrator.errors import OrchError, Refusal, SettingsError, SubmissionError
from orchestrator.run.run import Run
from tests.support.invariants import violations
from tests.support.slurm_runs import QUICK, ROOT, epochs, jobs, launch, over, settings, until, worked


def times_of(cluster: DevCluster, run: Run) -> dict[str, tuple[float, float]]:
    """Return the start and end times (Unix seconds) of the run's jobs that sacct knows, by job id."""
    rows = cluster.run(["sacct", "-n", "-P", "-X", "-D", "-o", "JobID,Start,End,JobName"]).stdout.splitlines()
    jobs = [line.split("|") for line in rows]
    return {
        job: (datetime.fromisoformat(start).timestamp(), datetime.fromisoformat(end).timestamp())
        for job, start, end, name in jobs
        if name.startswith(f"orch-{run.name}-") and "Unknown" not in (start, end) and start != "None"
    }


@pytest.mark.slow
def test_six_workers_run_at_once_each_on_a_gpu_of_its_own_and_end_by_themselves(
    cluster: DevCluster, tmp_path: Path
) -> None:
    run = launch(settings("six", workers=6, eon_lifetime=2, stop_after_epochs=60), tmp_path)
    until("the six to work", lambda: len(jobs(run, "running")) == 6)
    shown = cluster.run(["squeue", "-h", "-t", "R", "-O", "JobArrayID:20,NodeList:20,tres-alloc:80"]).stdout
    assert shown.count("gres/gpu=1") == 6
    nodes = [line.split()[1] for line in shown.splitlines()]
    assert all(nodes.count(node) <= 2 for node in nodes), "a node has two GPUs"

    until("the end", lambda: over(run), 120)

    assert run.leaderboard.run_state.snapshot().state == "finished"
    assert violations(run) == []
    assert max(len([j for j in worked(run) if j["worker_id"] == w]) for w in range(6)) >= 3
    until("an empty queue", lambda: not cluster.squeue())
    # sacct's rows come some seconds late. It may also list a job that began after the last epoch and was cancelled.
    ledger = {j["cluster_id"] for j in worked(run)}
    until("sacct to know every job that worked", lambda: ledger <= times_of(cluster, run).keys())
    spans = [span for job, span in times_of(cluster, run).items() if job in ledger]
    assert max(sum(start <= moment < end for start, end in spans) for moment, _ in spans) >= 6


def test_a_paused_run_has_no_jobs_and_continues_with_its_board_after_a_resume(
    cluster: DevCluster, tmp_path: Path
) -> None:
    run = launch(settings("pause", workers=2), tmp_path)
    until("some work", lambda: epochs(run) >= 2)
    assert run.pause(time.time()) == []
    assert run.pause(time.time()) == [], "said twice"
    until("no job", lambda: not cluster.squeue())
    board = run.board()["entries"]
    assert epochs(run) == run.leaderboard.run_state.row()["epochs"]

    run.resume(time.time())
    assert {e["sha256"] for e in run.board()["entries"]} == {e["sha256"] for e in board}
    until("more work", lambda: epochs(run) > len(board) + 2)
    run.cancel(at_once=False, now=time.time())
    until("the end", lambda: over(run))
    assert violations(run) == []


def test_amended_lifetimes_and_profiles_are_in_force_at_the_next_claim(cluster: DevCluster, tmp_path: Path) -> None:
    run = launch(settings("amend", workers=1, eon_lifetime=60), tmp_path)
    until("some work", lambda: epochs(run) >= 2)
    changes = ['training_profiles=[{"name": "z", "learning_rate": 0.5}]', "eon_lifetime=50"]
    run.amend(changes, time.time())
    seen = max(c["chunk_id"] for c in run.leaderboard.reader.rows("chunk"))
    until("two more chunks", lambda: epochs(run) >= seen + 2)
    later = [c["profile"] for c in run.leaderboard.reader.rows("chunk") if c["chunk_id"] > seen]
    assert set(later) == {"z"}
    assert len(worked(run)) == 1, "in the job that was running already"

    run.amend(["total_lifetime=1"], time.time())
    until("the end, in one chunk", lambda: over(run), 40)
    assert run.leaderboard.run_state.snapshot().state == "finished"
    assert violations(run) == []


def test_a_live_run_grows_and_shrinks(cluster: DevCluster, tmp_path: Path) -> None:
    run = launch(settings("grow", workers=1), tmp_path)
    until("work", lambda: jobs(run, "running"))
    run.amend(["workers=4"], time.time())
    until("four at work", lambda: len(jobs(run, "running")) == 4)
    run.amend(["workers=2"], time.time())
    until("two at work", lambda: {j["worker_id"] for j in jobs(run, "running", "queued")} == {0, 1})
    run.drain(time.time())
    until("the end", lambda: over(run))
    assert run.leaderboard.run_state.snapshot().state == "finished"
    assert violations(run) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slurm": {"partition": "nowhere"}}, "slurm.partition nowhere: this partition does not exist"),
        ({"slurm": {"account": "nobody"}}, "you may not use slurm.account nobody"),
        ({"slurm": {"qos": "nothing"}}, "slurm.qos nothing is not allowed for this account"),
        (
            {"slurm": {"partition": "short", "time_min": 10}},
            "time limit of 10 min is longer than partition short allows",
        ),
        ({"slurm": {"cpus": 17}}, "no node of partition .* has what a worker requests .*cpus-per-task=17"),
        ({"slurm": {"gpus": 3}}, "gpus-per-node=3"),
        ({"slurm": {"gres": "tpu:1", "gpus": 0}}, "does not know the requested GPUs"),
        ({"slurm": {"mem_gb": 200}}, "no node of partition .* has what a worker requests .*mem=204800M"),
        ({"slurm": {"constraint": "a100"}}, "slurm.constraint a100 is not a feature of any node"),
        ({"slurm": {"partition": "closed"}}, "partition closed is inactive or drained"),
        ({"slurm": {"qos": "one"}, "workers": 2}, "submit limit .* leaves no room for 2 more jobs"),
        ({"workers": 1002}, "a job array may not have 1002 tasks"),
        ({"slurm": {"exclude": "node9"}}, "names a node that does not exist"),
        ({"slurm": {"additional_parameters": {"colour": "red"}}}, "does not know"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_refusal_becomes_one_message_that_says_what_to_change_and_leaves_nothing(
    cluster: DevCluster, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SubmissionError, match=message) as caught:
        launch(settings("refused", **changes), tmp_path)
    print(f"{changes} -> {caught.value}")
    assert "sbatch said: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "runs").iterdir()) == []
    assert cluster.squeue() == []


def test_a_resume_that_starts_no_job_is_an_error_with_the_reason(cluster: DevCluster, tmp_path: Path) -> None:
    run = launch(settings("stuck", workers=1), tmp_path)
    run.pause(time.time())
    until("no job", lambda: over(run) or not cluster.squeue())
    run.amend(["slurm.partition=nowhere"], time.time())
    resume = [Path(sys.executable).with_name("orch"), "resume", run.folder]
    done = subprocess.run(resume, capture_output=True, text=True)
    assert done.returncode == 2
    assert "none of its workers has a job: " in done.stderr
    assert "nowhere" in done.stderr
    run.amend(["slurm.partition=null"], time.time())
    done = subprocess.run(resume, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "stuck is active")
    until("work", lambda: epochs(run) >= 1)
    run.cancel(at_once=True, now=time.time())


@pytest.mark.long
def test_a_controller_that_is_down_is_reported_as_unreachable_and_nothing_is_lost(
    cluster: DevCluster, tmp_path: Path
) -> None:
    run = launch(settings("down", workers=1), tmp_path)
    until("work", lambda: epochs(run) >= 1)
    cluster.stop_controller()
    with pytest.raises(SubmissionError, match="Slurm does not answer") as caught:
        launch(settings("unborn"), tmp_path)
    assert caught.value.refusal is Refusal.UNREACHABLE
    assert run.reconcile(time.time()) == [], "no answer proves nothing"
    assert not jobs(run, "lost")
    cluster.start_controller()
    done = epochs(run)
    until("it goes on", lambda: epochs(run) > done + 4)
    run.cancel(at_once=True, now=time.time())
    until("the end", lambda: over(run))
    assert violations(run) == []


def test_slurm_file_is_used_and_settings_override_it(cluster: DevCluster, tmp_path: Path) -> None:
    script = tmp_path / "mine.sbatch"
    script.write_text(
        "#!/bin/bash\n#SBATCH -p low --mem 300M   # where\n#SBATCH --cpus-per-task=2\n#SBATCH -t 3\n"
        f"export FROM_SCRIPT=yes\ntouch {tmp_path}/set-up\nsrun python main.py\n"
    )
    asked = {"gpus": 0, "cpus": 1, "setup": [f"touch {tmp_path}/$FROM_SCRIPT"]}
    run = launch(settings("file", slurm_file=str(script), slurm=asked), tmp_path)
    until("work", lambda: jobs(run, "running"))
    shown = cluster.run(["scontrol", "show", "job", "-o", jobs(run, "running")[0]["cluster_id"]]).stdout
    assert "Partition=low" in shown
    assert "TimeLimit=00:03:00" in shown
    assert "CPUs/Task=1" in shown
    assert (tmp_path / "set-up").exists()
    assert (tmp_path / "yes").exists()
    run.cancel(at_once=True, now=time.time())
    until("the end", lambda: over(run))


@pytest.mark.parametrize("name", ["gpu", "preemptible", "cpu"])
def test_the_files_in_slurm_are_ready_to_use(cluster: DevCluster, tmp_path: Path, name: str) -> None:
    file = str(ROOT / "slurm" / f"{name}.sbatch")
    asked = {"gpus": 0} if name == "cpu" else {}
    run = launch(settings(name, slurm_file=file, slurm=asked), tmp_path)
    until("work", lambda: epochs(run) >= 1)
    run.cancel(at_once=True, now=time.time())
    until("the end", lambda: over(run))


def test_a_chain_continues_where_a_submit_limit_has_no_room_for_a_successor(
    cluster: DevCluster, tmp_path: Path
) -> None:
    asked = {"qos": "one", "gpus": 0, "cpus": 1, "mem_gb": 0.5}
    run = launch(settings("limit", workers=1, eon_lifetime=2, stop_after_epochs=6, slurm=asked), tmp_path)
    until("the end", lambda: over(run), 120)
    assert run.leaderboard.reader.counts()["epochs"] == 6
    requeued = [e for e in run.leaderboard.reader.rows("event") if e["kind"] == "requeued"]
    assert {e["data"]["why"] for e in requeued} == {"no room"}
    assert violations(run) == []


def test_a_job_id_that_slurm_uses_again_is_not_mistaken_for_the_run_s_job(cluster: DevCluster, tmp_path: Path) -> None:
    """A cluster that was wiped gives the ids of earlier jobs to other jobs."""
    run = launch(settings("reused", workers=1), tmp_path)
    until("work", lambda: epochs(run) >= 1)
    run.pause(time.time())
    until("no job", lambda: not cluster.squeue())
    known = jobs(run)[0]["cluster_id"]
    other_job = cluster.sbatch("#!/bin/bash\nsleep 60\n")
    mine = SlurmQueue(run.settings, run.folder, job_main=lambda _folder, _worker: None)
    snapshot_job = run.leaderboard.chains.find(jobs(run)[0]["token"], 0)[0]
    assert snapshot_job is not None
    assert known != str(other_job)
    from dataclasses import replace

    taken_over = replace(snapshot_job, cluster_id=str(other_job))
    assert mine.evidence([taken_over]) == {taken_over.job_id: "gone"}
    cluster.run(["scancel", str(other_job)])


def test_status_without_a_run_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(OrchError, match="is not a run"):
        Run.open(tmp_path)


def test_jobs_that_die_before_python_begins_count_as_failures_and_the_run_says_how_they_died(
    cluster: DevCluster, tmp_path: Path
) -> None:
    """This happens if the setup lines fail, for example because a module or the virtual environment is missing."""
    broken = {**QUICK["slurm"], "setup": ["exit 3"]}
    run = launch(settings("broken", workers=1, max_failures=3, slurm=broken), tmp_path)
    until("the end", lambda: over(run), 120, every_s=1)
    summary = run.summary()
    assert summary["state"] == "failed"
    assert re.search(
        r"3 failures in a row, 3 allowed; the last: its job is gone.*its output is in jobs/\w+", summary["reason"]
    )
    assert len(jobs(run)) == 3


def test_a_time_limit_that_leaves_no_time_to_work_is_refused(cluster: DevCluster, tmp_path: Path) -> None:
    short = {**QUICK["slurm"], "time_min": 1, "signal_delay_s": 60}
    with pytest.raises(SettingsError, match=r"slurm.time_min: 1 is too short: .* Set it to at least 2 minutes"):
        launch(settings("short", slurm=short), tmp_path)
    assert not (tmp_path / "runs/short").exists()
