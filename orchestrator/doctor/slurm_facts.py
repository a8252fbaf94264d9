"""Ask Slurm. Nothing is judged here, and nothing is changed: every command only shows something."""

from __future__ import annotations

import getpass
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.cluster.probe import Answer, ask_sbatch, job_names
from orchestrator.cluster.slurm import SlurmQueue, run_slurm
from orchestrator.doctor.limits import Row, Standing, rows
from orchestrator.doctor.partition import Node, read_config, read_nodes, read_pairs

ASSOCIATION = ("Cluster", "Account", "User", "Partition", "MaxJobs", "MaxSubmit", "GrpJobs", "GrpSubmit", "DefaultQOS")
ACCOUNT = ("Account", "ParentName", "GrpJobs", "GrpSubmit")
QOS = ("Name", "MaxSubmitPU", "MaxSubmitPA", "GrpSubmit", "MaxJobsPU", "GrpJobs", "MaxTRESPU", "Flags")
# sacctmgr knows columns by the beginnings of these names.
LONG = {
    "MaxSubmit": "MaxSubmitJobs", "GrpSubmit": "GrpSubmitJobs", "MaxSubmitPU": "MaxSubmitJobsPerUser",
    "MaxSubmitPA": "MaxSubmitJobsPerAccount", "MaxJobsPU": "MaxJobsPerUser", "MaxTRESPU": "MaxTRESPerUser",
}  # fmt: skip
DEEPEST = 10  # accounts under accounts


@dataclass(frozen=True, slots=True)
class SlurmFacts:
    """What Slurm said; None where it said nothing."""

    version: str | None
    answers: bool
    config: Mapping[str, str]
    partitions: tuple[Mapping[str, str], ...]
    nodes: tuple[Node, ...]
    accounting_answers: bool
    answer: Answer | None  # of sbatch --test-only to the run's own script
    standing: Standing
    others: int  # the user's jobs in the queue that are not this run's

    @property
    def accounting(self) -> bool:
        """Does this cluster have slurmdbd?"""
        return self.config.get("AccountingStorageType", "").endswith("slurmdbd")

    @property
    def limits_enforced(self) -> bool:
        enforced = self.config.get("AccountingStorageEnforce", "").lower().split(",")
        return bool({"limits", "safe", "all"} & set(enforced))


def has_slurm() -> bool:
    return shutil.which("sbatch") is not None


def ask_slurm(cluster: SlurmQueue, run_name: str, workers: int) -> SlurmFacts:
    """cluster: with the settings' request. Raises SettingsError if its slurm_file can't be read."""
    version = run_slurm(["sinfo", "--version"])
    config = read_config(run_slurm(["scontrol", "show", "config"]))
    if not config:
        why = ask_sbatch("#!/bin/sh\n")  # its words are the clearest
        return SlurmFacts(_stripped(version), False, {}, (), (), False, why, Standing(), 0)
    partitions = tuple(
        read_pairs(line) for line in (run_slurm(["scontrol", "-o", "show", "partition"]) or "").splitlines()
    )
    nodes = read_nodes(run_slurm(["sinfo", "-h", "-N", "-o", "%N|%T|%c|%m|%G|%R"]))
    answer = ask_sbatch(cluster.script(workers))
    answers, standing = False, Standing()
    if config.get("AccountingStorageType", "").endswith("slurmdbd") and shutil.which("sacctmgr"):
        answers = run_slurm(["sacctmgr", "-nP", "show", "cluster", "format=Cluster"]) is not None
        if answers:
            standing = _standing(cluster.request.options, config.get("ClusterName", ""), partitions)
    others = sum(not name.startswith(f"orch-{run_name}-") for name in job_names() or ())
    return SlurmFacts(_stripped(version), True, config, partitions, nodes, answers, answer, standing, others)


def _stripped(text: str | None) -> str | None:
    return text.strip() if text else None


def _standing(options: Mapping[str, object], cluster: str, partitions: Sequence[Mapping[str, str]]) -> Standing:
    user = getpass.getuser()
    account = str(options.get("account") or _shown("user", ("DefaultAccount",), f"name={user}", "DefaultAccount"))
    default = next((row.get("PartitionName", "") for row in partitions if row.get("Default") == "YES"), "")
    partition = str(options.get("partition") or default).split(",")[0]
    association = _association(user, account, cluster, partition)
    listed = {row["Name"]: row for row in _rows("qos", QOS)}
    default_qos = association.get("DefaultQOS", "") if association else ""
    partition_qos = next((row.get("QoS", "") for row in partitions if row.get("PartitionName") == partition), "")
    return Standing(
        association,
        _ancestors(account, cluster) if association else (),
        listed.get(str(options.get("qos") or default_qos or "normal")),
        listed.get(partition_qos),
    )


def _rows(what: str, columns: Sequence[str], *where: str) -> tuple[dict[str, str], ...]:
    shown = ",".join(LONG.get(column, column) for column in columns)
    return rows(
        run_slurm(["sacctmgr", "-nP", "show", what, *(["where", *where] if where else []), f"format={shown}"]), columns
    )


def _shown(what: str, columns: Sequence[str], where: str, column: str) -> str:
    found = _rows(what, columns, where)
    return found[0][column] if found else ""


def _association(user: str, account: str, cluster: str, partition: str) -> Row | None:
    """That of the partition goes before that of all partitions."""
    where = [f"user={user}", f"account={account}", *([f"cluster={cluster}"] if cluster else [])]
    mine = [row for row in _rows("assoc", ASSOCIATION, *where) if row["Partition"] in ("", partition)]
    return max(mine, key=lambda row: row["Partition"] == partition, default=None)


def _ancestors(account: str, cluster: str) -> tuple[Row, ...]:
    """The account's own row and those above it."""
    found: list[Row] = []
    while account and len(found) < DEEPEST:
        where = [f"account={account}", "user=", *([f"cluster={cluster}"] if cluster else [])]
        above = _rows("assoc", ACCOUNT, *where)
        if not above:
            break
        found.append(above[0])
        account = above[0]["ParentName"]
    return tuple(found)
