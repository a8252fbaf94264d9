"""Slurm's answers compared with what the settings ask for, as tables."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.cluster.probe import Answer
from orchestrator.cluster.sbatch import request
from orchestrator.doctor import partition
from orchestrator.doctor.findings import Finding, worst
from orchestrator.doctor.limits import Accounting
from orchestrator.doctor.partition import Need, Node
from orchestrator.doctor.slurm_facts import SlurmFacts
from orchestrator.doctor.slurm_rules import judge_slurm
from tests.support.doctoring import levels, one, settings

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
        ("closed", {}, "warning", "only accepts jobs submitted from login[1-2]"),
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


# --- findings about Slurm's answers

NO_LIMITS = {"Account": "lab", "MaxSubmit": "", "GrpSubmit": ""}


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
        "answer": Answer(True, ""),
        "accounting": Accounting(NO_LIMITS),
        "others": 0,
    }
    return SlurmFacts(**(values | changes))


def said_of(given: SlurmFacts, workers: int = 2, **slurm: Any) -> list[Finding]:
    asked = request(settings(**slurm), None)
    return judge_slurm(given, asked, partition.need_of(asked, 1), workers, 2400)


def test_a_cluster_that_fits_has_only_ok_findings():
    assert worst(said_of(facts())) == "ok"


@pytest.mark.parametrize(
    ("changes", "topic", "level", "words"),
    [
        ({"answers": False, "answer": Answer(False, "Zero Bytes")}, "slurm", "error", "Zero Bytes"),
        ({"config": {"AccountingStorageType": "accounting_storage/none"}}, "accounting", "note", "no accounting"),
        ({"config": {"AccountingStorageType": "(null)"}}, "accounting", "note", "no accounting"),
        ({"accounting": None}, "accounting", "warning", "slurmdbd does not answer"),
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
    given = facts(config=config, accounting=Accounting(NO_LIMITS | {"MaxSubmit": "1"}))
    assert one(said_of(given), "limits").level == level
