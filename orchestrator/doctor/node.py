"""What the doctor's job does on a node: look, try, count, and write down after each step what came of it.

A report is a file for each task, written anew after each step, so that a job which is killed or hangs has told
how far it came.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from orchestrator.cluster.probe import ask_sbatch, job_names
from orchestrator.doctor import locks, machine
from orchestrator.errors import OrchError
from orchestrator.files.atomic import publish
from orchestrator.leaderboard.engine import Database
from orchestrator.locking import proof
from orchestrator.locking.mounts import Mount, mount_here
from orchestrator.locking.proof import LOCKS
from orchestrator.records import LockKind

PLAN, FROM_LOGIN, SCRIPT = "plan.json", "from-login", "worker.sbatch"
COUNTER, DATABASE = "counter", "database"  # a file, and the folder of a scratch database
BYTES = 2**20  # of the files that are written on one side and read on the other
MEETING_S = 120.0  # how long a task waits for the others; attribute caches of NFS are up to a minute old
LOCK_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class NodeTask:
    """What the tasks are to do, written before the job is queued."""

    tasks: int
    increments: int  # 0: no count at all
    counting_s: float  # the limit for each of the two counts
    sha256: str  # of the file from the login node
    paths: tuple[str, ...]  # that a worker needs: data, the settings' files
    database: str | None  # URL of a database server
    python: bool  # look at torch as well
    lock: LockKind = "flock"


@dataclass
class NodeReport:
    """What one task found; what is None was not reached."""

    task: int
    host: str
    folder_seen: str | None = None  # why the login node's file is not as it was written; empty: it is
    written_sha256: str | None = None  # of this task's own file
    mount: dict[str, Any] | None = None
    can_submit: dict[str, Any] | None = None  # sbatch's Answer
    squeue: bool | None = None
    met: bool | None = None  # did it see the other tasks' files?
    tallies: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] | None = None  # of the paths
    database: str | None = None  # why the server does not answer; empty: it does
    python: dict[str, Any] | None = None
    done: bool = False

    def of(self, kind: proof.Counted) -> proof.Tally | None:
        found = (proof.Tally.from_json(tally) for tally in self.tallies)
        return next((tally for tally in found if tally.kind == kind), None)

    def mount_there(self) -> Mount | None:
        return Mount(**{**self.mount, "options": tuple(self.mount["options"])}) if self.mount else None


def report_path(folder: Path, task: int) -> Path:
    return folder / f"report-{task}.json"


def own_path(folder: Path, task: int) -> Path:
    """The file that a task writes for the others and for the login node."""
    return folder / f"from-task-{task}"


def write_plan(folder: Path, plan: NodeTask) -> None:
    """Raises OSError."""
    _write_json(folder / PLAN, asdict(plan))


def read_report(folder: Path, task: int) -> NodeReport | None:
    """None if there is none (yet), or if it can't be read."""
    try:
        return NodeReport(**json.loads(report_path(folder, task).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def main(folder: str, _worker: int) -> None:
    """What each task of the job runs. The folder is the doctor's scratch folder, beside the runs."""
    here, task = Path(folder), int(os.environ.get("SLURM_PROCID", "0"))
    raw = json.loads((here / PLAN).read_text(encoding="utf-8"))
    plan = NodeTask(**{**raw, "paths": tuple(raw["paths"])})
    report = NodeReport(task, os.environ.get("SLURMD_NODENAME") or socket.gethostname())

    def save() -> None:
        with contextlib.suppress(OSError):  # the next one may succeed
            _write_json(report_path(here, task), asdict(report))

    for step in (_look_at_folder, _try_to_submit, _count, _look_at_needs):
        save()
        step(report, here, plan, save)
    report.done = True
    save()


def _look_at_folder(report: NodeReport, here: Path, plan: NodeTask, save: Callable[[], None]) -> None:
    mount = mount_here(here)
    report.mount = asdict(mount) if mount else None
    try:
        same = sha256_of(here / FROM_LOGIN) == plan.sha256
        report.folder_seen = "" if same else "it has other bytes than were written"
    except OSError as error:
        report.folder_seen = str(error)
    report.written_sha256 = write_random(own_path(here, report.task))


def _try_to_submit(report: NodeReport, here: Path, plan: NodeTask, save: Callable[[], None]) -> None:
    report.squeue = job_names() is not None
    report.can_submit = asdict(ask_sbatch((here / SCRIPT).read_text(encoding="utf-8")))


def _count(report: NodeReport, here: Path, plan: NodeTask, save: Callable[[], None]) -> None:
    report.met = _meet(here, plan, "count")
    if not plan.increments:
        return
    lock = LOCKS[plan.lock](here / f"{COUNTER}.lock", timeout=LOCK_TIMEOUT_S)
    save()
    report.tallies.append(proof.count_in_file(here / COUNTER, lock, plan.increments, plan.counting_s).to_json())
    save()
    _meet(here, plan, "database")
    tally = locks.count_in_database(here / DATABASE, plan.increments, plan.counting_s)
    report.tallies.append(tally.to_json())


def _meet(here: Path, plan: NodeTask, name: str) -> bool:
    """Wait until every task is here; False if one does not come."""
    task = os.environ.get("SLURM_PROCID", "0")
    (here / f"{name}-{task}").touch()
    end = time.monotonic() + MEETING_S
    while time.monotonic() < end:
        # A look at the folder itself, for what was not there a moment ago may be remembered as not being there.
        present = {entry.name for entry in here.iterdir()}
        if all(f"{name}-{other}" in present for other in range(plan.tasks)):
            return True
        time.sleep(0.02)
    return False


def _look_at_needs(report: NodeReport, here: Path, plan: NodeTask, save: Callable[[], None]) -> None:
    report.missing = [path for path in plan.paths if not os.access(path, os.R_OK)]
    if plan.database is not None:
        report.database = database_error(plan.database, here) or ""
    save()
    if plan.python and report.task == 0:
        report.python = machine.look_at_python().to_json()


def database_error(url: str, folder: Path) -> str | None:
    """Why the database server does not answer; None: it does. Changes nothing there."""
    os.environ.setdefault("PGCONNECT_TIMEOUT", "10")  # seconds; a firewall that drops packets takes minutes
    try:
        with Database(url, folder).transaction(own_lock=False) as connection:
            connection.exec_driver_sql("SELECT 1")
    except OrchError as error:
        password = urlsplit(url).password
        return str(error).replace(password, "***") if password else str(error)
    return None


def write_random(path: Path) -> str:
    """Random bytes, and their SHA-256."""
    data = secrets.token_bytes(BYTES)
    publish(path, lambda target: target.write(data))
    return hashlib.sha256(data).hexdigest()


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(value)
    publish(path, lambda target: target.write(text.encode()))
