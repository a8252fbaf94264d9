"""Query Slurm with read-only commands. `slurm_rules` evaluates the answers."""

from __future__ import annotations

import getpass
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.cluster.probe import Answer, ask_sbatch, job_names
from orchestrator.cluster.slurm import SlurmQueue, run_slurm
from orchestrator.doctor.limits import Accounting, Row, rows
from orchestrator.doctor.partition import Node, Partition, names_of, read_config, read_nodes, read_pairs

ASSOCIATION = ("Cluster", "Account", "User", "Partition", "MaxJobs", "MaxSubmit", "GrpJobs", "GrpSubmit", "DefaultQOS")
ACCOUNT = ("Account", "ParentName", "GrpJobs", "GrpSubmit")
QOS = ("Name", "MaxSubmitPU", "MaxSubmitPA", "GrpSubmit", "MaxJobsPU", "GrpJobs", "MaxTRESPU", "Flags")
# Columns whose name in sacctmgr's format= option (the value) differs from the heading that it prints (the key).
LONG = {
    "MaxSubmit": "MaxSubmitJobs", "GrpSubmit": "GrpSubmitJobs", "MaxSubmitPU": "MaxSubmitJobsPerUser",
    "MaxSubmitPA": "MaxSubmitJobsPerAccount", "MaxJobsPU": "MaxJobsPerUser", "MaxTRESPU": "MaxTRESPerUser",
}  # fmt: skip
DEEPEST = 10  # read at most this many levels of accounts


@dataclass(frozen=True, slots=True)
class SlurmFacts:
    """What Slurm reported."""

    version: str | None
    answers: bool  # whether Slurm answers; if not, only `version` and `answer` are known
    answer: Answer  # the answer of sbatch --test-only to the run's own script
    config: Mapping[str, str] = field(default_factory=dict)
    partitions: tuple[Partition, ...] = ()
    nodes: tuple[Node, ...] = ()
    accounting: Accounting | None = None  # None: slurmdbd does not answer
    others: int = 0  # how many queued jobs of the user belong to other runs or programs

    @property
    def has_slurmdbd(self) -> bool:
        return self.config.get("AccountingStorageType", "").endswith("slurmdbd")

    @property
    def limits_enforced(self) -> bool:
        enforced = self.config.get("AccountingStorageEnforce", "").lower().split(",")
        return bool({"limits", "safe", "all"} & set(enforced))


def has_slurm() -> bool:
    return shutil.which("sbatch") is not None


def ask_slurm(queue: SlurmQueue, run_name: str, workers: int) -> SlurmFacts:
    """Query Slurm. queue: made from the settings. Raises SettingsError if the settings' slurm_file can't be read."""
    version = (run_slurm(["sinfo", "--version"]) or "").strip() or None
    config = read_config(run_slurm(["scontrol", "show", "config"]))
    if not config:
        return SlurmFacts(version, False, ask_sbatch("#!/bin/sh\n"))  # sbatch's error message is the clearest
    partitions = tuple(map(read_pairs, (run_slurm(["scontrol", "-o", "show", "partition"]) or "").splitlines()))
    facts = SlurmFacts(
        version,
        True,
        ask_sbatch(queue.script(workers)),
        config,
        partitions,
        read_nodes(run_slurm(["sinfo", "-h", "-N", "-o", "%N|%T|%c|%m|%G|%R"])),
        others=sum(not name.startswith(f"orch-{run_name}-") for name in job_names() or ()),
    )
    asks_sacctmgr = facts.has_slurmdbd and shutil.which("sacctmgr") is not None
    if not asks_sacctmgr or run_slurm(["sacctmgr", "-nP", "show", "cluster", "format=Cluster"]) is None:
        return facts
    accounting = _accounting(queue.request.options, config.get("ClusterName", ""), partitions)
    return replace(facts, accounting=accounting)


def _accounting(options: Mapping[str, object], cluster: str, partitions: Sequence[Partition]) -> Accounting:
    user = getpass.getuser()
    users = [] if options.get("account") else _rows("user", ("DefaultAccount",), f"name={user}")
    account = str(options.get("account") or (users[0]["DefaultAccount"] if users else ""))
    partition = next(iter(names_of(options.get("partition"), partitions)), "")
    association = _association(user, account, cluster, partition)
    listed = {row["Name"]: row for row in _rows("qos", QOS)}
    default_qos = association.get("DefaultQOS", "") if association else ""
    partition_qos = next((row.get("QoS", "") for row in partitions if row.get("PartitionName") == partition), "")
    return Accounting(
        association,
        tuple(_ancestors(account, cluster)) if association else (),
        listed.get(str(options.get("qos") or default_qos or "normal")),
        listed.get(partition_qos),
    )


def _rows(what: str, columns: Sequence[str], *where: str) -> tuple[dict[str, str], ...]:
    asked = ",".join(LONG.get(column, column) for column in columns)
    condition = ["where", *where] if where else []
    return rows(run_slurm(["sacctmgr", "-nP", "show", what, *condition, f"format={asked}"]), columns)


def _association(user: str, account: str, cluster: str, partition: str) -> Row | None:
    """Return the user's association with the account: the one for this partition, else the one for all partitions."""
    where = [f"user={user}", f"account={account}", *([f"cluster={cluster}"] if cluster else [])]
    mine = [row for row in _rows("assoc", ASSOCIATION, *where) if row["Partition"] in ("", partition)]
    return max(mine, key=lambda row: row["Partition"] == partition, default=None)


def _ancestors(account: str, cluster: str) -> Iterator[Row]:
    """Yield the row of the account, then that of its parent, and so on."""
    for _ in range(DEEPEST):
        where = [f"account={account}", "user=", *([f"cluster={cluster}"] if cluster else [])]
        account_rows = _rows("assoc", ACCOUNT, *where) if account else ()
        if not account_rows:
            return
        yield account_rows[0]
        account = account_rows[0]["ParentName"]
