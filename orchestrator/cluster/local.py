"""Jobs as processes of this machine, through submitit's local executor; and none at all, inline.

The local executor has no queue, so a successor is started at once, waits for its predecessor's process to
end (however it ends), and only then begins. It also does what a cluster does at the time limit: a
predecessor that is past its hard end is killed.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from orchestrator.cluster import Entry
from orchestrator.errors import SubmissionError
from orchestrator.files import permissions
from orchestrator.records import Evidence, Job, JobState, Submitted
from orchestrator.settings.settings import Settings

GRACE_S = 60.0  # between the end of a job's working time and its hard end
_POLL_S = 0.5
_children: list[Any] = []  # they may outlive this process, and Python must not warn of that while it lives


class LocalCluster:
    """Worker chains on this machine."""

    name = "local"
    chains = True

    def __init__(self, settings: Settings, run_folder: Path, entry: Entry) -> None:
        self._settings = settings
        self._run_folder = run_folder
        self._entry = entry

    def submit(self, jobs: Sequence[Job], after: Job | None) -> list[Submitted]:
        import submitit
        from submitit.helpers import clean_env

        taken: list[Submitted] = []
        try:
            with permissions.files_of(self._run_folder):
                for job in jobs:
                    executor = submitit.LocalExecutor(self._run_folder / "jobs" / job.token)
                    # submitit counts from the start of the process, so the wait for the predecessor is included.
                    limit_s = 2 * self.time_limit_s() + GRACE_S
                    executor.update_parameters(
                        timeout_min=limit_s / 60,
                        signal_delay_s=int(GRACE_S),
                        stderr_to_stdout=True,
                        tasks_per_node=self._settings.gpus_per_worker,
                    )
                    with clean_env(), _detached():
                        started = executor.submit(self._entry, str(self._run_folder), job.worker_id)
                    _children[:] = [c for c in _children if c.poll() is None]  # asking reaps those that ended
                    _children.append(started._process)  # type: ignore[attr-defined]  # LocalJob has it
                    pid = int(started.job_id)
                    taken.append(Submitted(job.job_id, str(pid), pid, _created_at(pid), host_name()))
        except (OSError, subprocess.SubprocessError) as error:
            for done in taken:
                _signal(done.pid, done.pid_created_at, signal.SIGKILL)
            raise SubmissionError(f"a local job can't be started: {error}") from error
        return taken

    def wait_turn(self, predecessor: Job | None, should_stop: Callable[[], bool]) -> None:
        if predecessor is None or predecessor.host != host_name() or predecessor.pid is None:
            return
        process = _process(predecessor.pid, predecessor.pid_created_at)
        hard_end = (predecessor.started_at or time.time()) + self.time_limit_s()
        while process is not None and not should_stop():
            try:
                process.wait(timeout=_POLL_S)
                return
            except psutil.TimeoutExpired:
                process = _process(predecessor.pid, predecessor.pid_created_at)
            if time.time() > hard_end:
                _signal(predecessor.pid, predecessor.pid_created_at, signal.SIGKILL)

    def evidence(self, jobs: Sequence[Job]) -> dict[int, Evidence]:
        return {job.job_id: self._evidence(job) for job in jobs}

    def _evidence(self, job: Job) -> Evidence:
        if job.state is JobState.SUBMITTING:
            return Evidence.GONE  # its submitter died; it may be believed after the usual grace only
        if job.host is None or job.pid is None or job.host.split("/")[0] != host_name().split("/")[0]:
            return Evidence.UNKNOWN  # another machine's processes can't be seen from here
        if job.host != host_name():
            return Evidence.GONE  # this machine was started anew since
        if _process(job.pid, job.pid_created_at) is None:
            return Evidence.GONE
        return Evidence.RUNNING if job.state is JobState.RUNNING else Evidence.QUEUED

    def find(self, jobs: Sequence[Job]) -> dict[str, str]:
        return {}

    def cancel(self, jobs: Sequence[Job], now: bool) -> list[str]:
        trouble = []
        for job in jobs:
            if self._evidence(job) is Evidence.UNKNOWN:
                trouble.append(f"job {job.cluster_id} of worker {job.worker_id} is on {job.host}: end it there")
            else:
                # Of a queued job the process is submitit's controller, which hands the signal on to the one that waits.
                kill = now and job.state in (JobState.RUNNING, JobState.ENDED)
                _signal(job.pid, job.pid_created_at, signal.SIGKILL if kill else signal.SIGTERM)
        return trouble

    def endings(self, jobs: Sequence[Job]) -> dict[int, str]:
        return {}

    def back_to_queue(self, job: Job) -> bool:
        return False  # there is always room here

    def working_s(self) -> float:
        return self._settings.eon_lifetime

    def latest_work_s(self) -> float:
        return self._settings.eon_lifetime + GRACE_S / 2

    def time_limit_s(self) -> float:
        return self._settings.eon_lifetime + GRACE_S

    def token(self) -> str:
        return Path(os.environ["SUBMITIT_FOLDER"]).name

    def cores(self) -> int:
        cores = self._settings.cores_per_worker or len(os.sched_getaffinity(0)) // self._settings.workers
        return max(1, cores // self._settings.gpus_per_worker)

    def identity(self) -> tuple[str, str]:
        return os.environ.get("SUBMITIT_LOCAL_JOB_ID", str(os.getpid())), host_name()


class InlineCluster:
    """One worker in this process; it has no successor and no end but the run's."""

    name = "inline"
    chains = False

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def submit(self, jobs: Sequence[Job], after: Job | None) -> list[Submitted]:
        return [Submitted(job.job_id, str(os.getpid()), *this_process(), host_name()) for job in jobs]

    def wait_turn(self, predecessor: Job | None, should_stop: Callable[[], bool]) -> None:
        return

    def evidence(self, jobs: Sequence[Job]) -> dict[int, Evidence]:
        return LocalCluster.evidence(self, jobs)  # type: ignore[arg-type]  # the same processes

    _evidence = LocalCluster._evidence

    def find(self, jobs: Sequence[Job]) -> dict[str, str]:
        return {}

    cancel = LocalCluster.cancel

    endings = LocalCluster.endings
    back_to_queue = LocalCluster.back_to_queue
    token = LocalCluster.token

    def working_s(self) -> float:
        return self._settings.total_lifetime

    latest_work_s = working_s

    def time_limit_s(self) -> float:
        return self._settings.total_lifetime

    def cores(self) -> int:
        return self._settings.cores_per_worker or len(os.sched_getaffinity(0))

    def identity(self) -> tuple[str, str]:
        return str(os.getpid()), host_name()


def gpus() -> list[str]:
    """The GPUs that this process may use, as values for CUDA_VISIBLE_DEVICES. Imports no torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip() and name.strip() != "-1"]
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return listed.stdout.split()


def gpus_of(workers: Sequence[int], each: int) -> list[str | None]:
    """What each of these workers gets of them, as a value for CUDA_VISIBLE_DEVICES; None if not even one worker
    can have so many."""
    found = gpus()
    shares = [",".join(found[i : i + each]) for i in range(0, len(found) - each + 1, each)]
    return [shares[worker % len(shares)] if shares else None for worker in workers]


def host_name() -> str:
    """This machine and its boot: after a restart no process of before is alive."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}/{boot.read_text()[:8] if boot.exists() else ''}"


def this_process() -> tuple[int, float]:
    """(pid, start time): together they are never used twice."""
    return os.getpid(), psutil.Process().create_time()


def _created_at(pid: int) -> float | None:
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return None


def _process(pid: int, created_at: float | None) -> psutil.Process | None:
    """The process if it is alive and the same one; a zombie is dead."""
    try:
        process = psutil.Process(pid)
        if created_at is not None and abs(process.create_time() - created_at) > 0.5:
            return None
        return None if process.status() == psutil.STATUS_ZOMBIE else process
    except psutil.NoSuchProcess:
        return None


def _signal(pid: int | None, created_at: float | None, signum: signal.Signals) -> None:
    process = None if pid is None else _process(pid, created_at)
    if process is not None:
        try:
            process.send_signal(signum)
        except psutil.NoSuchProcess:
            return


@contextmanager
def _detached() -> Iterator[None]:
    """What is started inside outlives the terminal and the pipes of this process.

    A child inherits the signals that are ignored (so Ctrl-C and a closed terminal end `orch launch --wait`,
    not the jobs) and the standard files (so `orch launch | tee log` would wait for the last job to close them).
    """
    in_main = threading.current_thread() is threading.main_thread()  # signals can be set nowhere else
    plain = (signal.SIG_DFL, signal.default_int_handler)
    signals = [s for s in (signal.SIGINT, signal.SIGHUP) if in_main and signal.getsignal(s) in plain]
    had = {s: signal.signal(s, signal.SIG_IGN) for s in signals}
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    kept = [os.dup(fd) for fd in range(3)]
    nothing = os.open(os.devnull, os.O_RDWR)
    try:
        for fd in range(3):
            os.dup2(nothing, fd)
        yield
    finally:
        for fd, copy in enumerate(kept):
            os.dup2(copy, fd)
            os.close(copy)
        os.close(nothing)
        for signum, handler in had.items():
            signal.signal(signum, handler)
