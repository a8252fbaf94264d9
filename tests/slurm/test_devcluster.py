"""The development cluster behaves like a real cluster, and as the other tests in this folder expect."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import devcluster
import devcluster_processes
import pytest
from devcluster import DevCluster, DevClusterError, Shape, wait_for

SLURM = Path(devcluster.__file__).resolve().parents[1]
SMALL = Shape(nodes=1, accounting=False)
COMMAND = runpy.run_path(str(SLURM / "devcluster" / "__main__.py"))["main"]


# --- jobs


def test_a_job_runs_and_is_accounted_for(cluster: DevCluster) -> None:
    job = cluster.sbatch("echo on $SLURMD_NODENAME", "--job-name=hello", "--nodelist=node3")
    assert cluster.wait_state(job, "COMPLETED", "FAILED") == "COMPLETED"
    assert cluster.output(job) == "on node3\n"

    def accounted() -> bool:  # accounting is later than the queue, so a short job's row is incomplete at first
        return [(row["JobName"], row["State"]) for row in cluster.sacct("-j", str(job))] == [("hello", "COMPLETED")]

    wait_for(accounted, 90, "sacct to know the job")


def test_plain_clients_find_the_cluster_by_the_environment(cluster: DevCluster) -> None:
    sinfo = subprocess.run(["sinfo", "-h", "-o", "%R"], capture_output=True, text=True, check=True)
    assert sinfo.stdout.split() == ["main", "low", "short", "closed", "down"]


def test_jobs_find_the_cluster_by_the_environment(cluster: DevCluster) -> None:
    job = cluster.sbatch("sbatch --parsable --output=/dev/null --wrap true", "--export=NONE")
    cluster.wait_state(job, "COMPLETED")
    assert int(cluster.output(job)) > job


def test_jobs_on_one_node_get_different_gpus(cluster: DevCluster) -> None:
    script = "echo $CUDA_VISIBLE_DEVICES; sleep 60"
    jobs = [cluster.sbatch(script, "--gpus=1", "--nodelist=node1") for _ in range(2)]
    wait_for(lambda: all(cluster.output(job) for job in jobs), 90, "two jobs")
    waiting = cluster.sbatch(script, "--gpus=1", "--nodelist=node1")
    assert sorted(cluster.output(job).strip() for job in jobs) == ["0", "1"]
    assert cluster.state(waiting) == "PENDING"
    cluster.cancel_all()


def test_a_job_that_asks_for_no_gpu_sees_none(cluster: DevCluster) -> None:
    job = cluster.sbatch("echo [$CUDA_VISIBLE_DEVICES]")
    cluster.wait_state(job, "COMPLETED")
    assert cluster.output(job) == "[]\n"


@pytest.mark.parametrize("name", ["gpu.sbatch", "preemptible.sbatch", "cpu.sbatch"])
def test_the_ready_sbatch_files_are_accepted_and_run(cluster: DevCluster, name: str) -> None:
    script = (SLURM / name).read_text()
    job = cluster.sbatch(script + "scontrol show job $SLURM_JOB_ID\necho GPU=$CUDA_VISIBLE_DEVICES\n")
    assert cluster.wait_state(job, "COMPLETED", "FAILED") == "COMPLETED"
    assert "cpu=4" in cluster.output(job) if name == "cpu.sbatch" else "GPU=0" in cluster.output(job)


# --- preemption, crashes and time limits


def test_a_preempted_job_is_warned_and_can_go_back_to_the_queue(cluster: DevCluster) -> None:
    job = cluster.sbatch(
        "trap 'echo warned; scontrol requeue $SLURM_JOB_ID' USR2\n"
        "echo start $SLURM_RESTART_COUNT\n"
        "sleep 60 & wait; wait",
        "--partition=low",
        "--exclusive",
        "--nodelist=node1",
        "--signal=B:USR2@60",
    )
    wait_for(lambda: "start" in cluster.output(job), 90, "the job to run")
    better = cluster.sbatch("sleep 1", "--exclusive", "--nodelist=node1")
    cluster.wait_state(better, "COMPLETED")
    wait_for(lambda: "start 1" in cluster.output(job), 90, "the job to run again")
    assert [line for line in cluster.output(job).splitlines() if "slurmstepd" not in line] == [
        "start",
        "warned",
        "start 1",
    ]
    cluster.cancel_all()


@pytest.mark.long
def test_a_preempted_job_that_does_nothing_is_requeued_after_the_grace_time(cluster: DevCluster) -> None:
    job = cluster.sbatch("echo start $SLURM_RESTART_COUNT; sleep 90", "-p", "low", "--exclusive", "-w", "node1")
    wait_for(lambda: "start" in cluster.output(job), 90, "the job to run")
    better = cluster.sbatch("sleep 1", "--exclusive", "--nodelist=node1")
    cluster.wait_state(better, "COMPLETED", timeout_s=60)
    wait_for(lambda: "start 1" in cluster.output(job), 90, "the job to run again")
    assert "DUE TO PREEMPTION" in cluster.output(job)
    cluster.cancel_all()


def test_jobs_outlive_a_restart_of_the_controller(cluster: DevCluster) -> None:
    running = cluster.sbatch("sleep 60")
    cluster.wait_state(running, "RUNNING")
    held = cluster.sbatch("true", "--hold")
    cluster.stop_controller()
    assert not cluster.is_running("slurmctld")
    cluster.start_controller()
    assert {int(job["id"]): job["state"] for job in cluster.squeue()} == {running: "RUNNING", held: "PENDING"}
    cluster.cancel_all()


def test_saved_jobs_outlive_a_crash_of_the_controller(cluster: DevCluster) -> None:
    job = cluster.sbatch("sleep 60")
    cluster.wait_state(job, "RUNNING")
    cluster.wait_saved(job)
    cluster.kill_controller()
    refused = cluster.run(["sbatch", "--wrap", "true"], check=False)
    assert refused.returncode == 1
    assert "Unable to contact slurm controller" in refused.stderr
    cluster.start_controller()
    assert [(int(row["id"]), row["state"]) for row in cluster.squeue()] == [(job, "RUNNING")]
    cluster.cancel_all()


def test_a_job_is_requeued_when_its_node_dies_but_its_processes_may_live(cluster: DevCluster) -> None:
    job = cluster.sbatch("echo start $SLURM_RESTART_COUNT; sleep 60", "--nodelist=node2")
    wait_for(lambda: "start" in cluster.output(job), 90, "the job to run")
    cluster.kill_node("node2")
    assert cluster.node_states()["node2"] == "down"
    assert cluster.state(job) == "PENDING"
    assert [process.node for process in cluster.processes() if process.program == "job"] == ["node2", "node2"]
    cluster.start_node("node2")
    wait_for(lambda: cluster.output(job) == "start\nstart 1\n", 90, "the job to run again")
    wait_for(lambda: "NODE_FAIL" in [row["State"] for row in cluster.sacct("-j", str(job))], 90, "sacct")
    cluster.cancel_all()


def test_a_job_that_may_not_be_requeued_fails_with_its_node(cluster: DevCluster) -> None:
    job = cluster.sbatch("sleep 60", "--nodelist=node2", "--no-requeue")
    cluster.wait_state(job, "RUNNING")
    cluster.kill_node("node2", jobs=True)
    assert cluster.state(job) == "NODE_FAIL"
    assert not [process for process in cluster.processes() if process.node == "node2"]


@pytest.mark.long
def test_the_controller_notices_a_dead_node_by_itself(cluster: DevCluster) -> None:
    cluster.kill_node("node4", detect=True)
    assert cluster.node_states()["node4"].startswith("down")


@pytest.mark.usefixtures("slurm_packages")
def test_a_time_limit_comes_ten_times_sooner_by_a_fast_clock() -> None:
    try:
        devcluster_processes.check_packages(accounting=False, faketime=True)
    except DevClusterError as missing:
        pytest.skip(str(missing))
    with DevCluster.temporary(Shape(nodes=1, accounting=False, faketime="+0 x10")) as fast:
        begin = time.monotonic()
        job = fast.sbatch("sleep 300", "--time=1")
        fast.wait_state(job, "TIMEOUT", timeout_s=50)
        assert time.monotonic() - begin < 50


# --- refusals

REFUSALS = {
    "partition": (["--partition=nowhere"], "invalid partition specified: nowhere"),
    "account": (["--account=nobody"], "Invalid account or account/partition combination specified"),
    "qos": (["--qos=nothing"], "Invalid qos specification"),
    "time": (["--partition=short", "--time=10"], "Requested time limit is invalid (missing or exceeds some limit)"),
    "nodes": (["--nodes=5"], "Node count specification invalid"),
    "node name": (["--nodelist=node9"], "Invalid node name specified"),
    "CPUs of a task": (["--cpus-per-task=17"], "Requested node configuration is not available"),
    "CPUs": (["--ntasks=65"], "More processors requested than permitted"),
    "GPUs of a node": (["--gpus-per-node=3"], "Requested node configuration is not available"),
    "GPU type": (["--gpus=h100:1"], "Requested node configuration is not available"),
    "gres": (["--gres=tpu:1"], "Invalid generic resource (gres) specification"),
    "memory": (["--mem=200G"], "Memory specification can not be satisfied"),
    "feature": (["--constraint=a100"], "Invalid feature specification"),
    "array": (["--array=0-1001"], "Invalid job array specification"),
    "dependency": (["--dependency=afterany:nothing"], "Job dependency problem"),
    "closed": (["--partition=closed"], "Required partition not available (inactive or drain)"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_sbatch_refuses_with_its_usual_messages(cluster: DevCluster, what: str) -> None:
    options, words = REFUSALS[what]
    refused = cluster.run(["sbatch", "--output=/dev/null", *options, "--wrap", "true"], check=False)
    print(f"{' '.join(options)} | {refused.returncode} | {refused.stderr.strip()}")
    assert refused.returncode == 1
    assert words in refused.stderr


def test_a_dependency_on_an_unknown_job_delays_nothing(cluster: DevCluster) -> None:
    job = cluster.sbatch("true", "--dependency=afterany:99999999")
    assert cluster.wait_state(job, "COMPLETED", "FAILED") == "COMPLETED"


@pytest.mark.parametrize(("qos", "limit"), [("one", 1), ("two", 2)])
def test_a_qos_limits_how_many_jobs_a_user_has(cluster: DevCluster, qos: str, limit: int) -> None:
    for _ in range(limit):
        cluster.sbatch("true", f"--qos={qos}", "--hold")
    with pytest.raises(DevClusterError) as refused:
        cluster.sbatch("true", f"--qos={qos}", "--hold")
    print(refused.value)
    words = "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
    assert words in str(refused.value)
    assert len(cluster.squeue()) == limit
    cluster.cancel_all()


def test_a_partition_that_is_down_takes_jobs_and_does_not_start_them(cluster: DevCluster) -> None:
    job = cluster.sbatch("true", "--partition=down")
    wait_for(lambda: [row["reason"] for row in cluster.squeue()] == ["PartitionDown"], 90, "a reason")
    assert cluster.state(job) == "PENDING"
    cluster.cancel_all()


# --- the cluster itself


def test_clusters_run_side_by_side_and_leave_nothing_behind(cluster: DevCluster) -> None:
    with DevCluster.temporary(SMALL) as other:
        job = other.sbatch("trap '' TERM; sleep 300")
        other.wait_state(job, "RUNNING")
        assert not cluster.squeue()
        assert {process.pid for process in other.processes()}.isdisjoint(process.pid for process in cluster.processes())
    assert not other.processes()
    assert not other.folder.exists()


@pytest.mark.usefixtures("slurm_packages")
def test_a_stopped_cluster_keeps_its_state() -> None:
    with DevCluster.temporary(Shape(nodes=1)) as stopped:
        job = stopped.sbatch("true")
        stopped.wait_state(job, "COMPLETED")
        stopped.stop()
        assert not stopped.processes()
        again = DevCluster(stopped.folder)
        assert again.shape == stopped.shape
        again.start()
        assert again.state(job) == "COMPLETED"
        wait_for(lambda: again.sacct("-j", str(job)), 90, "sacct")
        assert again.sbatch("true", "--hold") > job
        again.stop()


@pytest.mark.usefixtures("slurm_packages")
def test_an_abandoned_cluster_is_wiped_by_the_next() -> None:
    program = """
import os, signal, devcluster
with devcluster.DevCluster.temporary(devcluster.Shape(nodes=1, accounting=False)) as cluster:
    print(cluster.folder, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    folder = Path(devcluster.__file__).parent
    killed = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    abandoned = DevCluster(killed.stdout.strip())
    assert abandoned.is_running("slurmctld")
    with DevCluster.temporary(SMALL):
        assert not abandoned.processes()
        assert not abandoned.folder.exists()


def test_only_processes_of_the_cluster_belong_to_it(cluster: DevCluster) -> None:
    log = cluster.folder / "log" / "slurmctld.log"
    environment = cluster.env() | {"SLURM_JOB_ID": "1"}  # as in a job
    with subprocess.Popen(["tail", "-f", log], env=environment, stdout=subprocess.DEVNULL) as reader:
        pids = {process.pid for process in cluster.processes()}
        reader.kill()
    assert reader.pid not in pids
    assert os.getpid() not in pids


@pytest.mark.usefixtures("slurm_packages")
def test_a_daemon_that_cannot_start_says_why() -> None:
    with DevCluster.temporary(SMALL) as cluster:
        cluster.stop_controller()
        (cluster.folder / "etc" / "slurm.conf").write_text("ClusterName=devcluster\nNonsense=1\n")
        with pytest.raises(DevClusterError, match=r"slurmctld ended at once(.|\n)*Nonsense"):
            cluster.start_controller()


def test_missing_packages_are_named_with_the_line_that_installs_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(devcluster_processes, "DAEMON_PATH", str(tmp_path))
    assert COMMAND(["up", "--folder", "/tmp/orch-devcluster-never"]) == 2
    message = capsys.readouterr().err
    assert "apt-get install -y mariadb-server munge slurm-client slurmctld slurmd slurmdbd" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("folder", ["/tmp/" + "x" * 60, "/tmp/a folder"])
def test_a_folder_that_sockets_cannot_have_is_refused(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMAND(["up", "--folder", folder]) == 1
    assert "at most 60 letters" in capsys.readouterr().err


def test_only_a_clusters_folder_is_wiped() -> None:
    with tempfile.TemporaryDirectory() as folder:
        thesis = Path(folder, "thesis.tex")
        thesis.write_text("")
        with pytest.raises(DevClusterError, match="is not deleted"):
            DevCluster(folder).wipe()
        assert thesis.exists()
