"""Whether a worker's job fits a partition: its state, its time limit, its nodes. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.cluster.sbatch import GRACE_S, Request, minutes
from orchestrator.doctor.findings import Finding, Level, worst
from orchestrator.messages import counted

TOPIC = "partition"
# sinfo's words for nodes that run no job now, and may again; a suffix such as * or ~ tells more.
AWAY = ("down", "drain", "drained", "draining", "fail", "failing", "inval", "maint", "unknown", "future", "reboot")


@dataclass(frozen=True, slots=True)
class Node:
    """What sinfo says of one node of one partition."""

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
        """Of that kind; None: of all kinds."""
        without_cores = re.sub(r"\([^)]*\)", "", self.gres)
        total = 0
        for part in without_cores.split(","):
            name, *rest = part.strip().split(":")
            if name == "gpu" and rest and rest[-1].isdigit() and (kind is None or kind in rest[:-1]):
                total += int(rest[-1])
        return total


@dataclass(frozen=True, slots=True)
class Need:
    """What one worker's job asks of one node; 0 is nothing."""

    cpus: int
    memory_mb: int
    gpus: int
    gpu_kind: str | None = None


def read_nodes(text: str | None) -> tuple[Node, ...]:
    """Of sinfo -N -o '%N|%T|%c|%m|%G|%R'."""
    found = []
    for line in (text or "").splitlines():
        fields = line.split("|")
        if len(fields) == 6:
            cpus, memory = (int(re.match(r"[0-9]{0,18}", field)[0] or 0) for field in fields[2:4])  # type: ignore[index]
            found.append(Node(fields[0], fields[1], cpus, memory, fields[4], fields[5]))
    return tuple(found)


def read_pairs(line: str) -> dict[str, str]:
    """Of one line of `scontrol -o show ...`: KEY=VALUE KEY=VALUE."""
    found = (word.partition("=") for word in line.split())
    return {key: value for key, equals, value in found if key and equals}


def read_config(text: str | None) -> dict[str, str]:
    """Of `scontrol show config`: a line each, KEY = VALUE."""
    lines = (line.partition(" = ") for line in (text or "").splitlines())
    return {key.strip(): value.strip() for key, equals, value in lines if equals}


def need_of(request: Request, tasks: int) -> Need:
    """tasks: of the job, all on one node."""
    options = request.options
    kind, gpus = _gpus_asked(options, tasks)
    return Need(tasks * _integer(options.get("cpus-per-task")), megabytes(options.get("mem")), gpus, kind)


def _gpus_asked(options: Mapping[str, object], tasks: int) -> tuple[str | None, int]:
    """(kind, number) of "2", "a100:2", and of gres "gpu:a100:2"."""
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
    count = _integer(words[-1])
    kinds = [word for word in words if not word.isdecimal()]
    return (kinds[0] if kinds else None), count


def _integer(value: object) -> int:
    return int(str(value)) if re.fullmatch("[0-9]{1,9}", str(value)) else 1


def megabytes(value: object) -> int:
    """Of --mem: a number with K, M, G or T; M if there is none. 0 for what can't be read."""
    match = re.fullmatch(r"([0-9]{1,15})([KMGT]?)B?", str(value), re.IGNORECASE)
    if not match:
        return 0
    return int(int(match[1]) * {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024**2}[match[2].upper()])


def max_minutes(partition: Mapping[str, str]) -> int | None:
    """Of MaxTime; None: no limit."""
    try:
        return minutes(partition.get("MaxTime", ""))
    except ValueError:
        return None  # UNLIMITED, INFINITE


def judge_partition(
    wanted: str | None, partitions: Sequence[Mapping[str, str]], nodes: Sequence[Node], request: Request, need: Need
) -> list[Finding]:
    """wanted: the partition's name, several with commas, None for the default one. Of several, one that fits
    is enough to start a job, so the faults of the others are warnings then."""
    known = {partition["PartitionName"]: partition for partition in partitions if "PartitionName" in partition}
    names = wanted.split(",") if wanted else [name for name, row in known.items() if row.get("Default") == "YES"]
    if not names:
        do = f"set slurm.partition to one of {', '.join(known) or '(none is shown to you)'}"
        return [Finding("error", TOPIC, "no partition is asked for, and the cluster has no default one", do)]
    judged = [_judge_one(name, known, nodes, request, need) for name in names]
    if any(worst(findings) != "error" for findings in judged):
        judged = [[_softer(finding) for finding in findings] for findings in judged]
    return [finding for findings in judged for finding in findings]


def _softer(finding: Finding) -> Finding:
    return replace(finding, level="warning") if finding.level == "error" else finding


def _judge_one(
    name: str, known: Mapping[str, Mapping[str, str]], nodes: Sequence[Node], request: Request, need: Need
) -> list[Finding]:
    row = known.get(name)
    if row is None:
        do = f"set slurm.partition to one of {', '.join(known) or '(none is shown to you)'}"
        return [Finding("error", TOPIC, f"there is no partition {name}", do)]
    mine = [node for node in nodes if node.partition == name]
    checks = (
        _state(name, row, known),
        _time(name, row, request, known),
        _nodes(name, mine, need),
        _submitters(name, row),
    )
    found = [finding for finding in checks if finding]
    if worst(found) in ("ok", "note"):
        limit = max_minutes(row)
        most = f"at most {limit} min" if limit else "no time limit"
        found.insert(
            0, Finding("ok", TOPIC, f"{name} is up: {counted(len(mine), 'node')}, {most}; {_asked(request, need)} fits")
        )
    return found


def _asked(request: Request, need: Need) -> str:
    parts = [f"{request.time_min} min", counted(need.cpus, "CPU")]
    parts += [counted(need.gpus, "GPU")] if need.gpus else []
    parts += [f"{need.memory_mb} MB"] if need.memory_mb else []
    return "a job of " + ", ".join(parts)


def _state(name: str, row: Mapping[str, str], known: Mapping[str, Mapping[str, str]]) -> Finding | None:
    state = row.get("State", "UP")
    if state == "UP":
        return None
    means = {
        "DOWN": "it takes jobs and starts none",
        "DRAIN": "it takes no jobs, and finishes those it has",
        "INACTIVE": "it takes no jobs",
    }
    up = [other for other, values in known.items() if values.get("State") == "UP" and other != name]
    do = f"use another slurm.partition ({', '.join(up) or 'none is up'}), or wait until it is up"
    return Finding("error", TOPIC, f"{name} is {state}: {means.get(state, 'jobs may not start')}", do)


def _time(
    name: str, row: Mapping[str, str], request: Request, known: Mapping[str, Mapping[str, str]]
) -> Finding | None:
    limit = max_minutes(row)
    if limit is None or request.time_min <= limit:
        return None
    longer = [
        other
        for other, values in known.items()
        if values.get("State") == "UP" and ((most := max_minutes(values)) is None or most >= request.time_min)
    ]
    room_s = 60 * limit - GRACE_S - request.signal_delay_s
    ways = (
        [f"lower eon_lifetime to {room_s} s and slurm.time_min (or slurm_file's --time) to {limit}"]
        if room_s > 0
        else []
    )
    ways += [f"use a slurm.partition that allows more ({', '.join(longer)})"] if longer else []
    do = ", or ".join(ways) or "no partition that is up allows this time: set slurm.time_min lower"
    what = f"the time limit of a job would be {request.time_min} min, and {name} allows {limit} min (MaxTime)"
    return Finding("error", "time limit", what, do)


def _nodes(name: str, nodes: Sequence[Node], need: Need) -> Finding | None:
    if not nodes:
        return Finding("error", TOPIC, f"{name} has no nodes", "use another slurm.partition; `sinfo -s` lists them")
    short = _short_of(nodes, need)
    if short:
        do = "ask for less (slurm.gpus, slurm.gres, slurm.cpus, slurm.mem_gb), or use another slurm.partition"
        return Finding("error", TOPIC, f"no node of {name} has {short}", do)
    present = [node for node in nodes if not node.away]
    if not present or _short_of(present, need):
        states = ", ".join(f"{count} {state}" for state, count in Counter(node.state for node in nodes).items())
        what = f"no node of {name} that could run a worker is up ({states})"
        return Finding("warning", TOPIC, what, "jobs wait until one is back: use another slurm.partition, or wait")
    return None


def _short_of(nodes: Sequence[Node], need: Need) -> str | None:
    """What the nodes lack; None if one of them has everything."""

    def fits(node: Node) -> bool:
        enough = node.cpus >= need.cpus and node.memory_mb >= need.memory_mb
        return enough and (not need.gpus or node.gpus(need.gpu_kind) >= need.gpus)

    if any(fits(node) for node in nodes):
        return None
    kind = f"{need.gpu_kind} " if need.gpu_kind else ""
    most_gpus, most_cpus, most_mb = (
        max(node.gpus(need.gpu_kind) for node in nodes),
        max(node.cpus for node in nodes),
        max(node.memory_mb for node in nodes),
    )
    lacks = [f"{need.gpus} {kind}GPUs (at most {most_gpus})"] if need.gpus > most_gpus else []
    lacks += [f"{need.cpus} CPUs (at most {most_cpus})"] if need.cpus > most_cpus else []
    lacks += [f"{need.memory_mb} MB of memory (at most {most_mb})"] if need.memory_mb > most_mb else []
    return " and ".join(lacks) or f"all of it at once: {need.gpus} GPUs, {need.cpus} CPUs, {need.memory_mb} MB"


def _submitters(name: str, row: Mapping[str, str]) -> Finding | None:
    """Partitions that take jobs from some nodes only, mostly login nodes."""
    allowed = row.get("AllocNodes", "ALL")
    if allowed in ("ALL", ""):
        return None
    what = f"{name} takes jobs that are submitted on {allowed} only: a job may not be able to queue its successor"
    do = "`orch doctor --two-node` tries it; if it can't, let `orch keep RUN` run on such a node"
    return Finding("warning", "successors", what, do)


def judge_working_time(eon_lifetime_s: float, request: Request) -> list[Finding]:
    """Does the time limit leave room for the working time?"""
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
