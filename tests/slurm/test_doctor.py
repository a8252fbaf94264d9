"""The doctor on a real cluster: its findings about valid and invalid settings, and its two-node test."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from devcluster import DevCluster, Shape, wait_for

from orchestrator.doctor import machine, partition
from orchestrator.doctor.examine import examine
from orchestrator.doctor.findings import Finding, exit_code
from orchestrator.doctor.locks import judge_counts
from orchestrator.locking import proof
from orchestrator.locking.proof import Tally

ORCH = Path(sys.executable).with_name("orch")
PROFILES = [{"name": "a", "learning_rate": 0.1}]

Look = Callable[..., list[Finding]]


@pytest.fixture
def look(cluster: DevCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Look:
    """Examine settings with these keys. By default they ask for no GPU, since the cluster's GPUs are not real."""
    good = machine.PythonFacts("3.11", dict.fromkeys(machine.PACKAGES, "1"), "12.4", ("GPU",))
    monkeypatch.setattr(machine, "look_at_python", lambda: good)  # it has its own tests, and takes seconds

    def look(two_nodes: bool = False, wait_s: float = 60, **keys: Any) -> list[Finding]:
        return examine(write(tmp_path, **keys), tmp_path / "runs", two_nodes, wait_s, say=lambda _line: None)

    return look


def write(folder: Path, **keys: Any) -> Path:
    slurm = {"gpus": 0, **keys.pop("slurm", {})}
    values = {"name": "fit", "training_profiles": PROFILES, "eon_lifetime": 60, "workers": 2, "slurm": slurm} | keys
    file = folder / "settings.json"
    file.write_text(json.dumps(values))
    return file


def of(findings: list[Finding], topic: str) -> list[Finding]:
    return [finding for finding in findings if finding.topic == topic]


def errors(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level == "error"]


# --- what Slurm says


def test_valid_settings_have_no_errors(look: Look) -> None:
    findings = look(slurm={"gpus": 1, "partition": "main", "account": "research", "qos": "normal"})
    assert errors(findings) == []
    levels = {
        topic: of(findings, topic)[0].level for topic in ("slurm", "accounting", "partition", "submission", "limits")
    }
    assert set(levels.values()) == {"ok"}, findings
    assert "22.05" in of(findings, "slurm")[0].what
    assert of(findings, "successors")[0].level == "note", "nobody has tried whether a node can submit"


def test_nothing_is_queued_and_nothing_is_left(look: Look, cluster: DevCluster, tmp_path: Path) -> None:
    look()
    assert cluster.squeue() == []
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_a_time_limit_that_is_too_long_says_what_to_change(look: Look) -> None:
    findings = look(eon_lifetime=3600, slurm={"partition": "short"})
    limit, refusal = of(findings, "time limit")[0], of(findings, "submission")[0]
    assert [limit.level, refusal.level, exit_code(findings)] == ["error", "error", 1]
    assert "62 min, and short allows 2 min" in limit.what
    assert "slurm.partition" in limit.do
    assert "main, low" not in limit.do, "low allows an hour"
    assert "main" in limit.do
    assert "lower eon_lifetime or set slurm.time_min" in refusal.what


@pytest.mark.parametrize(
    ("keys", "topic", "words"),
    [
        ({"slurm": {"partition": "closed"}}, "partition", "closed is INACTIVE"),
        ({"slurm": {"partition": "down"}}, "partition", "down is DOWN"),
        ({"slurm": {"partition": "nope"}}, "partition", "there is no partition nope"),
        ({"slurm": {"gpus": 3}}, "partition", "3 GPUs (at most 2)"),
        ({"slurm": {"account": "nope"}}, "submission", "slurm.account nope"),
        ({"slurm": {"qos": "nope"}}, "submission", "slurm.qos nope"),
        ({"workers": 1002}, "limits", "MaxArraySize=1001"),
        ({"slurm_file": "/nope.sbatch"}, "settings", "/nope.sbatch"),
    ],
)
def test_settings_that_the_cluster_can_not_fulfil_are_errors(
    look: Look, keys: dict[str, Any], topic: str, words: str
) -> None:
    found = errors(of(look(**keys), topic))
    assert len(found) == 1
    assert words in found[0].what


@pytest.mark.parametrize(
    ("qos", "workers", "level", "taken"),
    [
        ("one", 1, "warning", True),
        ("one", 2, "error", False),
        ("two", 1, "ok", True),
        ("two", 2, "warning", True),
        ("two", 3, "error", False),
        ("normal", 50, "ok", True),
    ],
)
def test_a_submit_limit_against_the_workers(look: Look, qos: str, workers: int, level: str, taken: bool) -> None:
    findings = look(workers=workers, slurm={"qos": qos})
    (limit,) = of(findings, "limits")
    assert limit.level == level
    assert not taken or of(findings, "submission")[0].level == "ok"


def test_other_jobs_of_the_user_count_against_a_limit(look: Look, cluster: DevCluster) -> None:
    cluster.sbatch("sleep 60", "--qos=two")
    (limit,) = of(look(workers=1, slurm={"qos": "two"}), "limits")
    assert limit.level == "warning"
    cluster.cancel_all()


def test_limits_of_an_account_are_found(look: Look, cluster: DevCluster) -> None:
    cluster.run(["sacctmgr", "-i", "modify", "account", "research", "set", "GrpSubmitJobs=5"])
    try:
        (limit,) = of(look(workers=3), "limits")
        assert (limit.level, "GrpSubmitJobs=5 of account research" in limit.what) == ("warning", True)
    finally:
        cluster.run(["sacctmgr", "-i", "modify", "account", "research", "set", "GrpSubmitJobs=-1"])


@pytest.mark.long
def test_a_stopped_controller_is_an_error_and_the_rest_is_reported(look: Look, cluster: DevCluster) -> None:
    cluster.stop_controller()  # a crash would bring back jobs of other tests
    findings = look(two_nodes=True)
    (slurm,) = errors(findings)
    assert slurm.topic == "slurm"
    assert "Unable to contact slurm controller" in slurm.what
    assert of(findings, "disk")


@pytest.mark.long
def test_nodes_that_are_down_are_seen(cluster: DevCluster, look: Look) -> None:
    cluster.run(["scontrol", "update", "NodeName=node[1-4]", "State=DRAIN", "Reason=test"])
    try:
        (found,) = of(look(), "partition")
        assert found.level == "warning"
        assert "4 drained" in found.what
    finally:
        cluster.run(["scontrol", "update", "NodeName=node[1-4]", "State=RESUME"])
        wait_for(lambda: set(cluster.node_states().values()) == {"idle"}, 90, "the nodes")


def test_the_nodes_that_sinfo_shows_can_be_read(cluster: DevCluster) -> None:
    nodes = partition.read_nodes(cluster.run(["sinfo", "-h", "-N", "-o", "%N|%T|%c|%m|%G|%R"]).stdout)
    main = [node for node in nodes if node.partition == "main"]
    assert [(node.name, node.cpus, node.memory_mb, node.gpus(None)) for node in main] == [
        (f"node{number}", 16, 128000, 2) for number in range(1, 5)
    ]


# --- the two-node test


def test_two_nodes_lose_no_update(look: Look, cluster: DevCluster, tmp_path: Path) -> None:
    findings = look(two_nodes=True)
    assert errors(findings) == []
    lock, database = of(findings, "lock test")
    for finding, name in ((lock, "file lock"), (database, "SQLite database")):
        assert finding.level == "ok"
        assert f"{name}, between node1 and node2: 600 updates, 0 lost; waits p50" in finding.what
    assert of(findings, "successors")[0].what == "jobs on node1 and node2 can queue their successors"
    assert "node1 and node2 and this machine see each other's files" in of(findings, "runs folder")[0].what
    assert of(findings, "locks")[0].level == "ok", "a local file system, and yet the nodes share it here"
    assert of(findings, "python on node1")[0].level == "ok"
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]
    assert cluster.squeue() == []


@pytest.mark.long
def test_without_a_lock_two_nodes_lose_updates_and_that_is_reported(cluster: DevCluster, tmp_path: Path) -> None:
    proof.prepare_file(tmp_path / "counter")
    script = tmp_path / "count.py"
    script.write_text(
        "import contextlib, dataclasses, json, os, pathlib, sys, time\n"
        "from orchestrator.locking import proof\n"
        "here, task = pathlib.Path(sys.argv[1]), os.environ['SLURM_PROCID']\n"
        "(here / f'ready-{task}').touch()\n"
        "while len(list(here.glob('ready-*'))) < 2: time.sleep(0.01)\n"
        "tally = proof.count_in_file(here / 'counter', contextlib.nullcontext(), 300, 60)\n"
        "(here / f'tally-{task}').write_text(json.dumps(dataclasses.asdict(tally)))\n"
    )
    command = f"srun {sys.executable} {script} {tmp_path}"
    job = cluster.sbatch(command, "--nodes=2", "--ntasks-per-node=1", f"--export=ALL,PYTHONPATH={ORCH.parents[2]}")
    assert cluster.wait_state(job, "COMPLETED", "FAILED", timeout_s=60) == "COMPLETED"
    tallies = [Tally(**json.loads((tmp_path / f"tally-{task}").read_text())) for task in range(2)]
    (finding,) = judge_counts("lock", tallies, proof.counted_in_file(tmp_path / "counter"), "between two nodes")
    assert finding.level == "error"
    assert "of 600 updates were lost: the lock does not work" in finding.what


@pytest.mark.long
def test_a_job_that_would_never_start_is_cancelled(look: Look, cluster: DevCluster) -> None:
    (found,) = of(look(two_nodes=True, slurm={"partition": "down"}), "two-node test")
    assert found.level == "warning"
    assert "it would never start: PartitionDown" in found.what
    assert cluster.squeue() == []


@pytest.mark.long
def test_a_job_that_waits_too_long_is_cancelled(look: Look, cluster: DevCluster) -> None:
    for node in cluster.node_names:
        cluster.sbatch("sleep 100", "--exclusive", f"--nodelist={node}")
    wait_for(lambda: [job["state"] for job in cluster.squeue()] == ["RUNNING"] * 4, 90, "the nodes to be taken")
    (found,) = of(look(two_nodes=True, wait_s=3), "two-node test")
    assert "it did not start within" in found.what
    assert not [job for job in cluster.squeue() if job["name"].startswith("orch-doctor")]
    cluster.cancel_all()


@pytest.mark.long
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("when", ["PENDING", "RUNNING"])
def test_a_signal_that_ends_the_doctor_ends_its_job(
    cluster: DevCluster, tmp_path: Path, number: signal.Signals, code: int, when: str
) -> None:
    keys: dict[str, Any] = {"slurm": {"partition": "down"}} if when == "PENDING" else {}
    file = write(tmp_path, **keys)
    doctor = subprocess.Popen(
        [str(ORCH), "doctor", str(file), "--two-node", "--runs-dir", str(tmp_path / "runs")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert doctor.stderr is not None
    try:
        wait_for(lambda: [job for job in cluster.squeue() if job["state"] == when], 90, f"the job to be {when}")
        os.killpg(doctor.pid, number)  # like a terminal, also signal the commands that the doctor runs
        assert doctor.wait(60) == code, doctor.stderr.read()
    finally:
        doctor.kill()
        doctor.wait()
        doctor.stderr.close()
    wait_for(lambda: not cluster.squeue(), 60, "the job to be gone")
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_one_node_no_accounting_and_missing_data(look: Look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with DevCluster.temporary(Shape(nodes=1, accounting=False)) as small:
        monkeypatch.setenv("SLURM_CONF", str(small.conf))
        findings = look(two_nodes=True, training_source_dir="/nowhere/train", testing_source_dir=str(tmp_path))
        assert small.squeue() == []
    assert [(found.topic, found.what) for found in errors(findings)] == [
        ("data", "/nowhere/train: can't be read on node1"),
        ("data", "/nowhere/train: can't be read here: No such file or directory"),
    ]
    assert of(findings, "accounting")[0].level == "note"
    assert "no two nodes are up" in of(findings, "two-node test")[0].what
    lock, database = of(findings, "lock test")
    assert "on node1 alone: 600 updates, 0 lost" in lock.what
    assert database.level == "ok"
    assert of(findings, "locks")[0].level == "warning", "one node proves nothing of two"


def test_the_command_prints_json_and_nothing_else(cluster: DevCluster, tmp_path: Path) -> None:
    done = subprocess.run(
        [str(ORCH), "doctor", str(write(tmp_path, workers=9, slurm={"qos": "two"})), "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    said = json.loads(done.stdout)
    assert (done.returncode, said["errors"]) == (1, 2), done.stdout
    assert {finding["topic"] for finding in said["findings"] if finding["level"] == "error"} == {"submission", "limits"}
