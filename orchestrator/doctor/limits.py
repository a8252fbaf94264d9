"""Compare the number of jobs that a run queues with the cluster's limits on jobs. Pure functions.

A run queues all its workers at once (as a job array), and each job queues its successor as soon as it starts, so up to
2 x workers jobs are in the queue at the same time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.doctor.findings import Finding
from orchestrator.messages import counted

TOPIC = "limits"
Row = Mapping[str, str]  # one row of sacctmgr's output, by column; an empty value means no limit
LATER = (
    "running jobs can't queue successors in advance: each submits its successor at its end or, if that fails, puts "
    "itself back into the queue, which costs waiting time"
)
ANOTHER = "use another slurm.qos or slurm.account"


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit on the number of jobs that exist at the same time."""

    jobs: int
    name: str  # Slurm's name for the limit
    owner: str  # "QOS normal" or "account lab"

    def __str__(self) -> str:
        return f"{self.name}={self.jobs} of {self.owner}"


@dataclass(frozen=True, slots=True)
class Accounting:
    """The rows of Slurm's accounting database that apply to a user's job; None: not known."""

    association: Row | None = None
    accounts: tuple[Row, ...] = ()  # the association's account, the account's parent, and so on to the root
    job_qos: Row | None = None
    partition_qos: Row | None = None

    def qos(self) -> tuple[Row, ...]:
        """Return the QOS rows in order of precedence: the partition's first, unless the job's QOS has OverPartQOS."""
        both = [self.partition_qos, self.job_qos]
        if self.job_qos and "OverPartQOS" in self.job_qos.get("Flags", ""):
            both.reverse()
        return tuple(row for row in both if row)

    def all_rows(self) -> tuple[Row, ...]:
        """Return the rows that may limit the jobs of all users together, in order of precedence."""
        return (*self.qos(), *([self.association] if self.association else []), *self.accounts)


def rows(text: str | None, columns: Sequence[str]) -> tuple[dict[str, str], ...]:
    """Parse the output of `sacctmgr -nP`. Lines with the wrong number of fields are skipped."""
    split = [line.split("|") for line in (text or "").split("\n")]
    return tuple(dict(zip(columns, fields, strict=True)) for fields in split if len(fields) == len(columns))


def number(text: str | None) -> int | None:
    """Parse a limit printed by Slurm; None if there is no limit."""
    return int(text) if text and re.fullmatch(r"\s*[0-9]{1,18}\s*", text) else None


def _first(rows: Iterable[Row | None], column: str, name: str) -> Limit | None:
    """Return the limit in this column of the first row that has one."""
    for row in rows:
        if row and (jobs := number(row.get(column))) is not None:
            return Limit(jobs, name, f"QOS {row['Name']}" if "Name" in row else f"account {row.get('Account', '')}")
    return None


def submit_limits(given: Accounting) -> list[Limit]:
    """Return the limits on the number of queued and running jobs: per user, per account, and for all users together."""
    limits = (
        _first(given.qos(), "MaxSubmitPU", "MaxSubmitJobsPerUser")
        or _first([given.association], "MaxSubmit", "MaxSubmitJobs"),
        _first(given.qos(), "MaxSubmitPA", "MaxSubmitJobsPerAccount"),
        _first(given.all_rows(), "GrpSubmit", "GrpSubmitJobs"),
    )
    return [limit for limit in limits if limit]


def run_limits(given: Accounting) -> list[Limit]:
    """Return the limits on the number of running jobs: per user, and for all users together."""
    limits = (
        _first(given.qos(), "MaxJobsPU", "MaxJobsPerUser") or _first([given.association], "MaxJobs", "MaxJobs"),
        _first(given.all_rows(), "GrpJobs", "GrpJobs"),
    )
    return [limit for limit in limits if limit]


def judge_submission(limits: Sequence[Limit], workers: int, others: int, enforced: bool) -> list[Finding]:
    """Compare the run's jobs with the limits on submitted jobs. others: how many other jobs the user has queued."""
    if limits and not enforced:
        what = f"{', '.join(map(str, limits))}: set, but this cluster does not enforce limits"
        return [Finding("ok", TOPIC, what)]
    findings = [finding for limit in limits if (finding := _judge_one(limit, workers, others))]
    if findings:
        return findings
    needed = f"{counted(workers, 'worker')} and {counted(workers, 'successor')}"
    if not limits:
        return [Finding("ok", TOPIC, f"no limit on submitted jobs is known: {needed} may be queued")]
    return [Finding("ok", TOPIC, f"{min(limits, key=lambda limit: limit.jobs)}: enough for {needed}")]


def _judge_one(limit: Limit, workers: int, others: int) -> Finding | None:
    chains, raise_it = counted(workers, "worker"), f"ask the administrator to raise {limit.name} to {2 * workers}"
    room = limit.jobs - others
    if limit.jobs < workers:
        fewer = f"set workers to {limit.jobs} at most, " if limit.jobs else ""
        return Finding("error", TOPIC, f"{limit}: {chains} can't be queued", f"{fewer}{ANOTHER}, or {raise_it}")
    if room < workers:
        what = f"{limit}, which includes {counted(others, 'other job')} of yours: there is no room for {chains} now"
        return Finding("warning", TOPIC, what, f"wait for those jobs or cancel them, {ANOTHER}, or {raise_it}")
    if room < 2 * workers:
        fewer = f"set workers to {room // 2} at most, " if room > 1 else ""
        what = f"{limit}: there is room for {chains}, but {LATER}"
        return Finding("warning", TOPIC, what, f"{fewer}{ANOTHER}, or {raise_it}; the run also works as it is")
    return None


def judge_cluster(config: Mapping[str, str], workers: int) -> list[Finding]:
    """Compare the number of workers with the cluster-wide limits MaxArraySize, max_array_tasks and MaxJobCount."""
    findings = []
    tasks = _pairs(config.get("SchedulerParameters", "")).get("max_array_tasks")
    for text, name in ((config.get("MaxArraySize"), "MaxArraySize"), (tasks, "SchedulerParameters' max_array_tasks")):
        size = number(text)
        if size is not None and workers > max(1, size):
            what = f"{name}={size}: {workers} workers do not fit in one job array"
            findings.append(Finding("error", TOPIC, what, f"set workers to {max(1, size)} at most"))
    count = number(config.get("MaxJobCount"))
    if count is not None and count < workers:
        what = f"MaxJobCount={count}: the cluster accepts at most {count} jobs in all, and this run asks for {workers}"
        findings.append(Finding("error", TOPIC, what, f"set workers to {count} at most"))
    elif count is not None and count < 2 * workers:
        what = f"MaxJobCount={count} for the whole cluster: {LATER}"
        findings.append(Finding("warning", TOPIC, what, f"set workers to {max(1, count // 2)} at most"))
    return findings


def judge_running(given: Accounting, workers: int, gpus: int, enforced: bool) -> list[Finding]:
    """Compare the run with the limits on running jobs and on GPUs. Most limits only delay jobs. gpus: per worker."""
    if not enforced:
        return []
    limits = run_limits(given)
    for row in given.qos() if gpus else ():
        allowed = number(_pairs(row.get("MaxTRESPU", "")).get("gres/gpu"))
        if allowed is not None:
            limits.append(Limit(allowed // gpus, f"MaxTRESPerUser ({allowed} GPUs), in jobs", f"QOS {row['Name']}"))
    findings = []
    for limit in limits:
        if limit.jobs == 0:
            findings.append(Finding("error", TOPIC, f"{limit}: no job of this run would ever start", ANOTHER))
        elif limit.jobs < workers:
            what = f"{limit}: of {workers} workers, at most {limit.jobs} train at the same time"
            findings.append(Finding("warning", TOPIC, what, f"set workers to {limit.jobs}: the others would only wait"))
    return findings


def _pairs(text: str) -> dict[str, str]:
    """Parse a list such as "cpu=64,gres/gpu=4" into {key: value}."""
    return {key: value for key, _, value in (pair.partition("=") for pair in text.split(","))}
