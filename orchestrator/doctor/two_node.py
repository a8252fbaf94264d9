"""The two-node test: a short job that checks on compute nodes what a run needs there."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from orchestrator.cluster.probe import ProbeJob, ProbeState, probe_job
from orchestrator.doctor import locks, node
from orchestrator.doctor.findings import Finding
from orchestrator.doctor.locks import Unreadable, judge_counts, lock_advice
from orchestrator.doctor.machine import judge_python
from orchestrator.errors import LeaderboardError, OrchError, Refusal, SubmissionError
from orchestrator.files.run_folder import DATABASE_NAME
from orchestrator.locking import proof
from orchestrator.locking.choice import Choice, write_record
from orchestrator.locking.mounts import ELSEWHERE
from orchestrator.records import LockKind
from orchestrator.settings.settings import Settings

TIME_MIN = 10  # the job's time limit, unless the partition allows less; the job needs about half a minute
POLL_S = 1.0
OVER_S = 90.0  # how long Slurm may take to end a job after the job's time limit
APPEAR_S = 70.0  # how long a job's last files may take to appear here: NFS caches attributes for up to a minute
# Slurm's reasons for pending jobs that will never start.
HOPELESS = (
    "PartitionDown", "PartitionInactive", "PartitionTimeLimit", "PartitionNodeLimit", "BadConstraints",
    "AccountNotAllowed", "QOSNotAllowed", "InvalidAccount", "InvalidQOS", "JobHeldAdmin", "JobHeldUser",
)  # fmt: skip
HOPELESS_AFTER_S = 10.0
TOPIC = "two-node test"
KINDS: tuple[proof.Counted, ...] = ("lock", "database")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Needs:
    """What a worker needs on a node, and what Slurm allows the test to use."""

    settings: Settings
    script: str  # a worker's batch script
    gpu: bool  # whether a worker needs a GPU
    nodes_up: int = 2  # how many nodes of the partition are up
    limit_min: int = TIME_MIN  # the job's time limit
    refused_here: bool = False  # whether sbatch refuses the script on this machine too
    lock: LockKind = "flock"  # the lock that a run launched here would use

    @property
    def server(self) -> str | None:
        """Return the URL of the database server; None for SQLite."""
        return self.settings.database if self.settings.uses_server else None


@dataclass(frozen=True, slots=True)
class Proof:
    """The result of the test; the defaults mean that no test was run."""

    findings: Sequence[Finding] = ()
    locks_hold: bool | None = None  # whether locks work between nodes; None: not known


@dataclass(frozen=True, slots=True)
class TestOutcome:
    """The job's results."""

    nodes: int  # how many nodes the job requested
    reports: tuple[node.NodeReport | None, ...]  # one per task; None: no report
    counted: Mapping[proof.Counted, int | Unreadable]  # the counters' final values; empty with a database server
    wrong_files: tuple[str, ...]  # descriptions of the files whose contents here differ from what a task wrote
    ended: str  # how the job ended, in Slurm's words
    stopped: str | None = None  # why the doctor cancelled the job; None: the job ended by itself

    @property
    def received(self) -> list[node.NodeReport]:
        return [report for report in self.reports if report]

    @property
    def hosts(self) -> list[str]:
        return sorted({report.host for report in self.received})


def prove(needs: Needs, scratch: Path, wait_s: float, say: Say) -> Proof:
    """Run the test and evaluate its results. scratch: a folder beside the runs. wait_s: how long the job may wait.

    Before this function returns or raises (also after Ctrl-C or SIGTERM), it cancels the job unless the job is over. If
    Slurm does not respond then, the job ends at its own time limit.
    """
    findings: list[Finding] = []
    nodes = 2 if needs.nodes_up >= 2 else 1
    if nodes == 1:
        what = f"no two nodes are up in the partition ({needs.nodes_up} up), so locks between nodes are not tested"
        findings.append(Finding("warning", TOPIC, what, "try again when two are up, or set another slurm.partition"))
    try:
        _prepare(needs, scratch)
        try:
            outcome = _run(needs, scratch, nodes, wait_s, say)
        except SubmissionError as error:
            if nodes == 1 or error.refusal is not Refusal.TOO_MANY_NODES:
                raise
            what = f"Slurm refuses a job on two nodes, so only one node was tested: {error}"
            do = "use a slurm.partition, qos or account that allows two nodes for the test"
            findings.append(Finding("warning", TOPIC, what, do))
            outcome = _run(needs, scratch, 1, wait_s, say)
    except OrchError as error:
        findings.append(Finding("error", TOPIC, f"the job can't be queued: {error}", "fix the cause, and try again"))
        return Proof(findings)
    return Proof(findings + judge(outcome, needs), locks_hold(outcome))


def _run(needs: Needs, scratch: Path, nodes: int, wait_s: float, say: Say) -> TestOutcome:
    probe = probe_job(
        needs.settings, scratch, node.main, nodes=nodes, tasks=node.TASKS, time_min=needs.limit_min, wait_s=wait_s
    )
    with _ended_by_sigterm(), probe as job:
        say(f"job {job.cluster_id} is queued: {nodes} nodes, {needs.limit_min} min at most; Ctrl-C cancels it")
        last, stopped = _wait(job, needs.limit_min, wait_s, say)
    return _collect(needs, scratch, nodes, last, stopped)


def _prepare(needs: Needs, scratch: Path) -> None:
    """Write the files that the job reads. Raises LeaderboardError if the scratch database can't be created."""
    (scratch / node.SCRIPT).write_text(needs.script, encoding="utf-8")
    if needs.server is None:
        proof.prepare_file(scratch / node.COUNTER)
        (scratch / node.DATABASE).mkdir()
        write_record(scratch / node.DATABASE / DATABASE_NAME, Choice(needs.lock, "for the two-node test"))
        locks.prepare_database(scratch / node.DATABASE)
    task = node.NodeTask(
        increments=locks.INCREMENTS if needs.server is None else 0,  # a database server does its own locking
        counting_s=12.0 * needs.limit_min,  # a fifth of the job's time for each of the two counts
        sha256=node.write_random(scratch / node.FROM_LOGIN),
        paths=needs.settings.data_folders,
        database=needs.server,
        lock=needs.lock,
    )
    node.write(scratch / node.TASK, task.model_dump_json().encode())


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Raise SystemExit in the block when SIGTERM arrives, so that the job is cancelled as after Ctrl-C."""

    def leave(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait(job: ProbeJob, limit_min: int, wait_s: float, say: Say) -> tuple[ProbeState, str | None]:
    """Wait until the job is over or must be cancelled. Returns its last state, and why to cancel it (None if over)."""
    queued_at = time.monotonic()
    started_at: float | None = None
    told = ProbeState(None)
    while True:
        state, now = job.state(), time.monotonic()
        if state.over:
            return state, None
        if state != told and state.state:
            say(f"job {job.cluster_id}: {state}")
            told = state
        if state.state not in (None, "PENDING", "CONFIGURING") and started_at is None:
            started_at = now
        if started_at is not None and now - started_at > 60 * limit_min + OVER_S:
            return state, f"it was still running {limit_min} min after its start"
        if started_at is None and state.reason in HOPELESS and now - queued_at > HOPELESS_AFTER_S:
            return state, f"it would never start: {state.reason}"
        if started_at is None and now - queued_at > wait_s:
            reason = f": {state.reason}" if state.reason else ""
            return state, f"it did not start within {wait_s / 60:.0f} min{reason}"
        time.sleep(POLL_S)


def _collect(needs: Needs, scratch: Path, nodes: int, last: ProbeState, stopped: str | None) -> TestOutcome:
    """Wait until the tasks' files appear on this machine, and read them."""
    well = stopped is None and last.state in ("", "COMPLETED")
    end = time.monotonic() + (APPEAR_S if well else APPEAR_S / 10)
    while True:
        reports = tuple(node.read_report(scratch, task) for task in range(node.TASKS))
        if all(report and report.done for report in reports) or time.monotonic() > end:
            break
        time.sleep(0.5)
    counted = {} if needs.server else {kind: _final_number(kind, scratch) for kind in KINDS}
    wrong = tuple(problem for report in reports if report and (problem := _file_problem(scratch, report)))
    return TestOutcome(nodes, reports, counted, wrong, str(last), stopped)


def _final_number(kind: proof.Counted, scratch: Path) -> int | Unreadable:
    try:
        if kind == "lock":
            return proof.counted_in_file(scratch / node.COUNTER)
        return locks.counted_in_database(scratch / node.DATABASE)
    except (OSError, ValueError, LeaderboardError) as error:
        return Unreadable(str(error))


def _file_problem(scratch: Path, report: node.NodeReport) -> str | None:
    if report.written_sha256 is None:
        return None
    path = node.own_path(scratch, report.task)
    try:
        same = node.sha256_of(path) == report.written_sha256
    except OSError as error:
        return f"{path.name}: {error}"
    return None if same else f"{path.name} differs from the file written on {report.host}"


# --- findings


def judge(outcome: TestOutcome, needs: Needs) -> list[Finding]:
    """Evaluate everything that the nodes reported, or explain why they reported nothing."""
    reports = outcome.received
    if not reports:
        return [_judge_silence(outcome)]
    findings = _judge_folder(outcome) + _judge_submission(reports, needs.refused_here)
    if needs.server is None:
        findings += _judge_mounts(reports) if needs.lock == "flock" else []
        findings += _judge_counts(outcome)
    findings += _judge_needs(reports, needs)
    unfinished = [report.host for report in reports if not report.done]
    if unfinished or len(reports) < len(outcome.reports):
        how = outcome.stopped or f"its final state is {outcome.ended or 'not known'}"
        what = f"the job did not finish on {_and(unfinished) or 'one node'}: {how}"
        do = f"if this happens again, locks hang or a node is broken: {ELSEWHERE}"
        findings.append(Finding("error", TOPIC, what, do))
    return findings


def _judge_silence(outcome: TestOutcome) -> Finding:
    if outcome.stopped:
        do = "try again with a longer --wait, with another slurm.partition or slurm.qos, or with fewer slurm.gpus"
        return Finding("warning", TOPIC, f"nothing was tested: the job was cancelled because {outcome.stopped}", do)
    what = f"the job ended (final state: {outcome.ended or 'not known'}) and left nothing in the runs folder"
    do = (
        "check with `srun ls -d RUNS_DIR; srun which python` that the nodes see the runs folder and this Python "
        "environment; put the runs on a file system that the nodes share (--runs-dir)"
    )
    return Finding("error", "runs folder", what, do)


def _judge_folder(outcome: TestOutcome) -> list[Finding]:
    reports, hosts = outcome.received, outcome.hosts
    wrong = [f"on {report.host}, {report.folder_problem}" for report in reports if report.folder_problem]
    if wrong or outcome.wrong_files:
        what = f"the runs folder is not the same on all nodes: {'; '.join((*wrong, *outcome.wrong_files))}"
        return [Finding("error", "runs folder", what, "put it on a file system that all nodes share (--runs-dir)")]
    what = f"{_and(hosts)} and this machine see each other's files with the same contents"
    findings = [Finding("ok", "runs folder", what)]
    if any(report.met is False for report in reports):
        what = f"the tasks on {_and(hosts)} did not see each other's new files within {node.MEETING_S:.0f} s"
        findings.append(Finding("error", "runs folder", what, ELSEWHERE))
    if outcome.nodes > 1 and len(hosts) < 2 and len(reports) > 1:
        what = f"both tasks were on {hosts[0]}, so locks between nodes were not tested"
        findings.append(Finding("warning", TOPIC, what, "try again"))
    return findings


def _judge_submission(reports: Sequence[node.NodeReport], refused_here: bool) -> list[Finding]:
    topic, keep = "successors", "run `orch keep RUN` on a login node: it queues the successors"
    tried = [(report, report.can_submit) for report in reports if report.can_submit]
    for report, answer in tried:
        if not answer.taken and refused_here:
            what = "could not test whether jobs can queue their successors: sbatch refuses these jobs here, too"
            return [Finding("note", topic, what, "change the settings so that sbatch accepts the jobs, and test again")]
        if answer.refusal not in (None, Refusal.NO_ROOM):
            what = f"a job on {report.host} can't queue its successor: {answer.said[-300:]}"
            return [Finding("warning", topic, what, keep)]
        if not report.squeue:
            what = f"squeue does not answer on {report.host}: workers there can't find out which jobs have ended"
            return [Finding("warning", topic, what, keep)]
    what = f"jobs on {_and([report.host for report, _ in tried])} can queue their successors"
    return [Finding("ok", topic, what)] if tried else []


def _judge_mounts(reports: Sequence[node.NodeReport]) -> list[Finding]:
    """Check the mount options on the nodes, which may differ from those on the login node."""
    findings = []
    for report in reports:
        advice = lock_advice(report.mount.fstype, report.mount.options) if report.mount else None
        if advice and advice.level == "error":
            findings.append(Finding("error", "locks", f"on {report.host}: {advice.what}", advice.do))
    return findings


def _judge_counts(outcome: TestOutcome) -> list[Finding]:
    """Check the counters. Skip a counter if a task did not report its increments: its expected value is not known."""
    where = f"between {_and(outcome.hosts)}" if len(outcome.hosts) > 1 else f"on {outcome.hosts[0]} alone"
    findings = []
    for kind, final in outcome.counted.items():
        tallies = [tally for report in outcome.received for tally in report.tallies if tally.kind == kind]
        if len(tallies) == len(outcome.reports):
            findings += judge_counts(kind, tallies, final, where)
    return findings


def locks_hold(outcome: TestOutcome) -> bool | None:
    """Return whether locks work between nodes; None: not known, for example because both tasks were on one node."""
    reports = outcome.received
    if not outcome.counted or not reports:
        return None
    levels = {finding.level for finding in _judge_counts(outcome)}
    if "error" in levels:
        return False
    complete = len(reports) == len(outcome.reports) and all(report.done and report.met for report in reports)
    return True if complete and len(outcome.hosts) > 1 and levels <= {"ok"} else None


def _judge_needs(reports: Sequence[node.NodeReport], needs: Needs) -> list[Finding]:
    findings = []
    unread = _hosts_by((path, report.host) for report in reports for path in report.missing or ())
    for path, hosts in unread.items():
        do = "move the data to a path that all nodes can read, and set that path in the settings"
        findings.append(Finding("error", "data", f"{path}: can't be read on {hosts}", do))
    silent = _hosts_by((report.database_problem, report.host) for report in reports if report.database_problem)
    for why, hosts in silent.items():
        do = 'ask the administrator whether the "database" server accepts connections from compute nodes, or use SQLite'
        findings.append(Finding("error", "database", f"on {hosts}: {why}", do))
    answered = sorted({report.host for report in reports if report.database_answers})
    if answered and not silent:
        findings.append(Finding("ok", "database", f"the database server answers on {_and(answered)}"))
    for report in reports:
        if report.python is not None:
            findings += judge_python(report.python, 0, needs.gpu, report.host)
    return findings


def _hosts_by(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Convert pairs of (value, host) to {value: "n1 and n2"}."""
    hosts: dict[str, set[str]] = {}
    for value, host in pairs:
        hosts.setdefault(value, set()).add(host)
    return {value: _and(sorted(names)) for value, names in hosts.items()}


def _and(names: Sequence[str]) -> str:
    return " and ".join(names)
