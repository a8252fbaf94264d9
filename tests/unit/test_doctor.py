"""The doctor's rules, as tables: facts in, findings out. And its counting, on this machine, with good and bad locks."""

from __future__ import annotations

import contextlib
import json
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cluster.probe import Answer
from orchestrator.cluster.sbatch import request
from orchestrator.doctor import locks, machine, node, partition, two_node
from orchestrator.doctor.examine import examine
from orchestrator.doctor.findings import Finding, exit_code, worst
from orchestrator.doctor.limits import (
    Limit,
    Standing,
    judge_cluster,
    judge_running,
    judge_submission,
    rows,
    run_limits,
    submit_limits,
)
from orchestrator.doctor.locks import judge_counts, lock_advice, quota_command
from orchestrator.doctor.machine import FolderFacts, PythonFacts
from orchestrator.doctor.partition import Need, Node
from orchestrator.doctor.slurm_facts import SlurmFacts
from orchestrator.doctor.slurm_rules import judge_slurm
from orchestrator.locking import proof
from orchestrator.locking.choice import Choice
from orchestrator.locking.flock import FairFileLock
from orchestrator.locking.mounts import Mount, mount_of
from orchestrator.locking.proof import Tally, percentile
from orchestrator.settings.settings import Settings

ORCH = Path(sys.executable).with_name("orch")


def levels(findings: list[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def one(findings: list[Finding], topic: str) -> Finding:
    (found,) = [finding for finding in findings if finding.topic == topic]
    return found


# --- findings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["note", "warning", "error"])
def test_a_finding_that_is_not_ok_says_what_to_do(level):
    with pytest.raises(ValueError, match="says what to do"):
        Finding(level, "disk", "full")
    assert Finding(level, "disk", "full", "free some").do


@pytest.mark.parametrize(
    ("given", "code", "most"),
    [([], 0, "ok"), (["ok", "note"], 0, "note"), (["ok", "warning"], 0, "warning"), (["error", "ok"], 1, "error")],
)
def test_only_errors_make_the_exit_code(given, code, most):
    findings = [Finding(level, "a", "b", "c") for level in given]
    assert (exit_code(findings), worst(findings)) == (code, most)


# --- mounts ------------------------------------------------------------------------------------------

MOUNTINFO = r"""
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro
25 22 0:23 / /dev/shm rw,nosuid,nodev shared:2 - tmpfs tmpfs rw,size=1024k
30 22 0:40 / /home rw,relatime shared:3 - autofs systemd-1 rw,fd=46,pgrp=1,timeout=0
31 22 0:41 / /home rw,relatime shared:4 master:1 - nfs4 nas:/home rw,vers=4.2,hard,proto=tcp,local_lock=none
32 22 0:42 / /old rw,relatime - nfs filer:/vol/old rw,vers=3,nolock,proto=tcp,local_lock=all
33 22 0:43 / /scratch rw,noatime shared:5 - lustre 10.0.0.1@o2ib:/fs1 rw,checksum,flock,user_xattr,lruresize
34 33 0:44 / /scratch/node\040local rw shared:6 - xfs /dev/nvme0n1 rw,attr2
35 22 0:45 / /gpfs rw,relatime shared:7 - gpfs gpfs0 rw
36 22 0:46 /vol /quiet rw -  tmpfs  rw
not a line of mountinfo
"""


@pytest.mark.parametrize(
    ("path", "point", "fstype"),
    [
        ("/", "/", "ext4"),
        ("/var/lib/runs", "/", "ext4"),
        ("/homework", "/", "ext4"),  # a beginning of a name is no folder
        ("/home/me/runs", "/home", "nfs4"),  # the last of two at one point hides the other
        ("/dev/shm", "/dev/shm", "tmpfs"),
        ("/old/x", "/old", "nfs"),
        ("/scratch/me", "/scratch", "lustre"),
        ("/scratch/node local/runs", "/scratch/node local", "xfs"),  # the longest, and \040 is a space
        ("/gpfs/project", "/gpfs", "gpfs"),
    ],
)
def test_a_path_is_on_the_mount_with_the_longest_point_above_it(path, point, fstype):
    mount = mount_of(MOUNTINFO, path)
    assert mount is not None
    assert (mount.point, mount.fstype) == (point, fstype)


def test_a_mount_has_the_options_of_the_mount_and_of_the_file_system():
    mount = mount_of(MOUNTINFO, "/scratch")
    assert mount == Mount(
        "/scratch",
        "lustre",
        "10.0.0.1@o2ib:/fs1",
        ("rw", "noatime", "checksum", "flock", "user_xattr", "lruresize"),
    )


@pytest.mark.parametrize("text", ["", "36 35 98:0 /mnt1", "nonsense - nonsense"])
def test_no_mount_is_found_where_there_is_none(text):
    assert mount_of(text, "/home") is None


def test_this_machine_s_own_mountinfo_can_be_read(tmp_path):
    mount = machine.mount_here(tmp_path)
    assert mount is not None
    assert tmp_path.is_relative_to(mount.point)


@pytest.mark.parametrize(
    ("fstype", "options", "level", "words"),
    [
        ("ext4", "rw,relatime", "note", "one machine"),
        ("tmpfs", "rw", "note", "one machine"),
        ("overlay", "rw", "note", "one machine"),
        ("nfs4", "rw,vers=4.2,local_lock=none", "ok", "NFS 4.2"),
        ("nfs4", "rw", "ok", "NFS 4"),
        ("nfs4", "rw,vers=4.1,local_lock=flock", "error", "local_lock=flock"),
        ("nfs4", "rw,vers=4.1,local_lock=posix", "ok", "NFS 4.1"),  # the lock around SQLite is flock
        ("nfs", "rw,vers=3,local_lock=none", "note", "lockd"),
        ("nfs", "rw,vers=3,nolock,local_lock=all", "error", "nolock"),
        ("nfs", "rw,nfsvers=3,nolock", "error", "one node only"),
        ("nfs", "rw,vers=4.0", "ok", "NFS 4.0"),
        ("lustre", "rw,flock", "ok", "flock"),
        ("lustre", "rw,localflock", "error", "localflock"),
        ("lustre", "rw,noflock", "error", "noflock"),
        ("lustre", "rw,lazystatfs", "warning", "no flock option"),
        ("gpfs", "rw", "note", "GPFS"),
        ("beegfs", "rw,cfgFile=/etc/beegfs/beegfs-client.conf", "warning", "tuneUseGlobalFileLocks"),
        ("ceph", "rw,acl", "ok", "CephFS"),
        ("cifs", "rw,vers=3.0,nobrl", "error", "nobrl"),
        ("smb3", "rw", "warning", "server"),
        ("afs", "rw", "warning", "AFS"),
        ("fuse.sshfs", "rw", "error", "no locks"),
        ("fuse.s3fs", "rw", "error", "no locks"),
        ("newfs", "rw", "warning", "does not know"),
    ],
)
def test_what_a_file_system_says_of_its_locks(fstype, options, level, words):
    finding = lock_advice(fstype, options.split(","))
    assert finding.level == level
    assert words in finding.what
    if level == "error":
        assert "PostgreSQL" in finding.do


@pytest.mark.parametrize(
    ("fstype", "command"), [("lustre", "lfs quota -hu $USER /work"), ("nfs4", "quota -s"), ("ext4", None)]
)
def test_how_a_quota_is_asked_for(fstype, command):
    assert quota_command(Mount("/work", fstype, "x", ())) == command


# --- limits ------------------------------------------------------------------------------------------

NO_LIMITS = {"Account": "lab", "MaxSubmit": "", "GrpSubmit": "", "MaxJobs": "", "GrpJobs": ""}


def qos(name: str = "normal", flags: str = "", **limits: str) -> dict[str, str]:
    return {"Name": name, "Flags": flags, **limits}


@pytest.mark.parametrize(
    ("standing", "limits"),
    [
        (Standing(), []),
        (Standing(NO_LIMITS), []),
        (Standing(NO_LIMITS | {"MaxSubmit": "10"}), ["MaxSubmitJobs=10 of account lab"]),
        # the QOS goes before the association, and the partition's QOS before the job's
        (
            Standing(NO_LIMITS | {"MaxSubmit": "10"}, job_qos=qos(MaxSubmitPU="4")),
            ["MaxSubmitJobsPerUser=4 of QOS normal"],
        ),
        (
            Standing(job_qos=qos(MaxSubmitPU="4"), partition_qos=qos("part", MaxSubmitPU="7")),
            ["MaxSubmitJobsPerUser=7 of QOS part"],
        ),
        (
            Standing(job_qos=qos(flags="OverPartQOS", MaxSubmitPU="4"), partition_qos=qos("part", MaxSubmitPU="7")),
            ["MaxSubmitJobsPerUser=4 of QOS normal"],
        ),
        (
            Standing(job_qos=qos(MaxSubmitPA="9", GrpSubmit="30")),
            ["MaxSubmitJobsPerAccount=9 of QOS normal", "GrpSubmitJobs=30 of QOS normal"],
        ),
        # an account's own limit, else that of an account above it
        (
            Standing(NO_LIMITS, ({"Account": "lab", "GrpSubmit": ""}, {"Account": "school", "GrpSubmit": "50"})),
            ["GrpSubmitJobs=50 of account school"],
        ),
        (Standing(job_qos=qos(MaxSubmitPU="0")), ["MaxSubmitJobsPerUser=0 of QOS normal"]),
    ],
)
def test_the_limits_that_apply(standing, limits):
    assert [str(limit) for limit in submit_limits(standing)] == limits


def test_limits_on_running_jobs_are_others_than_those_on_submitted_ones():
    standing = Standing(NO_LIMITS | {"MaxJobs": "3", "MaxSubmit": "10"}, job_qos=qos(MaxSubmitPU="4"))
    assert [str(limit) for limit in run_limits(standing)] == ["MaxJobs=3 of account lab"]


@pytest.mark.parametrize(
    ("limit", "workers", "others", "level"),
    [
        (1, 2, 0, "error"),
        (3, 4, 0, "error"),
        (0, 1, 0, "error"),
        (1, 1, 0, "warning"),
        (2, 2, 0, "warning"),
        (7, 4, 0, "warning"),
        (2, 1, 0, "ok"),
        (8, 4, 0, "ok"),
        (8, 4, 1, "warning"),  # 7 are left: less than twice
        (8, 4, 5, "warning"),  # 3 are left: no room, but only now
        (1000, 4, 5, "ok"),
    ],
)
def test_a_submit_limit_against_the_number_of_workers(limit, workers, others, level):
    findings = judge_submission([Limit(limit, "MaxSubmitJobs", "account lab")], workers, others, enforced=True)
    assert levels(findings) == [level]


def test_a_limit_that_is_too_small_for_successors_says_what_happens_then():
    (finding,) = judge_submission([Limit(5, "MaxSubmitJobsPerUser", "QOS two")], 4, 0, enforced=True)
    assert "submits its successor at its end" in finding.what
    assert "puts itself back into the queue" in finding.what
    assert "set workers to 2 at most" in finding.do


def test_a_limit_that_is_not_enforced_is_no_limit():
    (finding,) = judge_submission([Limit(1, "MaxSubmitJobs", "account lab")], 4, 0, enforced=False)
    assert finding.level == "ok"
    assert "does not enforce" in finding.what


@pytest.mark.parametrize(
    ("config", "workers", "expected"),
    [
        ({}, 10, []),
        ({"MaxArraySize": "1001", "MaxJobCount": "10000"}, 1001, []),
        ({"MaxArraySize": "1001"}, 1002, ["error"]),
        ({"MaxArraySize": "0"}, 1, []),  # no arrays here, and one worker needs none
        ({"MaxArraySize": "0"}, 2, ["error"]),
        ({"SchedulerParameters": "bf_interval=1,max_array_tasks=4"}, 5, ["error"]),
        ({"MaxJobCount": "9"}, 10, ["error"]),
        ({"MaxJobCount": "19"}, 10, ["warning"]),
        ({"MaxJobCount": "20"}, 10, []),
    ],
)
def test_what_the_whole_cluster_takes(config, workers, expected):
    assert levels(judge_cluster(config, workers)) == expected


@pytest.mark.parametrize(
    ("standing", "workers", "gpus", "expected"),
    [
        (Standing(), 4, 1, []),
        (Standing(NO_LIMITS | {"MaxJobs": "4"}), 4, 1, []),
        (Standing(NO_LIMITS | {"MaxJobs": "3"}), 4, 1, ["warning"]),
        (Standing(NO_LIMITS | {"MaxJobs": "0"}), 4, 1, ["error"]),
        (Standing(job_qos=qos(MaxTRESPU="cpu=64,gres/gpu=8")), 4, 2, []),
        (Standing(job_qos=qos(MaxTRESPU="cpu=64,gres/gpu=7")), 4, 2, ["warning"]),
        (Standing(job_qos=qos(MaxTRESPU="cpu=64,gres/gpu=7")), 4, 0, []),
        (Standing(job_qos=qos(MaxTRESPU="gres/gpu=1")), 1, 2, ["error"]),
    ],
)
def test_limits_on_what_runs_at_the_same_time(standing, workers, gpus, expected):
    assert levels(judge_running(standing, workers, gpus, enforced=True)) == expected
    assert judge_running(standing, workers, gpus, enforced=False) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, ()),
        ("", ()),
        ("lab||7\n", ({"a": "lab", "b": "", "c": "7"},)),
        ("a line of another kind\nlab|x|7\n", ({"a": "lab", "b": "x", "c": "7"},)),
    ],
)
def test_rows_of_sacctmgr(text, expected):
    assert rows(text, ("a", "b", "c")) == expected


# --- partition ---------------------------------------------------------------------------------------

SINFO = """\
node1|idle|16|128000|gpu:2|main
node2|mixed|64|512000|gpu:a100:4(S:0-1),gpu:h100:2(S:2)|big
node3|down*|16|128000|(null)|dead
"""
PARTITIONS = [
    {"PartitionName": "main", "Default": "YES", "State": "UP", "MaxTime": "UNLIMITED"},
    {"PartitionName": "short", "Default": "NO", "State": "UP", "MaxTime": "00:10:00"},
    {"PartitionName": "big", "Default": "NO", "State": "UP", "MaxTime": "2-00:00:00"},
    {"PartitionName": "dead", "Default": "NO", "State": "UP", "MaxTime": "1:00:00"},
    {"PartitionName": "off", "Default": "NO", "State": "INACTIVE", "MaxTime": "UNLIMITED"},
    {"PartitionName": "closed", "Default": "NO", "State": "UP", "MaxTime": "UNLIMITED", "AllocNodes": "login[1-2]"},
]
SHORT = Node("node1", "idle", 16, 128000, "gpu:2", "short")
CLOSED = Node("node1", "idle", 16, 128000, "gpu:2", "closed")
NODES = (*partition.read_nodes(SINFO), SHORT, CLOSED)


def settings(eon_lifetime: float = 2400, **slurm: Any) -> Settings:
    profiles = [{"name": "a", "learning_rate": 0.1}]
    return Settings.model_validate(
        {"name": "a", "training_profiles": profiles, "eon_lifetime": eon_lifetime, "slurm": slurm}
    )


def judged(wanted: str | None, eon_lifetime: float = 2400, **slurm: Any) -> list[Finding]:
    asked = request(settings(eon_lifetime, **slurm), None)
    return partition.judge_partition(wanted, PARTITIONS, NODES, asked, partition.need_of(asked, 1))


@pytest.mark.parametrize(
    ("wanted", "slurm", "level", "words"),
    [
        (None, {}, "ok", "main is up: 1 node, no time limit"),
        ("big", {"gres": "gpu:a100:4", "cpus": 64, "mem_gb": 500}, "ok", "at most 2880 min"),
        ("big", {"gres": "gpu:a100:5"}, "error", "5 a100 GPUs (at most 4)"),
        ("big", {"gpus": 6}, "ok", "big is up"),
        ("main", {"gpus": 3}, "error", "3 GPUs (at most 2)"),
        ("main", {"cpus": 17}, "error", "17 CPUs (at most 16)"),
        ("main", {"mem_gb": 126}, "error", "129024 MB of memory (at most 128000)"),
        ("nope", {}, "error", "there is no partition nope"),
        ("off", {}, "error", "off is INACTIVE"),
        ("short", {}, "error", "42 min, and short allows 10 min"),
        ("short", {"time_min": 10}, "ok", "at most 10 min"),
        ("dead", {"gpus": 0}, "warning", "1 down*"),
        ("closed", {}, "warning", "login[1-2] only"),
    ],
)
def test_does_a_job_fit_its_partition(wanted, slurm, level, words):
    findings = judged(wanted, **slurm)
    assert worst(findings) == level
    assert words in " ".join(finding.what for finding in findings)


def test_a_time_limit_that_is_too_long_says_what_to_change_and_where_it_would_fit():
    finding = one(judged("short"), "time limit")
    assert "lower eon_lifetime to 480 s" in finding.do
    assert "slurm.time_min (or slurm_file's --time) to 10" in finding.do
    assert "main, big, dead, closed" in finding.do


def test_of_several_partitions_one_that_fits_is_enough():
    findings = judged("short,main")
    assert worst(findings) == "warning"
    assert one(findings, "time limit").level == "warning"
    assert worst(judged("short,off")) == "error"


def test_no_default_partition_and_none_asked_for_is_an_error():
    asked = request(settings(), None)
    (finding,) = partition.judge_partition(None, PARTITIONS[1:], NODES, asked, Need(1, 0, 0))
    assert finding.level == "error"
    assert "slurm.partition" in finding.do


@pytest.mark.parametrize(
    ("options", "tasks", "need"),
    [
        ({}, 1, Need(1, 0, 0)),
        ({"gpus-per-node": 2, "cpus-per-task": 4, "mem": "8192M"}, 2, Need(8, 8192, 2)),
        ({"gpus": "a100:1", "mem": "32G"}, 1, Need(1, 32768, 1, "a100")),
        ({"gres": "gpu:h100:2,license:1"}, 1, Need(1, 0, 2, "h100")),
        ({"gres": "gpu"}, 1, Need(1, 0, 1)),
        ({"gres": "gpu:v100"}, 1, Need(1, 0, 1, "v100")),
        ({"gpus-per-task": "1"}, 4, Need(4, 0, 4)),
        ({"mem": "0"}, 1, Need(1, 0, 0)),
    ],
)
def test_what_a_job_asks_of_its_node(options, tasks, need):
    asked = request(settings(gpus=0, additional_parameters=options), None)
    assert partition.need_of(asked, tasks) == need


@pytest.mark.parametrize(
    ("gres", "kind", "count"),
    [
        ("(null)", None, 0),
        ("gpu:2", None, 2),
        ("gpu:2", "a100", 0),
        ("gpu:a100:4(S:0-1)", None, 4),
        ("gpu:a100:4(S:0-1),gpu:h100:2(S:2,3)", None, 6),
        ("gpu:a100:4(S:0-1),gpu:h100:2(S:2,3)", "h100", 2),
        ("craynetwork:4,gpu:1", None, 1),
    ],
)
def test_the_gpus_of_a_node(gres, kind, count):
    assert Node("n", "idle", 1, 1, gres, "p").gpus(kind) == count


@pytest.mark.parametrize(
    ("state", "away"),
    [("idle", False), ("mixed", False), ("down*", True), ("drained", True), ("idle~", False), ("idle*", True)],
)
def test_a_node_that_is_away(state, away):
    assert Node("n", state, 1, 1, "", "p").away is away


@pytest.mark.parametrize(
    ("time_min", "eon_lifetime", "expected"),
    [(None, 2400, []), (60, 2400, []), (30, 2400, ["note"]), (1, 2400, ["error"])],
)
def test_the_working_time_that_a_time_limit_leaves(time_min, eon_lifetime, expected):
    asked = request(settings(eon_lifetime, time_min=time_min), None)
    assert levels(partition.judge_working_time(eon_lifetime, asked)) == expected


def test_what_scontrol_prints_can_be_read():
    line = "PartitionName=main AllocNodes=ALL Default=YES QoS=N/A MaxTime=UNLIMITED State=UP TRES=cpu=64,gres/gpu=8"
    read = partition.read_pairs(line)
    assert (read["PartitionName"], read["QoS"], read["TRES"]) == ("main", "N/A", "cpu=64,gres/gpu=8")
    text = (
        "Configuration data as of 2026-01-01\nMaxArraySize            = 1001\nPrivateData = none\n\nSlurmctld is UP\n"
    )
    assert partition.read_config(text) == {"MaxArraySize": "1001", "PrivateData": "none"}


# --- what Slurm said ---------------------------------------------------------------------------------


def facts(**changes: Any) -> SlurmFacts:
    values = {
        "version": "slurm 23.11.1",
        "answers": True,
        "config": {
            "AccountingStorageType": "accounting_storage/slurmdbd",
            "AccountingStorageEnforce": "associations,limits",
        },
        "partitions": tuple(PARTITIONS),
        "nodes": NODES,
        "accounting_answers": True,
        "answer": Answer(True, ""),
        "standing": Standing(NO_LIMITS),
        "others": 0,
    }
    return SlurmFacts(**(values | changes))


def said_of(given: SlurmFacts, workers: int = 2, **slurm: Any) -> list[Finding]:
    asked = request(settings(**slurm), None)
    return judge_slurm(given, asked, partition.need_of(asked, 1), workers, 2400)


def test_a_cluster_that_fits_has_nothing_against_it():
    assert worst(said_of(facts())) == "ok"


@pytest.mark.parametrize(
    ("changes", "topic", "level", "words"),
    [
        ({"answers": False, "answer": Answer(False, "Zero Bytes")}, "slurm", "error", "Zero Bytes"),
        ({"config": {"AccountingStorageType": "accounting_storage/none"}}, "accounting", "note", "no accounting"),
        ({"config": {"AccountingStorageType": "(null)"}}, "accounting", "note", "no accounting"),
        ({"accounting_answers": False}, "accounting", "warning", "slurmdbd does not answer"),
        ({"answer": Answer(False, "Socket timed out on send/recv")}, "slurm", "error", "does not answer"),
        ({"answer": Answer(False, "allocation failure: Invalid qos")}, "submission", "error", "slurm.qos"),
        ({"answer": Answer(False, "error: something new")}, "submission", "error", "something new"),
    ],
)
def test_what_slurm_says(changes, topic, level, words):
    found = [finding for finding in said_of(facts(**changes)) if finding.topic == topic and finding.level != "ok"]
    assert levels(found) == [level]
    assert words in found[0].what


@pytest.mark.parametrize(
    ("enforce", "level"),
    [("associations,limits,qos", "error"), ("safe", "error"), ("ALL", "error"), ("associations", "ok"), ("none", "ok")],
)
def test_limits_count_where_they_are_enforced(enforce, level):
    config = {"AccountingStorageType": "accounting_storage/slurmdbd", "AccountingStorageEnforce": enforce}
    given = facts(config=config, standing=Standing(NO_LIMITS | {"MaxSubmit": "1"}))
    assert one(said_of(given), "limits").level == level


# --- this machine ------------------------------------------------------------------------------------

VERSIONS = dict.fromkeys(machine.PACKAGES, "1")
GOOD = PythonFacts("3.11.7", VERSIONS, "12.4", ("H200",))


@pytest.mark.parametrize(
    ("given", "listed", "expected", "levels_"),
    [
        (GOOD, 1, True, ["ok", "ok"]),
        (PythonFacts(error="ImportError: no torch"), 0, False, ["error"]),
        (PythonFacts("3.11.7", {"torch": "2"}, None), 0, False, ["ok", "error", "note"]),
        (PythonFacts("3.11.7", VERSIONS, None), 0, False, ["ok", "note"]),  # a login node
        (PythonFacts("3.11.7", VERSIONS, None), 2, False, ["ok", "warning"]),  # a CPU build beside GPUs
        (PythonFacts("3.11.7", VERSIONS, "12.4"), 2, False, ["ok", "warning"]),  # the driver is too old
        (PythonFacts("3.11.7", VERSIONS, "12.4"), 0, True, ["ok", "error"]),  # a job that asked for one
        (PythonFacts("3.11.7", VERSIONS, None), 0, True, ["ok", "error"]),
    ],
)
def test_the_python_environment(given, listed, expected, levels_):
    assert levels(machine.judge_python(given, listed, expected, "here")) == levels_


def folder(**changes: Any) -> FolderFacts:
    values = {
        "runs_dir": "/scratch/runs",
        "exists": True,
        "looked_at": "/scratch/runs",
        "writable": None,
        "mode": stat.S_IFDIR | 0o755,
        "mount": Mount("/work", "nfs4", "nas:/work", ("rw", "vers=4.2")),
        "free_bytes": 500 * machine.GIB,
        "free_files": 10**7,
        "lock_error": None,
    }
    return FolderFacts(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "ok"),
        ({"mode": stat.S_IFDIR | 0o775}, "ok"),
        ({"mode": stat.S_IFDIR | 0o777}, "warning"),
        ({"mode": stat.S_IFDIR | 0o1777}, "warning"),  # a runs folder that all may write to, sticky or not
        ({"mode": stat.S_IFDIR | 0o1777, "exists": False, "looked_at": "/tmp"}, "ok"),
        ({"mode": stat.S_IFDIR | 0o777, "exists": False, "looked_at": "/work"}, "warning"),
        ({"writable": "Permission denied"}, "error"),
    ],
)
def test_the_runs_folder(changes, expected):
    assert worst(machine.judge_folder(folder(**changes))) == expected


@pytest.mark.parametrize(
    ("free_gib", "files", "expected"),
    [(500, 10**7, "ok"), (19, 10**7, "warning"), (0.5, 10**7, "error"), (500, 9, "warning"), (500, None, "ok")],
)
def test_the_disk(free_gib, files, expected):
    assert worst(machine.judge_disk(folder(free_bytes=int(free_gib * machine.GIB), free_files=files))) == expected


def test_a_disk_with_room_tells_how_to_ask_for_the_quota():
    (finding,) = machine.judge_disk(folder())
    assert "quota -s" in finding.what


EXT4 = Mount("/", "ext4", "/dev/sda1", ("rw",))
BEEGFS = Mount("/bee", "beegfs", "beegfs_nodev", ("rw",))
LOCALFLOCK = Mount("/lustre", "lustre", "mgs:/fs", ("rw", "localflock"))


@pytest.mark.parametrize(
    ("changes", "slurm", "server", "proven", "expected"),
    [
        ({}, True, False, None, "ok"),
        ({"mount": EXT4}, False, False, None, "note"),
        ({"mount": EXT4}, True, False, None, "warning"),  # nodes of a cluster do not share it
        ({"mount": EXT4}, True, False, True, "ok"),  # they do, as these nodes are one machine
        ({"mount": BEEGFS}, True, False, None, "warning"),
        ({"mount": BEEGFS}, True, False, True, "ok"),
        ({"mount": BEEGFS}, True, False, False, "warning"),  # the test's own findings are the errors
        ({"mount": LOCALFLOCK}, True, False, None, "error"),
        ({"mount": LOCALFLOCK}, True, False, True, "error"),  # luck is no proof against what the mount says
        ({"mount": LOCALFLOCK}, True, True, None, "ok"),  # PostgreSQL needs no lock
        ({"mount": None}, True, False, None, "warning"),
        ({"lock_error": "a lock can't be taken: [Errno 38]"}, True, False, None, "error"),
        ({"mount": LOCALFLOCK, "lock": Choice("soft", "")}, True, False, None, "note"),  # flock is not needed
        ({"mount": BEEGFS, "lock": Choice("soft", "")}, True, False, None, "note"),
        ({"mount": LOCALFLOCK, "lock": Choice("flock", "")}, True, False, None, "error"),
    ],
)
def test_the_locks_of_the_runs_folder(changes, slurm, server, proven, expected):
    assert worst(machine.judge_locks(folder(**changes), slurm, server, proven)) == expected


def test_a_home_folder_that_is_full_is_a_warning():
    assert machine.judge_home(None).level == "ok"
    assert machine.judge_home("Disk quota exceeded").level == "warning"


def test_the_nearest_folder_is_the_one_itself_or_the_first_above_it(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    assert machine.nearest_folder(tmp_path) == tmp_path.resolve()
    assert machine.nearest_folder(tmp_path / "link" / "a" / "b") == tmp_path.resolve()


# --- counting ----------------------------------------------------------------------------------------


def count_together(work: Callable[[int], Tally], tasks: int = 2) -> list[Tally]:
    tallies: list[Tally] = []
    start = threading.Barrier(tasks)

    def run(task: int) -> None:
        start.wait()
        tallies.append(work(task))

    threads = [threading.Thread(target=run, args=[task]) for task in range(tasks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return tallies


def count_with(lock: Callable[[], AbstractContextManager[object]], path: Path, times: int = 100) -> list[Finding]:
    proof.prepare_file(path)
    tallies = count_together(lambda _task: proof.count_in_file(path, lock(), times, 60))
    return judge_counts("lock", tallies, proof.counted_in_file(path), "in two threads")


def test_a_lock_that_holds_loses_nothing(tmp_path):
    findings = count_with(lambda: FairFileLock(tmp_path / "lock"), tmp_path / "counter")
    assert "error" not in [finding.level for finding in findings], "how long the waits are is this machine's affair"
    assert proof.counted_in_file(tmp_path / "counter") == 200


def test_no_lock_at_all_loses_updates_and_that_is_found(tmp_path):
    (finding,) = count_with(contextlib.nullcontext, tmp_path / "counter")
    assert finding.level == "error"
    assert "updates were lost: the lock does not hold" in finding.what
    assert "PostgreSQL" in finding.do


def test_a_lock_that_fails_is_an_error_and_not_tried_for_ever(tmp_path):
    class Refusing:
        def __enter__(self) -> None:
            raise OSError(37, "No locks available")

        def __exit__(self, *_: object) -> None: ...

    proof.prepare_file(tmp_path / "counter")
    tally = proof.count_in_file(tmp_path / "counter", Refusing(), 100, 60)
    assert (tally.done, len(tally.errors)) == (0, proof.GIVE_UP_AFTER)
    (finding,) = judge_counts("lock", [tally], 0, "here")
    assert finding.level == "error"
    assert "No locks available" in finding.what


def test_the_database_loses_nothing(tmp_path):
    locks.prepare_database(tmp_path / "database")
    tallies = count_together(lambda _task: locks.count_in_database(tmp_path / "database", 20, 60))
    assert locks.counted_in_database(tmp_path / "database") == 40
    (finding,) = judge_counts("database", tallies, 40, "in two threads")
    assert finding.level == "ok"


def test_a_count_ends_when_its_time_is_over(tmp_path):
    proof.prepare_file(tmp_path / "counter")
    tally = proof.count_in_file(tmp_path / "counter", contextlib.nullcontext(), 10**6, 0.05)
    assert 0 < tally.done < 10**6
    (finding,) = judge_counts("lock", [tally], tally.done, "here")
    assert finding.level == "warning"
    assert "in time" in finding.what


def tally(done: int = 300, switches: int = 9, waits: tuple[float, ...] = (0.1,), errors: tuple[str, ...] = ()) -> Tally:
    return Tally("lock", 300, done, switches, waits, errors)


@pytest.mark.parametrize(
    ("tallies", "counted", "level", "words"),
    [
        ([tally(), tally()], 600, "ok", "600 updates, 0 lost"),
        ([tally(), tally()], 599, "error", "1 of 600 updates were lost"),
        ([tally(), tally(switches=0)], 600, "ok", "0 lost"),
        ([tally(switches=0), tally(switches=0)], 600, "warning", "nothing is proven"),
        ([tally(), tally(done=200)], 500, "warning", "only 500 of 600"),
        ([tally(), tally(done=299, errors=("LeaderboardError: database is locked",))], 599, "error", "locked"),
        ([tally(waits=(3.0,)), tally(waits=(3.0,))], 600, "warning", "waits are long"),
        ([tally(), tally()], "the database is damaged", "error", "damaged"),
    ],
)
def test_what_a_count_means(tallies, counted, level, words):
    findings = judge_counts("lock", tallies, counted, "between a and b")
    assert worst(findings) == level
    assert words in findings[0].what


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([], 0.5, 0.0), ([1.0], 0.99, 1.0), ([1.0, 2.0], 0.5, 1.0), (list(map(float, range(1, 101))), 0.99, 99.0)],
)
def test_percentiles(values, share, expected):
    assert percentile(values, share) == expected


def test_a_tally_survives_json():
    given = tally(waits=(0.25, 0.5), errors=("a",))
    assert Tally.from_json(json.loads(json.dumps(given.to_json()))) == given


# --- what the nodes reported -------------------------------------------------------------------------

NEEDS = two_node.Needs(settings(), "#!/bin/sh\n", (), None, gpu=True)


def report(task: int, **changes: Any) -> node.NodeReport:
    values = {
        "task": task,
        "host": f"n{task + 1}",
        "folder_seen": "",
        "written_sha256": "x",
        "mount": {"point": "/work", "fstype": "nfs4", "source": "nas:/", "options": ["vers=4.2"]},
        "can_submit": {"taken": True, "said": ""},
        "squeue": True,
        "met": True,
        "tallies": [tally().to_json(), tally().to_json() | {"kind": "database"}],
        "missing": [],
        "python": {"python": "3.11.7", "versions": VERSIONS, "built_for_cuda": "12.4", "gpus": ["H200"], "error": None},
        "done": True,
    }
    return node.NodeReport(**(values | changes))


def outcome(first: dict[str, Any] | None, second: dict[str, Any] | None, **changes: Any) -> two_node.TestOutcome:
    reports = (
        None if first is None else report(0, **first),
        None if second is None else report(1, **{"python": None} | second),
    )
    values = {
        "nodes": 2,
        "reports": reports,
        "counted_in_file": 600,
        "counted_in_database": 600,
        "came_back": ("", ""),
        "ended": "COMPLETED",
    }
    return two_node.TestOutcome(**(values | changes))


REFUSED = {"taken": False, "said": "sbatch: error: Access/permission denied"}
FULL = {"taken": False, "said": "sbatch: error: QOSMaxSubmitJobPerUserLimit"}


@pytest.mark.parametrize(
    ("given", "level", "topic", "words", "holds"),
    [
        (outcome({}, {}), "ok", "lock test", "0 lost", True),
        (outcome({}, {}, counted_in_file=590), "error", "lock test", "10 of 600 updates were lost", False),
        (outcome({}, {}, counted_in_database="damaged"), "error", "lock test", "damaged", False),
        (outcome({"can_submit": REFUSED}, {}), "warning", "successors", "permission denied", True),
        (outcome({"can_submit": FULL}, {}), "ok", "successors", "can queue their successors", True),
        (outcome({"squeue": False}, {}), "warning", "successors", "squeue does not answer", True),
        (outcome({"folder_seen": "No such file"}, {}), "error", "runs folder", "not the same", True),
        (outcome({}, {}, came_back=("", "from-task-1: gone")), "error", "runs folder", "from-task-1", True),
        (outcome({"met": False}, {"met": False}), "error", "runs folder", "did not see each other", None),
        (outcome({}, {"host": "n1"}), "warning", "two-node test", "both tasks were on n1", None),
        (outcome(None, None, ended="FAILED"), "error", "runs folder", "left nothing", None),
        (outcome(None, None, stopped="it did not start"), "warning", "two-node test", "did not start", None),
        (outcome({}, None, ended="TIMEOUT"), "error", "two-node test", "TIMEOUT", None),
        (outcome({}, {"done": False, "tallies": []}, ended="TIMEOUT"), "error", "two-node test", "on n2", None),
        (outcome({"missing": ["/data"]}, {}), "error", "data", "/data: can't be read on n1", True),
        (outcome({"database": "refused"}, {}), "error", "database", "on n1: refused", True),
        (outcome({"python": {"error": "no torch"}}, {}), "error", "python on n1", "no torch", True),
        (
            outcome({"mount": {"point": "/l", "fstype": "lustre", "source": "m:/", "options": ["localflock"]}}, {}),
            "error",
            "locks",
            "on n1: Lustre",
            True,
        ),
    ],
)
def test_what_the_nodes_reported(given, level, topic, words, holds):
    findings = two_node.judge(given, NEEDS)
    assert worst(findings) == level
    assert any(finding.topic == topic and words in finding.what for finding in findings), findings
    assert two_node.locks_hold(given) is holds


def test_a_node_that_can_t_submit_is_told_to_be_kept_from_a_login_node():
    findings = two_node.judge(outcome({"can_submit": REFUSED}, {}), NEEDS)
    assert "orch keep" in one(findings, "successors").do


def test_a_database_server_that_does_not_answer_says_why_without_the_password(tmp_path):
    said = node.database_error("postgresql+psycopg://me:secret@127.0.0.1:1/orch", tmp_path)
    assert said
    assert "secret" not in said
    assert node.database_error(f"sqlite:///{tmp_path}/none.db", tmp_path)


def test_a_report_survives_its_file(tmp_path):
    assert node.read_report(tmp_path, 0) is None
    given = report(0)
    node.report_path(tmp_path, 0).write_text(json.dumps(asdict(given)))
    back = node.read_report(tmp_path, 0)
    assert back is not None
    assert (back.host, back.of("lock"), back.mount_there()) == (given.host, given.of("lock"), given.mount_there())
    node.report_path(tmp_path, 0).write_text("{")
    assert node.read_report(tmp_path, 0) is None


# --- the whole, on a machine without Slurm -----------------------------------------------------------


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(ORCH.parent))


def test_without_slurm_the_rest_is_reported(no_slurm, tmp_path):
    done = subprocess.run(
        [str(ORCH), "doctor", "--json", "--runs-dir", str(tmp_path / "runs")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    said = json.loads(done.stdout)
    assert (done.returncode, said["errors"]) == (0, 0), done.stdout + done.stderr
    topics = {finding["topic"]: finding for finding in said["findings"]}
    assert topics["slurm"]["level"] == "note"
    assert {"settings", "slurm", "runs folder", "locks", "disk", "home", "python"} <= set(topics)
    assert all(finding["do"] for finding in said["findings"] if finding["level"] != "ok")
    assert list(tmp_path.iterdir()) == [], "the doctor leaves nothing behind"


def test_the_two_node_test_without_slurm_is_an_error(no_slurm, tmp_path):
    findings = examine(None, tmp_path, two_nodes=True, say=lambda _line: None)
    assert one(findings, "slurm").level == "error"
    assert exit_code(findings) == 1


def test_data_that_can_not_be_read_here_is_an_error_without_slurm_too(no_slurm, tmp_path):
    file = tmp_path / "settings.json"
    profiles = [{"name": "one", "learning_rate": 0.1}]
    where = {"training_source_dir": str(tmp_path), "testing_source_dir": str(tmp_path / "nowhere")}
    file.write_text(json.dumps({"training_profiles": profiles, "executor": "local"} | where))
    found = [f for f in examine(file, tmp_path, two_nodes=False, say=lambda _line: None) if f.topic == "data"]
    assert levels(found) == ["ok", "error"]
    assert found[1].what == f"{tmp_path / 'nowhere'}: can't be read here: No such file or directory"


def test_settings_that_are_wrong_are_a_finding_and_the_rest_is_looked_at(no_slurm, tmp_path):
    file = tmp_path / "wrong.json"
    file.write_text('{"workerz": 3}')
    findings = examine(file, tmp_path, two_nodes=False, say=lambda _line: None)
    wrong = [finding for finding in findings if finding.topic == "settings"]
    assert levels(wrong) == ["error"]
    assert "did you mean 'workers'?" in wrong[0].what
    assert "disk" in {finding.topic for finding in findings}


def test_a_runs_folder_that_can_t_be_written_is_an_error(no_slurm):
    findings = examine(None, Path("/proc/runs"), two_nodes=False, say=lambda _line: None)
    assert one(findings, "runs folder").level == "error"


def test_the_table_says_what_to_do(no_slurm, tmp_path):
    done = subprocess.run(
        [str(ORCH), "doctor", "--runs-dir", str(tmp_path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "->" in done.stdout
    assert "errors: 0" in done.stdout
