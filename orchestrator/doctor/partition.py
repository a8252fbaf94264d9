"""Check that a worker's job fits a partition: state, time limit and nodes. Pure functions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.cluster.sbatch import GRACE_S, Request, minutes
from orchestrator.doctor.findings import Finding, Level, worst
from orchestrator.messages import counted

TOPIC = "partition"
# sinfo's states of nodes that can't start jobs now but may do so later, without suffixes such as * (not responding).
AWAY = ("down", "drain", "drained", "draining", "fail", "failing", "inval", "maint", "unknown", "future", "reboot")
STATES = {
    "DOWN": "it accepts jobs but starts none",
    "DRAIN": "it accepts no new jobs and only finishes the jobs that it has",
    "INACTIVE": "it accepts no jobs",
}
Partition = Mapping[str, str]  # the KEY=VALUE pairs of one line of `scontrol -o show partition`


@dataclass(frozen=True, slots=True)
class Node:
    """One node of one partition, as sinfo shows it."""

    name: str
    state: str
    cpus: int
    memory_mb: int
    gres: str
    partition: str

    @property
    def away(self) -> bool:
        return self.state.rstrip("*~#!%$@^-+") in AWAY or self.state.endswith("*")

    def gpus(self, kind: str | None) -> int:
        """Return the number of the node's GPUs of type `kind`; None: of all types."""
        total = 0
        for part in re.sub(r"\([^)]*\)", "", self.gres).split(","):  # remove the cores from gpu:a100:4(S:0-1)
            name, *rest = part.strip().split(":")
            if name == "gpu" and rest and rest[-1].isdigit() and (kind is None or kind in rest[:-1]):
                total += int(rest[-1])
        return total


@dataclass(frozen=True, slots=True)
class Need:
    """The resources that a worker's job requests on one node; 0: none requested."""

    cpus: int
    memory_mb: int
    gpus: int
    gpu_kind: str | None = None

    def fits(self, node: Node) -> bool:
        enough = node.cpus >= self.cpus and node.memory_mb >= self.memory_mb
        return enough and (not self.gpus or node.gpus(self.gpu_kind) >= self.gpus)

    def missing(self, nodes: Sequence[Node]) -> str:
        """Describe the requested resources that none of these nodes has."""
        kind = f"{self.gpu_kind} " if self.gpu_kind else ""
        amounts = (
            (self.gpus, max(node.gpus(self.gpu_kind) for node in nodes), f"{kind}GPUs"),
            (self.cpus, max(node.cpus for node in nodes), "CPUs"),
            (self.memory_mb, max(node.memory_mb for node in nodes), "MB of memory"),
        )
        lacks = [f"{asked} {unit} (at most {most})" for asked, most, unit in amounts if asked > most]
        return " and ".join(lacks) or f"{self.gpus} GPUs, {self.cpus} CPUs and {self.memory_mb} MB together"


# --- reading


def read_nodes(text: str | None) -> tuple[Node, ...]:
    """Parse the output of sinfo -N -o '%N|%T|%c|%m|%G|%R'."""
    nodes = []
    for line in (text or "").splitlines():
        fields = line.split("|")
        if len(fields) == 6:
            cpus, memory = (int(re.match(r"[0-9]{0,18}", field)[0] or 0) for field in fields[2:4])  # type: ignore[index]
            nodes.append(Node(fields[0], fields[1], cpus, memory, fields[4], fields[5]))
    return tuple(nodes)


def read_pairs(line: str) -> dict[str, str]:
    """Parse a line of `scontrol -o show ...`: KEY=VALUE KEY=VALUE."""
    pairs = (word.partition("=") for word in line.split())
    return {key: value for key, equals, value in pairs if key and equals}


def read_config(text: str | None) -> dict[str, str]:
    """Parse the output of `scontrol show config`, which has KEY = VALUE on each line."""
    pairs = (line.partition(" = ") for line in (text or "").splitlines())
    return {key.strip(): value.strip() for key, equals, value in pairs if equals}


def need_of(request: Request, tasks: int) -> Need:
    """Return what the job requests on its node. tasks: the number of the job's tasks, all on one node."""
    options = request.options
    kind, gpus = _gpus_asked(options, tasks)
    return Need(tasks * _integer(options.get("cpus-per-task")), megabytes(options.get("mem")), gpus, kind)


def _gpus_asked(options: Mapping[str, object], tasks: int) -> tuple[str | None, int]:
    """Return (type, number) of the requested GPUs; sbatch accepts "2", "a100:2", or the gres "gpu:a100:2"."""
    for key, times in (("gpus-per-node", 1), ("gpus", 1), ("gpus-per-task", tasks)):
        if key in options:
            kind, count = _kind_and_count(str(options[key]))
            return kind, times * count
    for part in str(options.get("gres", "")).split(","):
        name, _, rest = part.removeprefix("gres/").replace("=", ":").partition(":")
        if name == "gpu":
            return _kind_and_count(rest or "1")
    return None, 0


def _kind_and_count(text: str) -> tuple[str | None, int]:
    words = text.split(",")[0].replace("=", ":").split(":")
    return next((word for word in words if not word.isdecimal()), None), _integer(words[-1])


def _integer(value: object) -> int:
    return int(str(value)) if re.fullmatch("[0-9]{1,9}", str(value)) else 1


def megabytes(value: object) -> int:
    """Convert the value of --mem (a number with K, M, G or T; default: M) to MB; 0 if the value is not valid."""
    match = re.fullmatch(r"([0-9]{1,15})([KMGT]?)B?", str(value), re.IGNORECASE)
    if not match:
        return 0
    return int(int(match[1]) * {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024**2}[match[2].upper()])


def max_minutes(partition: Partition) -> int | None:
    """Return the partition's MaxTime; None: no limit."""
    try:
        return minutes(partition.get("MaxTime", ""))
    except ValueError:
        return None  # UNLIMITED, INFINITE


def names_of(wanted: object, partitions: Sequence[Partition]) -> list[str]:
    """Return the partitions that a job may run in. wanted: comma-separated names; None for the default partition."""
    if wanted:
        return str(wanted).split(",")
    return [row["PartitionName"] for row in partitions if row.get("Default") == "YES" and "PartitionName" in row]


# --- findings


def judge_partition(
    wanted: object, partitions: Sequence[Partition], nodes: Sequence[Node], request: Request, need: Need
) -> list[Finding]:
    """Check the wanted partitions (see `names_of`). If the job fits one, the others' errors become warnings."""
    known = {partition["PartitionName"]: partition for partition in partitions if "PartitionName" in partition}
    judged = [
        _judge_one(name, known, [node for node in nodes if node.partition == name], request, need)
        for name in names_of(wanted, partitions)
    ]
    if not judged:
        what = "the settings name no partition, and the cluster has no default partition"
        return [Finding("error", TOPIC, what, _one_of(known))]
    if any(worst(findings) != "error" for findings in judged):
        judged = [[replace(f, level="warning") if f.level == "error" else f for f in findings] for findings in judged]
    return [finding for findings in judged for finding in findings]


def _one_of(known: Mapping[str, Partition]) -> str:
    return f"set slurm.partition to one of {', '.join(known) or '(you can see none)'}"


def _judge_one(
    name: str, known: Mapping[str, Partition], nodes: Sequence[Node], request: Request, need: Need
) -> list[Finding]:
    if name not in known:
        return [Finding("error", TOPIC, f"there is no partition {name}", _one_of(known))]
    findings = list(_problems(name, known, nodes, request, need))
    if worst(findings) in ("ok", "note"):
        limit = max_minutes(known[name])
        most = f"at most {limit} min" if limit else "no time limit"
        asked = [f"{request.time_min} min", counted(need.cpus, "CPU")]
        asked += [counted(need.gpus, "GPU")] if need.gpus else []
        asked += [f"{need.memory_mb} MB"] if need.memory_mb else []
        what = f"{name} is up: {counted(len(nodes), 'node')}, {most}; a job of {', '.join(asked)} fits"
        findings.insert(0, Finding("ok", TOPIC, what))
    return findings


def _problems(
    name: str, known: Mapping[str, Partition], nodes: Sequence[Node], request: Request, need: Need
) -> Iterator[Finding]:
    """Find problems with the partition's state, time limit, nodes and submit hosts. nodes: the partition's nodes."""
    row = known[name]
    others = [other for other, values in known.items() if values.get("State") == "UP" and other != name]
    if (state := row.get("State", "UP")) != "UP":
        do = f"use another slurm.partition ({', '.join(others) or 'none is up'}), or wait until it is up"
        yield Finding("error", TOPIC, f"{name} is {state}: {STATES.get(state, 'jobs may not start')}", do)
    limit = max_minutes(row)
    if limit is not None and request.time_min > limit:
        ways = []
        if (work_s := 60 * limit - GRACE_S - request.signal_delay_s) > 0:
            ways.append(f"lower eon_lifetime to {work_s} s and slurm.time_min (or slurm_file's --time) to {limit}")
        longer = [other for other in others if (most := max_minutes(known[other])) is None or most >= request.time_min]
        if longer:
            ways.append(f"use a slurm.partition with a higher limit ({', '.join(longer)})")
        what = f"jobs would have a time limit of {request.time_min} min, and {name} allows {limit} min (MaxTime)"
        do = ", or ".join(ways) or "lower slurm.time_min: no partition that is up allows this time"
        yield Finding("error", "time limit", what, do)
    fitting = [node for node in nodes if need.fits(node)]
    if not nodes:
        yield Finding("error", TOPIC, f"{name} has no nodes", "use another slurm.partition; `sinfo -s` lists them")
    elif not fitting:
        do = "ask for less (slurm.gpus, slurm.gres, slurm.cpus, slurm.mem_gb), or use another slurm.partition"
        yield Finding("error", TOPIC, f"no node of {name} has {need.missing(nodes)}", do)
    elif all(node.away for node in fitting):
        states = ", ".join(f"{count} {state}" for state, count in Counter(node.state for node in nodes).items())
        what = f"no node of {name} that could run a worker is up ({states})"
        yield Finding("warning", TOPIC, what, "jobs wait until one is up: use another slurm.partition, or wait")
    if (allowed := row.get("AllocNodes", "ALL")) not in ("ALL", ""):  # nodes that may submit jobs, often login nodes
        what = f"{name} only accepts jobs submitted from {allowed}: a job may not be able to queue its successor"
        do = f"`orch doctor --two-node` tests this; if jobs can't, run `orch keep RUN` on {allowed}"
        yield Finding("warning", "successors", what, do)


def judge_working_time(eon_lifetime_s: float, request: Request) -> list[Finding]:
    """Check that the time limit allows jobs to work for the whole eon_lifetime."""
    works_s = 60 * request.time_min - request.signal_delay_s
    if works_s >= eon_lifetime_s:
        return []
    what = (
        f"the time limit of {request.time_min} min ends jobs after {max(0, works_s)} s of work "
        f"(--signal {request.signal_delay_s} s before it), not after eon_lifetime {eon_lifetime_s:.0f} s"
    )
    needed_min = -(-int(eon_lifetime_s + GRACE_S + request.signal_delay_s) // 60)
    level: Level = "note" if works_s > 0 else "error"
    return [Finding(level, "time limit", what, f"set slurm.time_min to {needed_min}, or lower eon_lifetime")]
