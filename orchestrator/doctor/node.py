"""The tasks of the two-node test's job. Each task rewrites its report after each step, so that the report shows how far
the task got if the job hangs or is killed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from orchestrator.cluster.probe import Answer, ask_sbatch, job_names
from orchestrator.doctor import locks, machine
from orchestrator.errors import OrchError
from orchestrator.files.atomic import publish
from orchestrator.leaderboard.engine import Database
from orchestrator.locking import proof
from orchestrator.locking.mounts import Mount, mount_here
from orchestrator.records import LockKind

TASK, FROM_LOGIN, SCRIPT = "task.json", "from-login", "worker.sbatch"
COUNTER, DATABASE = "counter", "database"  # the file with the counter, and the scratch database's folder
BYTES = 2**20  # the size of each file that one machine writes and another reads
TASKS = 2
MEETING_S = 120.0  # how long a task waits for the other tasks; long, since NFS caches attributes for up to a minute
LOCK_TIMEOUT_S = 60.0


class NodeTask(BaseModel):
    """The instructions for the job's tasks, written before the job is queued."""

    increments: int  # 0: do not count
    counting_s: float  # the time limit for each of the two counts
    sha256: str  # the SHA-256 of the login node's file
    paths: tuple[str, ...]  # the data that a worker reads
    database: str | None  # the URL of the database server; None for SQLite
    lock: LockKind = "flock"


class NodeReport(BaseModel):
    """The results of one task. Unless a comment says otherwise, None means that the task did not reach this step."""

    task: int
    host: str
    folder_problem: str | None = None  # the problem in reading the login node's file here; None: no problem
    written_sha256: str | None = None  # the SHA-256 of this task's own file
    mount: Mount | None = None
    can_submit: Answer | None = None
    squeue: bool | None = None
    met: bool | None = None  # did this task see the other tasks' files in time?
    tallies: list[proof.Tally] = []
    missing: list[str] | None = None  # the paths that can't be read
    database_answers: bool | None = None
    database_problem: str | None = None
    python: machine.PythonFacts | None = None
    done: bool = False


def own_path(folder: Path, task: int) -> Path:
    """Return the path of the file that a task writes and the login node reads."""
    return folder / f"from-task-{task}"


def _report_path(folder: Path, task: int) -> Path:
    return folder / f"report-{task}.json"


def write_report(folder: Path, report: NodeReport) -> None:
    """Write the task's report. Raises OSError."""
    write(_report_path(folder, report.task), report.model_dump_json().encode())


def read_report(folder: Path, task: int) -> NodeReport | None:
    """Return a task's report; None if it does not exist (yet) or can't be read."""
    try:
        return NodeReport.model_validate_json(_report_path(folder, task).read_bytes())
    except (OSError, ValidationError):
        return None


def main(folder: str, _worker: int) -> None:
    """Run one task of the job. folder: the doctor's scratch folder, beside the runs."""
    scratch, task = Path(folder), int(os.environ.get("SLURM_PROCID", "0"))
    asked = NodeTask.model_validate_json((scratch / TASK).read_bytes())
    report = NodeReport(task=task, host=os.environ.get("SLURMD_NODENAME") or socket.gethostname())
    for step in (_look_at_folder, _try_to_submit, _count, _look_at_needs):
        _save(report, scratch)
        step(report, scratch, asked)
    report.done = True
    _save(report, scratch)


def _save(report: NodeReport, scratch: Path) -> None:
    with contextlib.suppress(OSError):  # continue: writing the next report may succeed
        write_report(scratch, report)


def _look_at_folder(report: NodeReport, scratch: Path, asked: NodeTask) -> None:
    report.mount = mount_here(scratch)
    try:
        same = sha256_of(scratch / FROM_LOGIN) == asked.sha256
        report.folder_problem = None if same else "the file differs from the one written on the login node"
    except OSError as error:
        report.folder_problem = str(error)
    report.written_sha256 = write_random(own_path(scratch, report.task))


def _try_to_submit(report: NodeReport, scratch: Path, asked: NodeTask) -> None:
    report.squeue = job_names() is not None
    report.can_submit = ask_sbatch((scratch / SCRIPT).read_text(encoding="utf-8"))


def _count(report: NodeReport, scratch: Path, asked: NodeTask) -> None:
    report.met = _meet(report.task, scratch, "count")
    if not asked.increments:
        return
    lock = proof.LOCKS[asked.lock](scratch / f"{COUNTER}.lock", timeout=LOCK_TIMEOUT_S)
    _save(report, scratch)
    report.tallies.append(proof.count_in_file(scratch / COUNTER, lock, asked.increments, asked.counting_s))
    _save(report, scratch)
    _meet(report.task, scratch, "database")
    report.tallies.append(locks.count_in_database(scratch / DATABASE, asked.increments, asked.counting_s))


def _meet(task: int, scratch: Path, name: str) -> bool:
    """Wait until every task has called this with the same name. Returns False if a task does not do so in time."""
    (scratch / f"{name}-{task}").touch()
    end = time.monotonic() + MEETING_S
    while time.monotonic() < end:
        # List the folder, do not test each name: a network file system may have cached that a file does not exist.
        names = {entry.name for entry in scratch.iterdir()}
        if all(f"{name}-{other}" in names for other in range(TASKS)):
            return True
        time.sleep(0.02)
    return False


def _look_at_needs(report: NodeReport, scratch: Path, asked: NodeTask) -> None:
    report.missing = [path for path in asked.paths if not os.access(path, os.R_OK)]
    if asked.database is not None:
        report.database_problem = database_error(asked.database, scratch)
        report.database_answers = report.database_problem is None
    _save(report, scratch)
    if report.task == 0:
        report.python = machine.look_at_python()


def database_error(url: str, folder: Path) -> str | None:
    """Return why the database server does not answer, or None if it answers. Does not change the database."""
    os.environ.setdefault("PGCONNECT_TIMEOUT", "10")  # s; without it, dropped packets block the connection for minutes
    try:
        with Database(url, folder).transaction(own_lock=False) as connection:
            connection.exec_driver_sql("SELECT 1")
    except OrchError as error:
        password = urlsplit(url).password
        return str(error).replace(password, "***") if password else str(error)
    return None


def write_random(path: Path) -> str:
    """Write random bytes, and return their SHA-256."""
    data = secrets.token_bytes(BYTES)
    write(path, data)
    return hashlib.sha256(data).hexdigest()


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(path: Path, data: bytes) -> None:
    """Write a file atomically. Raises OSError."""
    publish(path, lambda target: target.write(data))
