"""How many jobs a user may have, against what a run queues. Pure: rows of sacctmgr and scontrol in, findings out.

A run queues all its workers at once (as a job array), and each running job queues its successor at once, so
2 x workers jobs are there at the same time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.doctor.findings import Finding
from orchestrator.messages import counted

TOPIC = "limits"
Row = Mapping[str, str]  # of sacctmgr, by column; an empty value is no limit
LATER = (
    "jobs can't queue successors beside them: each then submits its successor at its end, or as the last resort puts "
    "itself back into the queue, which costs waiting time"
)


@dataclass(frozen=True, slots=True)
class Limit:
    """How many jobs may be there at the same time."""

    jobs: int
    name: str  # Slurm's
    of: str  # whose it is, for the message
    shared: bool = False  # do other users' jobs count as well?

    def __str__(self) -> str:
        return f"{self.name}={self.jobs} of {self.of}"


@dataclass(frozen=True, slots=True)
class Standing:
    """What of Slurm's accounting applies to one job of one user; None: nothing is known of it."""

    association: Row | None = None
    accounts: tuple[Row, ...] = ()  # the association's account, its parent, and so on to the root
    job_qos: Row | None = None
    partition_qos: Row | None = None

    def qos(self) -> tuple[Row, ...]:
        """By precedence: the partition's goes before the job's, unless the job's has OverPartQOS."""
        both = [self.partition_qos, self.job_qos]
        if self.job_qos and "OverPartQOS" in self.job_qos.get("Flags", ""):
            both.reverse()
        return tuple(row for row in both if row)


def rows(text: str | None, columns: Sequence[str]) -> tuple[dict[str, str], ...]:
    """Of a parsable output without a heading; lines with another number of fields are left out."""
    split = [line.split("|") for line in (text or "").split("\n")]
    return tuple(dict(zip(columns, fields, strict=True)) for fields in split if len(fields) == len(columns))


def number(text: str | None) -> int | None:
    """A limit as Slurm prints it; None if there is none."""
    return int(text) if text and re.fullmatch(r"\s*[0-9]{1,18}\s*", text) else None


def submit_limits(standing: Standing) -> list[Limit]:
    """How many jobs may be in the queue, running ones included. Of each kind (of the user, of the account, of
    all) the limit that goes before the others: the QOS's, else the association's."""
    name = standing.association.get("Account", "") if standing.association else ""
    mine = [(row, "MaxSubmitPU", "MaxSubmitJobsPerUser", _qos(row), False) for row in standing.qos()]
    if standing.association:
        mine.append((standing.association, "MaxSubmit", "MaxSubmitJobs", f"account {name}", False))
    account = [(row, "MaxSubmitPA", "MaxSubmitJobsPerAccount", _qos(row), True) for row in standing.qos()]
    found = [_first(mine), _first(account), _first(_groups(standing, "GrpSubmit", "GrpSubmitJobs"))]
    return [limit for limit in found if limit]


def run_limits(standing: Standing) -> list[Limit]:
    """How many jobs may run at the same time."""
    name = standing.association.get("Account", "") if standing.association else ""
    mine = [(row, "MaxJobsPU", "MaxJobsPerUser", _qos(row), False) for row in standing.qos()]
    if standing.association:
        mine.append((standing.association, "MaxJobs", "MaxJobs", f"account {name}", False))
    found = [_first(mine), _first(_groups(standing, "GrpJobs", "GrpJobs"))]
    return [limit for limit in found if limit]


LimitSource = tuple[Row, str, str, str, bool]  # row, column, Slurm's name, whose, shared


def _first(candidates: Iterable[LimitSource]) -> Limit | None:
    for row, column, name, of, shared in candidates:
        jobs = number(row.get(column))
        if jobs is not None:
            return Limit(jobs, name, of, shared)
    return None


def _groups(standing: Standing, column: str, name: str) -> list[LimitSource]:
    """Of all jobs of a QOS, else of the user's association, else of the lowest account that has the limit."""
    found: list[LimitSource] = [(row, column, name, _qos(row), True) for row in standing.qos()]
    if standing.association:
        found.append((standing.association, column, name, f"account {standing.association.get('Account')}", False))
    return [*found, *((row, column, name, f"account {row.get('Account')}", True) for row in standing.accounts)]


def _qos(row: Row) -> str:
    return f"QOS {row.get('Name', '?')}"


def judge_submission(limits: Sequence[Limit], workers: int, others: int, enforced: bool) -> list[Finding]:
    """limits: on submitted jobs. others: the user's jobs that are in the queue and not this run's."""
    if limits and not enforced:
        what = f"{', '.join(map(str, limits))}: set, but this cluster does not enforce limits"
        return [Finding("ok", TOPIC, what)]
    found = [finding for limit in limits if (finding := _judge_one(limit, workers, others))]
    return found or [Finding("ok", TOPIC, _roomy(limits, workers))]


def _roomy(limits: Sequence[Limit], workers: int) -> str:
    least = min(limits, key=lambda limit: limit.jobs, default=None)
    needed = f"{counted(workers, 'worker')} and as many successors"
    return f"{least}: enough for {needed}" if least else f"no limit on submitted jobs is known: {needed} may be queued"


def _judge_one(limit: Limit, workers: int, others: int) -> Finding | None:
    raise_it = f"have {limit.name} raised to {2 * workers}"
    another = "use another slurm.qos or slurm.account"
    if limit.jobs < workers:
        what = f"{limit}: {counted(workers, 'worker')} can't be queued"
        fewer = f"set workers to {limit.jobs} at most, " if limit.jobs else ""
        return Finding("error", TOPIC, what, f"{fewer}{another}, or {raise_it}")
    if limit.jobs - others < workers:
        what = (
            f"{limit}, and {counted(others, 'other job')} of yours count: {counted(workers, 'worker')} have no room now"
        )
        return Finding("warning", TOPIC, what, f"wait for those jobs or cancel them, {another}, or {raise_it}")
    if limit.jobs - others < 2 * workers:
        half = (limit.jobs - others) // 2
        fewer = f"set workers to {half} at most, " if half else ""
        what = f"{limit}: it has room for {counted(workers, 'worker')}, but {LATER}"
        return Finding("warning", TOPIC, what, f"{fewer}{another}, or {raise_it}; it works as it is, too")
    return None


def judge_cluster(config: Mapping[str, str], workers: int) -> list[Finding]:
    """Against what the cluster takes of everybody: MaxArraySize, max_array_tasks and MaxJobCount."""
    found = []
    size = number(config.get("MaxArraySize"))
    if size is not None and workers > max(1, size):
        what = f"MaxArraySize={size}: {workers} workers are no job array"
        found.append(Finding("error", TOPIC, what, f"set workers to {max(1, size)} at most"))
    tasks = _scheduler_parameter(config, "max_array_tasks")
    if tasks is not None and workers > max(1, tasks):
        what = f"SchedulerParameters has max_array_tasks={tasks}: {workers} workers are more than one array may have"
        found.append(Finding("error", TOPIC, what, f"set workers to {max(1, tasks)} at most"))
    count = number(config.get("MaxJobCount"))
    if count is not None and count < workers:
        what = f"MaxJobCount={count}: the whole cluster takes no more jobs"
        found.append(Finding("error", TOPIC, what, f"set workers to {count} at most"))
    elif count is not None and count < 2 * workers:
        what = f"MaxJobCount={count} of the whole cluster: {LATER}"
        found.append(Finding("warning", TOPIC, what, f"set workers to {max(1, count // 2)} at most"))
    return found


def _scheduler_parameter(config: Mapping[str, str], name: str) -> int | None:
    pairs = (pair.partition("=") for pair in config.get("SchedulerParameters", "").split(","))
    return next((number(value) for key, _, value in pairs if key == name), None)


def judge_running(standing: Standing, workers: int, gpus: int, enforced: bool) -> list[Finding]:
    """Limits on running jobs and on GPUs in use. They delay jobs, they refuse none. gpus: of one worker."""
    if not enforced:
        return []
    limits = list(run_limits(standing))
    for row in standing.qos():
        allowed = _gpus(row.get("MaxTRESPU", ""))
        if allowed is not None and gpus:
            limits.append(Limit(allowed // gpus, f"MaxTRESPerUser ({allowed} GPUs), in jobs", _qos(row)))
    found = []
    for limit in limits:
        if limit.jobs == 0:
            do = "use another slurm.qos or slurm.account"
            found.append(Finding("error", TOPIC, f"{limit}: no job of this run would ever start", do))
        elif limit.jobs < workers:
            what = f"{limit}: of {workers} workers no more than {limit.jobs} train at the same time"
            found.append(Finding("warning", TOPIC, what, f"set workers to {limit.jobs}: the others only wait"))
    return found


def _gpus(tres: str) -> int | None:
    """Of a list such as "cpu=64,gres/gpu=4"."""
    pairs = (pair.partition("=") for pair in tres.split(","))
    return next((number(value) for key, _, value in pairs if key == "gres/gpu"), None)
