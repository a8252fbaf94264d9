"""The two-node test: a short job that tries on the nodes themselves what a run will need there."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from orchestrator.cluster.probe import Answer, ProbeJob, ProbeState, probe_job
from orchestrator.doctor import locks, node
from orchestrator.doctor.findings import Finding
from orchestrator.doctor.locks import judge_counts, lock_advice
from orchestrator.doctor.machine import PythonFacts, judge_python
from orchestrator.errors import LeaderboardError, OrchError, Refusal, SubmissionError
from orchestrator.files.run_folder import DATABASE_NAME
from orchestrator.locking import proof
from orchestrator.locking.choice import Choice, write_record
from orchestrator.locking.mounts import ELSEWHERE
from orchestrator.records import LockKind
from orchestrator.settings.settings import Settings

TIME_MIN = 10  # the job's limit, where the partition allows it; it needs about half a minute
POLL_S = 1.0
OVER_S = 90.0  # Slurm takes a while to end a job after its limit
APPEAR_S = 70.0  # for a job's last files to appear here: attribute caches of NFS are up to a minute old
# Slurm's reasons for a job that waits for ever as it is.
HOPELESS = (
    "PartitionDown", "PartitionInactive", "PartitionTimeLimit", "PartitionNodeLimit", "BadConstraints",
    "AccountNotAllowed", "QOSNotAllowed", "InvalidAccount", "InvalidQOS", "JobHeldAdmin", "JobHeldUser",
)  # fmt: skip
HOPELESS_AFTER_S = 10.0
TOPIC = "two-node test"

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Needs:
    """What is asked of the nodes besides the locks."""

    settings: Settings
    script: str  # what a worker is submitted with
    paths: tuple[str, ...]
    database: str | None  # URL of a server
    gpu: bool  # does a worker need one?
    refused_here: bool = False  # does sbatch refuse the script on this machine, too?
    python: bool = True
    lock: LockKind = "flock"  # that a run would take


@dataclass(frozen=True, slots=True)
class Proof:
    """What the test says."""

    findings: list[Finding]
    locks_hold: bool | None  # between nodes; None: it could not tell


NOT_TRIED = Proof([], None)


@dataclass(frozen=True, slots=True)
class TestOutcome:
    """What came back from the nodes."""

    nodes: int  # that the job was on, as asked for
    reports: tuple[node.NodeReport | None, ...]  # one a task
    counted_in_file: int | str  # the sum, or why it can't be read
    counted_in_database: int | str
    came_back: tuple[str, ...]  # for each task: why its own file is not as it wrote it; empty: it is
    ended: str  # how the job ended, in Slurm's words
    stopped: str = ""  # why the doctor ended it; empty: it ended by itself


def prove(needs: Needs, scratch: Path, nodes_there: int, time_min: int | None, wait_s: float, say: Say) -> Proof:
    """Run the test and judge it. scratch: a folder beside the runs. nodes_there: of the partition that are up.
    time_min: the partition's limit on a job's time, None for none. wait_s: for the job to start.

    Leaves no job behind, also after Ctrl-C and SIGTERM, which it passes on. Where Slurm does not answer any more,
    the job ends by its own limits.
    """
    limit_min = min(TIME_MIN, time_min or TIME_MIN)
    before: list[Finding] = []
    nodes = 2 if nodes_there >= 2 else 1
    if nodes == 1:
        what = f"no two nodes are up where the workers run ({nodes_there}): two tasks on one node say nothing of two"
        before.append(Finding("warning", TOPIC, what, "try again when two are up, or use another slurm.partition"))
    try:
        try:
            outcome = _run(needs, scratch, nodes, limit_min, wait_s, say)
        except SubmissionError as error:
            if nodes == 1 or error.refusal is not Refusal.TOO_MANY_NODES:
                raise
            what = f"a job on two nodes is refused, so one node was tried: {error}"
            do = "use a slurm.partition, qos or account that allows two nodes for the test"
            before.append(Finding("warning", TOPIC, what, do))
            outcome = _run(needs, scratch, 1, limit_min, wait_s, say)
    except OrchError as error:
        do = "mend that, and try again"
        return Proof([*before, Finding("error", TOPIC, f"the job can't be queued: {error}", do)], None)
    return Proof(before + judge(outcome, needs), locks_hold(outcome))


def _run(needs: Needs, scratch: Path, nodes: int, limit_min: int, wait_s: float, say: Say) -> TestOutcome:
    _prepare(needs, scratch, limit_min)
    with (
        _ended_by_sigterm(),
        probe_job(needs.settings, scratch, node.main, nodes=nodes, tasks=2, time_min=limit_min, wait_s=wait_s) as job,
    ):
        say(f"job {job.cluster_id} is queued: {nodes} nodes, {limit_min} min at most; Ctrl-C cancels it")
        last, stopped = _wait(job, limit_min, wait_s, say)
    return _collect(needs, scratch, nodes, last, stopped)


def _prepare(needs: Needs, scratch: Path, limit_min: int) -> None:
    """Raises LeaderboardError where the scratch database can't be made."""
    sha256 = node.write_random(scratch / node.FROM_LOGIN)
    (scratch / node.SCRIPT).write_text(needs.script, encoding="utf-8")
    increments = locks.INCREMENTS if needs.database is None else 0  # a server keeps its own locks
    if increments:
        proof.prepare_file(scratch / node.COUNTER)
        if not (scratch / node.DATABASE).exists():
            (scratch / node.DATABASE).mkdir()
            write_record(scratch / node.DATABASE / DATABASE_NAME, Choice(needs.lock, "as is tried here"))
            locks.prepare_database(scratch / node.DATABASE)
    # A fifth of the job's time for each count leaves enough for the rest.
    plan = node.NodeTask(2, increments, 12.0 * limit_min, sha256, needs.paths, needs.database, needs.python, needs.lock)
    node.write_plan(scratch, plan)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that the job is cancelled."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    had = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, had)


def _wait(job: ProbeJob, limit_min: int, wait_s: float, say: Say) -> tuple[ProbeState, str]:
    """Until the job is over. Returns its last state, and why it must be ended; empty if it ended by itself."""
    queued_at = time.monotonic()
    started_at: float | None = None
    told = ProbeState(None)
    while True:
        state, now = job.state(), time.monotonic()
        if state.over:
            return state, ""
        if state != told and state.state:
            say(f"job {job.cluster_id}: {state}")
            told = state
        if state.state not in (None, "PENDING", "CONFIGURING") and started_at is None:
            started_at = now
        if started_at is not None and now - started_at > 60 * limit_min + OVER_S:
            return state, f"it was not over {limit_min} min after its start"
        if started_at is None and (why := _waits_too_long(state, now - queued_at, wait_s)):
            return state, why
        time.sleep(POLL_S)


def _waits_too_long(state: ProbeState, waited_s: float, wait_s: float) -> str:
    if waited_s > HOPELESS_AFTER_S and state.reason in HOPELESS:
        return f"it would never start: {state.reason}"
    if waited_s > wait_s:
        why = f": {state.reason}" if state.reason else ""
        return f"it did not start within {wait_s / 60:.0f} min{why}"
    return ""


def _collect(needs: Needs, scratch: Path, nodes: int, last: ProbeState, stopped: str) -> TestOutcome:
    """Read what the tasks wrote. Files that other nodes made may take a while to appear here."""
    well = not stopped and last.state in ("", "COMPLETED")
    end = time.monotonic() + (APPEAR_S if well else APPEAR_S / 10)
    while True:
        reports = tuple(node.read_report(scratch, task) for task in range(2))
        if all(report and report.done for report in reports) or time.monotonic() > end:
            break
        time.sleep(0.5)
    in_file: int | str = "not tried"
    in_database: int | str = "not tried"
    if needs.database is None:
        try:
            in_file = proof.counted_in_file(scratch / node.COUNTER)
        except (OSError, ValueError) as error:
            in_file = str(error)
        try:
            in_database = locks.counted_in_database(scratch / node.DATABASE)
        except (OSError, LeaderboardError) as error:
            in_database = str(error)
    back = tuple(_came_back(scratch, report) for report in reports if report)
    return TestOutcome(nodes, reports, in_file, in_database, back, str(last), stopped)


def _came_back(scratch: Path, report: node.NodeReport) -> str:
    if report.written_sha256 is None:
        return ""
    path = node.own_path(scratch, report.task)
    try:
        same = node.sha256_of(path) == report.written_sha256
    except OSError as error:
        return f"{path.name}: {error}"
    return "" if same else f"{path.name} has other bytes than were written on {report.host}"


# --- what it means


def judge(outcome: TestOutcome, needs: Needs) -> list[Finding]:
    """Everything that the nodes reported, or why they reported nothing."""
    reports = [report for report in outcome.reports if report]
    if not reports:
        return [_nothing(outcome)]
    found = _folder(outcome, reports)
    found += _submission(reports, needs.refused_here)
    found += _mounts(reports, flock=needs.database is None and needs.lock == "flock")
    if needs.database is None:
        found += _counts(outcome)
    found += _needs(reports, needs)
    unfinished = [report.host for report in reports if not report.done]
    if unfinished or len(reports) < len(outcome.reports):
        how = outcome.stopped or f"it ended {outcome.ended or '(how is not known)'}"
        what = f"the job did not come to its end on {', '.join(unfinished) or 'one node'}: {how}"
        do = "if this comes again, locks hang or a node is broken: " + ELSEWHERE
        found.append(Finding("error", TOPIC, what, do))
    return found


def _nothing(outcome: TestOutcome) -> Finding:
    if outcome.stopped:
        do = "try again with a longer --wait, or with another slurm.partition or qos, or ask for less (slurm.gpus)"
        return Finding("warning", TOPIC, f"nothing was tried: the job was cancelled, {outcome.stopped}", do)
    what = f"the job ended ({outcome.ended or 'how is not known'}) and left nothing in the runs folder"
    do = (
        "is the runs folder there on the nodes? Put it on a file system that they share (--runs-dir). Is this Python "
        "environment there? `srun ls -d RUNS_DIR; srun which python` tell"
    )
    return Finding("error", "runs folder", what, do)


def _folder(outcome: TestOutcome, reports: Sequence[node.NodeReport]) -> list[Finding]:
    wrong = [f"on {report.host}, {report.folder_seen}" for report in reports if report.folder_seen]
    wrong += [why for why in outcome.came_back if why]
    if wrong:
        what = f"the runs folder is not the same on all nodes: {'; '.join(wrong)}"
        return [Finding("error", "runs folder", what, "put it on a file system that all nodes share (--runs-dir)")]
    hosts = sorted({report.host for report in reports})
    found = [
        Finding("ok", "runs folder", f"{' and '.join(hosts)} and this machine see each other's files, byte for byte")
    ]
    if any(report.met is False for report in reports):
        what = f"the tasks on {' and '.join(hosts)} did not see each other's new files within {node.MEETING_S:.0f} s"
        found.append(Finding("error", "runs folder", what, ELSEWHERE))
    if outcome.nodes > 1 and len(hosts) < 2 and len(reports) > 1:
        what = f"both tasks were on {hosts[0]}"
        found.append(Finding("warning", TOPIC, what, "try again: a lock between two nodes was not tested"))
    return found


def _submission(reports: Sequence[node.NodeReport], refused_here: bool) -> list[Finding]:
    topic, keep = "successors", "let `orch keep RUN` run on a login node: it queues the successors"
    for report in reports:
        if report.can_submit is None:
            continue
        answer = Answer(**report.can_submit)
        if not answer.taken and refused_here:
            what = "whether jobs can queue their successors is not known: sbatch refuses these jobs here, too"
            return [Finding("note", topic, what, "change the settings so that they are taken, and test again")]
        if answer.refusal not in (None, Refusal.NO_ROOM):
            what = f"a job on {report.host} can't queue its successor: {answer.said[-300:]}"
            return [Finding("warning", topic, what, keep)]
        if not report.squeue:
            what = f"squeue does not answer on {report.host}: workers there can't tell which jobs are gone"
            return [Finding("warning", topic, what, keep)]
    tried = [report.host for report in reports if report.can_submit]
    return [Finding("ok", topic, f"jobs on {' and '.join(tried)} can queue their successors")] if tried else []


def _mounts(reports: Sequence[node.NodeReport], flock: bool) -> list[Finding]:
    """What the mount says of itself on the nodes; on login nodes it may be another."""
    found = []
    for report in reports:
        mount = report.mount_there()
        if mount is None or not flock:
            continue
        advice = lock_advice(mount.fstype, mount.options)
        if advice.level == "error":
            found.append(Finding("error", "locks", f"on {report.host}: {advice.what}", advice.do))
    return found


def _counts(outcome: TestOutcome) -> list[Finding]:
    """Nothing of a kind that a task did not come to: the sum is not known then."""
    reports = [report for report in outcome.reports if report]
    hosts = sorted({report.host for report in reports})
    where = f"between {' and '.join(hosts)}" if len(hosts) > 1 else f"on {hosts[0]} alone"
    found = []
    counts: tuple[tuple[proof.Counted, int | str], ...] = (
        ("lock", outcome.counted_in_file),
        ("database", outcome.counted_in_database),
    )
    for kind, counted in counts:
        tallies = [tally for report in reports if (tally := report.of(kind))]
        if len(tallies) == len(outcome.reports):
            found += judge_counts(kind, tallies, counted, where)
    return found


def locks_hold(outcome: TestOutcome) -> bool | None:
    """Between nodes. None: the test could not tell, as when both tasks were on one node."""
    reports = [report for report in outcome.reports if report]
    if outcome.counted_in_file == "not tried" or not reports:
        return None
    judged = _counts(outcome)
    if any(finding.level == "error" for finding in judged):
        return False
    whole = len(reports) == len(outcome.reports) and all(report.done and report.met for report in reports)
    several = len({report.host for report in reports}) > 1
    return True if whole and several and all(finding.level == "ok" for finding in judged) else None


def _needs(reports: Sequence[node.NodeReport], needs: Needs) -> list[Finding]:
    found = []
    unread = _hosts_by((path, report.host) for report in reports for path in report.missing or ())
    for path, hosts in unread.items():
        do = "put it where all nodes can read it, and name it by that path"
        found.append(Finding("error", "data", f"{path}: can't be read on {hosts}", do))
    silent = _hosts_by((report.database, report.host) for report in reports if report.database)
    for why, hosts in silent.items():
        do = 'does the server of "database" take connections from compute nodes? Ask, or use SQLite'
        found.append(Finding("error", "database", f"on {hosts}: {why}", do))
    answered = sorted({report.host for report in reports if report.database == ""})
    if needs.database is not None and answered and not silent:
        found.append(Finding("ok", "database", f"the database server answers on {' and '.join(answered)}"))
    for report in reports:
        if report.python is not None:
            found += judge_python(PythonFacts(**report.python), 0, needs.gpu, f"on {report.host}")
    return found


def _hosts_by(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """{what: "n1 and n2"} of (what, host), each once."""
    hosts: dict[str, list[str]] = {}
    for what, host in pairs:
        if host not in hosts.setdefault(what, []):
            hosts[what].append(host)
    return {what: " and ".join(sorted(names)) for what, names in hosts.items()}
