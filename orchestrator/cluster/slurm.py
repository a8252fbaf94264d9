"""Run jobs on a Slurm cluster: submit them through submitit, and list them with squeue and sacct."""

from __future__ import annotations

import io
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from orchestrator.cluster.host import job_python
from orchestrator.cluster.protocol import JobMain, JobQueue, ThisJob
from orchestrator.cluster.sbatch import Request, refusal_of, refused, request, too_short
from orchestrator.errors import Refusal, SettingsError, SubmissionError
from orchestrator.files import permissions
from orchestrator.files.run_folder import JOBS
from orchestrator.records import ChainJob, Evidence, Submitted
from orchestrator.settings.settings import Settings

COMMAND_TIMEOUT_S = 60.0
# After a job's time limit, Slurm still cleans up (KillWait, epilog), so the job may end later than its limit.
LEASE_MARGIN_S = 300.0
# A job that Slurm still lists as COMPLETING this long after its end counts as gone, since its node does not respond. If
# the job's process is alive after all, the database refuses its writes, because their generation is too old.
COMPLETING_S = 120.0
# Slurm sets these for each job; a successor must not inherit the values of the job that submits it.
PER_JOB = ("CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK", "TMPDIR")

GONE = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
}  # fmt: skip
WORKING = {"RUNNING", "SUSPENDED", "STOPPED", "STAGE_OUT", "SIGNALING", "RESIZING"}
WAITING = {
    "PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT",
    "POWER_UP_NODE",
}  # fmt: skip
# Other states do not show whether a job is alive. A job that is REVOKED here, for example, was started by another
# cluster of the federation.

# Prefixes of environment variables that change Slurm's output: SQUEUE_PARTITION, for example, would hide live jobs.
USER_FORMAT_VARIABLES = ("SQUEUE_", "SACCT_", "SINFO_", "SCANCEL_", "SLURM_TIME_FORMAT")
_LISTED = re.compile(r"([0-9]+(?:_[0-9]+|_\[[^|]*\])?(?:\+[0-9]+)?)\|([A-Z_0-9]+)\|([^|]*)\|(.*)")


def read_request(settings: Settings) -> Request:
    """Return the sbatch request defined by the settings and slurm_file. Raises SettingsError if either is invalid."""
    file = settings.slurm_file
    try:
        asked = request(settings, Path(file).read_text(encoding="utf-8") if file else None)
    except OSError as error:
        raise SettingsError(f"slurm_file: {file}: {error.strerror or error}") from error
    except ValueError as error:
        raise SettingsError(f"slurm_file: {file}: {error}") from error
    if problem := too_short(asked, settings.eon_lifetime):
        raise SettingsError(problem)
    return asked


class SlurmQueue(JobQueue):
    """Worker chains as Slurm jobs."""

    name = "slurm"

    def __init__(self, settings: Settings, run_folder: Path, job_main: JobMain) -> None:
        self._settings = settings
        self._run_folder = run_folder
        self._job_main = job_main

    # --- submission

    @cached_property
    def request(self) -> Request:
        """See `read_request`."""
        return read_request(self._settings)

    def submit(self, jobs: Sequence[ChainJob], after: ChainJob | None) -> list[Submitted]:
        import submitit

        base = jobs[0].base
        assert all(job.token == f"{base}-{index}" for index, job in enumerate(jobs)), "one submission, one base"
        if not shutil.which("sbatch") or not shutil.which("srun"):
            raise SubmissionError(
                "sbatch or srun is not on the PATH; run this on a node of the cluster, or use --executor local"
            )
        folders, workers = [str(self._run_folder)] * len(jobs), [job.worker_id for job in jobs]
        quiet = redirect_stderr(io.StringIO())  # otherwise submitit prints sbatch's message a second time
        with submission_environment(), quiet, permissions.files_of(self._run_folder):  # the jobs inherit the umask
            try:
                taken = self.executor(base, after).map_array(self._job_main, folders, workers)
            except submitit.core.utils.FailedJobError as error:
                raise refused(str(error), self.request, len(jobs)) from error
            except OSError as error:
                raise SubmissionError(f"{self._run_folder / JOBS}: {error.strerror or error}") from error
        return [Submitted(job.job_id, it.job_id) for job, it in zip(jobs, taken, strict=True)]

    def executor(self, base: str, after: ChainJob | None = None) -> Any:
        """Return submitit's executor for one submission. base: name of its job folder. after: the job to wait for."""
        import submitit

        asked = self.request
        if not str(self._run_folder).isprintable():  # the script's #SBATCH lines contain it
            raise SettingsError(
                f"the name of the run folder {str(self._run_folder)!r} contains a line break or another "
                "unprintable character, which Slurm can't handle; choose another --runs-dir"
            )
        executor = submitit.SlurmExecutor(self._run_folder / JOBS / base, python=job_python())
        executor.update_parameters(
            job_name=f"orch-{self._settings.name}-{base}",
            time=asked.time_min,
            signal_delay_s=asked.signal_delay_s,
            ntasks_per_node=self._settings.gpus_per_worker,
            setup=list(asked.setup) or None,
            dependency=f"afterany:{after.cluster_id}" if after is not None else None,
            array_parallelism=self._settings.slurm.throttle or 1000,
            stderr_to_stdout=True,
            wckey=None,
            srun_args=self._srun_args(),
            additional_parameters=dict(asked.options),
        )
        return executor

    def _srun_args(self) -> list[str] | None:
        """Return the options for srun that it does not inherit from sbatch."""
        arguments = []
        if "cpus-per-task" in self.request.options:  # without this, since Slurm 22.05, a task gets one core
            arguments.append(f"--cpus-per-task={self.request.options['cpus-per-task']}")
        if self._settings.gpus_per_worker > 1:  # if one process dies, the others can't continue
            arguments.append("--kill-on-bad-exit=1")
        return arguments or None

    def script(self, jobs: int) -> str:
        """Return the script that would be submitted; only the random name of the job folder differs."""
        executor = self.executor("dry-run")
        if jobs > 1:
            executor.parameters["map_count"] = jobs
        text: str = executor._make_submission_file_text(executor._submitit_command_str, "dry-run")
        shutil.rmtree(self._run_folder / JOBS / "dry-run", ignore_errors=True)
        return text

    # --- state of jobs

    def evidence(self, jobs: Sequence[ChainJob]) -> dict[int, Evidence]:
        if not jobs:
            return {}
        listed = queue()
        if listed is None:
            return {job.job_id: Evidence.UNKNOWN for job in jobs}
        return {job.job_id: judge(job, listed.get(job.cluster_id or ""), time.time()) for job in jobs}

    def find(self, jobs: Sequence[ChainJob]) -> dict[str, str]:
        if not jobs:
            return {}
        ids = {}  # cluster ids by token
        for cluster_id, listed in (queue() or {}).items():
            if listed.state not in GONE:
                ids[f"{listed.name.rsplit('-', 1)[-1]}-{cluster_id.partition('_')[2] or 0}"] = cluster_id
        return {job.token: ids[job.token] for job in jobs if job.token in ids}

    def endings(self, jobs: Sequence[ChainJob]) -> dict[int, str]:
        """Read endings from Slurm's accounting, or from squeue for jobs that accounting does not have yet."""
        ids = [job.cluster_id for job in jobs if job.cluster_id]
        if not ids:
            return {}
        ended = {i: (j.name, j.state) for i, j in (queue() or {}).items() if i in ids and j.state in GONE}
        command = ["sacct", "-n", "-P", "-X", "-o", "JobID,State,ExitCode,JobName", "-j", ",".join(ids)]
        for line in lines_of(run_slurm(command) if shutil.which("sacct") else None) or ():
            cluster_id, state, code, name = [*line.split("|", 3), "", "", ""][:4]  # last: a name may contain |
            if state.split()[:1] and state.split()[0] in GONE:
                ended[cluster_id] = (name, f"{state.split()[0]} ({code})")
        return {
            job.job_id: ended[job.cluster_id][1]
            for job in jobs
            if job.cluster_id in ended and ended[job.cluster_id][0].endswith(job.base)
        }

    # --- control

    def cancel(self, jobs: Sequence[ChainJob], now: bool) -> list[str]:
        trouble = []
        evidence = self.evidence(jobs)
        known = [(job.cluster_id, evidence[job.job_id]) for job in jobs if job.cluster_id]
        running = [cluster_id for cluster_id, state in known if state is Evidence.RUNNING]
        others = [cluster_id for cluster_id, state in known if state in (Evidence.QUEUED, Evidence.UNKNOWN)]
        for ids, signal in ((others, []), (running, [] if now else ["--signal=USR2"])):
            if ids and run_slurm(["scancel", *signal, *ids]) is None:
                trouble.append(f"scancel {', '.join(ids)} failed; try again")
        return trouble

    def back_to_queue(self, job: ChainJob) -> bool:
        """Requeue the job. If Slurm kills this process first, this method does not return."""
        return job.cluster_id is not None and run_slurm(["scontrol", "requeue", job.cluster_id]) is not None


class SlurmJob(ThisJob):
    """The Slurm job that this process belongs to."""

    def latest_work_s(self) -> float:
        asked = read_request(self.settings)
        return max(1.0, 60.0 * asked.time_min - asked.signal_delay_s)

    def time_limit_s(self) -> float:
        return 60.0 * read_request(self.settings).time_min + LEASE_MARGIN_S

    def cores(self) -> int:
        processes, given = self.settings.gpus_per_worker, os.environ.get("SLURM_CPUS_PER_TASK")
        if self.settings.cores_per_worker:
            return max(1, self.settings.cores_per_worker // processes)
        on_node = int(os.environ.get("SLURM_CPUS_ON_NODE", "1024"))  # the limit for unbound tasks, which see all cores
        return int(given) if given else max(1, min(len(os.sched_getaffinity(0)), on_node // processes))

    def token(self) -> str:
        return f"{Path(os.environ['SUBMITIT_FOLDER']).name}-{os.environ.get('SLURM_ARRAY_TASK_ID', 0)}"

    def identity(self) -> tuple[str, str]:
        array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
        cluster_id = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
        return cluster_id, os.environ.get("SLURMD_NODENAME") or socket.gethostname()


@dataclass(frozen=True, slots=True)
class Listed:
    """A job in squeue's listing."""

    state: str
    name: str
    end: float | None  # Unix time when the job ended or will reach its time limit


def judge(job: ChainJob, listed: Listed | None, now: float) -> Evidence:
    """Decide from squeue's answer whether a job is queued, running or gone. The listed name must match too, because
    Slurm may reuse the job's id after a crash of its controller."""
    if listed is None or not listed.name.endswith(job.base) or listed.state in GONE:
        return Evidence.GONE
    if listed.state == "COMPLETING":
        hangs = listed.end is not None and now > listed.end + COMPLETING_S
        return Evidence.GONE if hangs else Evidence.RUNNING
    if listed.state in WORKING:
        return Evidence.RUNNING
    return Evidence.QUEUED if listed.state in WAITING else Evidence.UNKNOWN


def queue() -> dict[str, Listed] | None:
    """Return the user's jobs by id, one per array task, including jobs that ended recently.

    Callers treat a job that is missing here as gone, so the list must be complete: --all adds hidden partitions.
    Returns None if Slurm does not answer, or if the list is cut off or has an unreadable line.
    """
    command = ["squeue", "--me", "--all", "--noheader", "--array", "--states=all", "--format=%i|%T|%e|%j"]
    return read_queue(run_slurm(command))


def read_queue(answer: str | None) -> dict[str, Listed] | None:
    """Parse the output of the squeue command in `queue`."""
    lines = lines_of(answer)
    if lines is None:
        return None
    jobs: dict[str, Listed] = {}
    for line in lines:
        match = _LISTED.fullmatch(line)
        if match is None:
            return None
        cluster_id, state, end, name = match.groups()
        if cluster_id not in jobs or state in WORKING | WAITING:  # a federation may list a job twice: keep the live one
            jobs[cluster_id] = Listed(state, name, _when(end))
    return jobs


def lines_of(answer: str | None) -> list[str] | None:
    """Return the lines of an answer; None if the answer is None or was cut off before its last newline. Does not use
    str.splitlines, which also splits at other characters that a job's name may contain."""
    if answer is None:
        return None
    *lines, rest = answer.split("\n")
    return None if rest else lines


def _when(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):  # N/A, or a year out of range
        return None


def run_slurm(command: Sequence[str]) -> str | None:
    """Return what a Slurm command printed; None if the command failed or timed out, or the controller did not answer.
    stderr is checked too, because some commands exit with 0 although the controller did not answer."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(USER_FORMAT_VARIABLES)}
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=COMMAND_TIMEOUT_S, check=True, env=env
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    errors = done.stderr.decode("utf-8", "replace")
    if refusal_of(errors) is Refusal.UNREACHABLE or "slurm_load_" in errors:
        return None
    return done.stdout.decode("utf-8", "replace")  # job names may be in any encoding


@contextmanager
def submission_environment() -> Iterator[None]:
    """Inside the block, remove the environment variables that describe this process's own job. Keep SLURM_CONF, which
    locates the cluster."""
    from submitit.helpers import clean_env

    conf = os.environ.get("SLURM_CONF")
    with clean_env(extra_names=PER_JOB):
        if conf is not None:
            os.environ["SLURM_CONF"] = conf
        yield
