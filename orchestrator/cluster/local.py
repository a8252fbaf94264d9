"""Run jobs as processes on this machine, through submitit's local executor.

The local executor has no queue, so a successor's process starts at once, but it begins to work only after the
predecessor's process has ended. If the predecessor runs past its hard end, the waiting successor kills it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from orchestrator.cluster.host import (
    SAFE_PATH,
    SET_BY_ORCH,
    created_at,
    find_process,
    host_name,
    job_python,
    send_signal,
)
from orchestrator.cluster.protocol import JobMain, JobQueue, ThisJob
from orchestrator.errors import SubmissionError
from orchestrator.files import permissions
from orchestrator.files.run_folder import JOBS
from orchestrator.records import ChainJob, Evidence, JobState, Submitted
from orchestrator.settings.settings import Settings

GRACE_S = 60.0  # seconds between the end of a job's working time and its hard end
_POLL_S = 0.5
_children: list[Any] = []  # Popen objects; Python warns if one is deleted while its process runs


def hard_end_s(settings: Settings) -> float:
    """Return the seconds from the start of a local job to its hard end."""
    return settings.eon_lifetime + GRACE_S


class ProcessQueue(JobQueue):
    """A queue whose jobs are processes on this machine."""

    def evidence(self, jobs: Sequence[ChainJob]) -> dict[int, Evidence]:
        return {job.job_id: _evidence(job) for job in jobs}

    def cancel(self, jobs: Sequence[ChainJob], now: bool) -> list[str]:
        trouble = []
        for job in jobs:
            if _evidence(job) is Evidence.UNKNOWN:
                trouble.append(f"job {job.cluster_id} of worker {job.worker_id} is on {job.host}: end it there")
            else:
                # A queued job's pid belongs to submitit's controller, which can forward only SIGTERM to the job.
                kill = now and job.state in (JobState.RUNNING, JobState.ENDED)
                send_signal(job.pid, job.pid_created_at, signal.SIGKILL if kill else signal.SIGTERM)
        return trouble


def _evidence(job: ChainJob) -> Evidence:
    if job.state is JobState.SUBMITTING:
        return Evidence.GONE  # the submitter has died or will soon store the pid; callers allow a grace period
    if job.host is None or job.pid is None or job.host.split("/")[0] != host_name().split("/")[0]:
        return Evidence.UNKNOWN  # the processes of another machine can't be seen from here
    if job.host != host_name():
        return Evidence.GONE  # this machine has restarted since the job started
    if find_process(job.pid, job.pid_created_at) is None:
        return Evidence.GONE
    return Evidence.RUNNING if job.state is JobState.RUNNING else Evidence.QUEUED


class LocalQueue(ProcessQueue):
    """Worker chains on this machine."""

    name = "local"

    def __init__(self, settings: Settings, run_folder: Path, job_main: JobMain) -> None:
        self._settings = settings
        self._run_folder = run_folder
        self._job_main = job_main

    def submit(self, jobs: Sequence[ChainJob], after: ChainJob | None) -> list[Submitted]:
        import submitit
        from submitit.helpers import clean_env

        taken: list[Submitted] = []
        # submitit's timeout starts with the process, so it must also cover the wait for the predecessor.
        limit_s = 2 * hard_end_s(self._settings) + GRACE_S
        try:
            with permissions.files_of(self._run_folder):
                for job in jobs:
                    executor = submitit.LocalExecutor(self._run_folder / JOBS / job.token, python=job_python())
                    executor.update_parameters(
                        timeout_min=limit_s / 60,
                        signal_delay_s=int(GRACE_S),
                        stderr_to_stdout=True,
                        tasks_per_node=self._settings.gpus_per_worker,
                    )
                    with clean_env(), _detached():
                        started = executor.submit(self._job_main, str(self._run_folder), job.worker_id)
                    _children[:] = [c for c in _children if c.poll() is None]  # poll() reaps ended processes
                    _children.append(started._process)  # type: ignore[attr-defined]  # LocalJob has it
                    pid = int(started.job_id)
                    taken.append(Submitted(job.job_id, str(pid), pid, created_at(pid), host_name()))
        except (OSError, subprocess.SubprocessError) as error:
            for done in taken:
                send_signal(done.pid, done.pid_created_at, signal.SIGKILL)
            raise SubmissionError(f"a local job can't be started: {error}") from error
        return taken


class LocalJob(ThisJob):
    """A process started by submitit's local executor."""

    def token(self) -> str:
        return Path(os.environ["SUBMITIT_FOLDER"]).name

    def identity(self) -> tuple[str, str]:
        return os.environ.get("SUBMITIT_LOCAL_JOB_ID", str(os.getpid())), host_name()

    def cores(self) -> int:
        cores = self.settings.cores_per_worker or len(os.sched_getaffinity(0)) // self.settings.workers
        return max(1, cores // self.settings.gpus_per_worker)

    def latest_work_s(self) -> float:
        return self.settings.eon_lifetime + GRACE_S / 2

    def time_limit_s(self) -> float:
        return hard_end_s(self.settings)

    def wait_turn(self, predecessor: ChainJob | None, should_stop: Callable[[], bool]) -> None:
        if predecessor is None or predecessor.host != host_name() or predecessor.pid is None:
            return
        process = find_process(predecessor.pid, predecessor.pid_created_at)
        hard_end = (predecessor.started_at or time.time()) + self.time_limit_s()
        while process is not None and not should_stop():
            try:
                process.wait(timeout=_POLL_S)
                return
            except psutil.TimeoutExpired:
                process = find_process(predecessor.pid, predecessor.pid_created_at)
            if time.time() > hard_end:
                send_signal(predecessor.pid, predecessor.pid_created_at, signal.SIGKILL)


@contextmanager
def _detached() -> Iterator[None]:
    """Let processes started inside the block outlive this process's terminal and pipes.

    Children inherit ignored signals, so Ctrl-C or closing the terminal ends `orch launch --wait` but not the jobs.
    Children also inherit stdin, stdout and stderr, so /dev/null replaces these three: otherwise `orch launch | tee log`
    would wait for all jobs.
    """
    in_main = threading.current_thread() is threading.main_thread()  # Python can set signal handlers only there
    plain = (signal.SIG_DFL, signal.default_int_handler)
    signals = [s for s in (signal.SIGINT, signal.SIGHUP) if in_main and signal.getsignal(s) in plain]
    had = {s: signal.signal(s, signal.SIG_IGN) for s in signals}
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    safe_path = os.environ.get(SAFE_PATH)
    os.environ.setdefault(SAFE_PATH, SET_BY_ORCH)  # for submitit's controller; the job removes it
    kept = [os.dup(fd) for fd in range(3)]
    null = os.open(os.devnull, os.O_RDWR)
    try:
        for fd in range(3):
            os.dup2(null, fd)
        yield
    finally:
        for fd, copy in enumerate(kept):
            os.dup2(copy, fd)
            os.close(copy)
        os.close(null)
        if safe_path is None:
            del os.environ[SAFE_PATH]
        for signum, handler in had.items():
            signal.signal(signum, handler)
