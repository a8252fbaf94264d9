"""Jobs on a Slurm cluster, submitted through submitit, looked at through squeue and sacct."""

from __future__ import annotations

import io
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from orchestrator.cluster.protocol import JobMain
from orchestrator.cluster.sbatch import Request, advice, is_no_room, is_unreachable, refusal_of, request, too_short
from orchestrator.errors import ClusterUnreachableError, NoRoomError, SettingsError, SubmissionError
from orchestrator.files import permissions
from orchestrator.records import ChainJob, Evidence, Submitted
from orchestrator.settings.settings import Settings

COMMAND_TIMEOUT_S = 60.0
# Slurm's clean-up after a time limit (KillWait, epilog): a job is over only some time after its limit.
LEASE_MARGIN_S = 300.0
# Set for a job by Slurm itself; what is inherited from the job that submits would be wrong there.
# A job that is being killed has its grace to write a checkpoint in; one that is still "completing" after this
# long hangs on a node that does not answer, and what is left of it is kept out by the generations.
COMPLETING_S = 120.0
PER_JOB = ("CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK", "TMPDIR")

GONE = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
}  # fmt: skip
WORKING = {"RUNNING", "SUSPENDED", "STOPPED", "STAGE_OUT", "SIGNALING", "RESIZING"}
WAITING = {
    "PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT",
    "POWER_UP_NODE",
}  # fmt: skip
# Of no other state anything is known: REVOKED, for one, is a job that another cluster of a federation has started.

# The user's own filters and formats: with SQUEUE_PARTITION set, jobs that are alive would not be listed.
USER_FORMAT_VARIABLES = ("SQUEUE_", "SACCT_", "SINFO_", "SCANCEL_", "SLURM_TIME_FORMAT")
_LISTED = re.compile(r"([0-9]+(?:_[0-9]+|_\[[^|]*\])?(?:\+[0-9]+)?)\|([A-Z_0-9]+)\|([^|]*)\|(.*)")


class SlurmCluster:
    """Worker chains as Slurm jobs."""

    name = "slurm"
    chains = True

    def __init__(self, settings: Settings, run_folder: Path, entry: JobMain) -> None:
        self._settings = settings
        self._run_folder = run_folder
        self._entry = entry
        self._asked: Request | None = None

    # --- submission

    @property
    def request(self) -> Request:
        """Raises SettingsError if slurm_file can't be read."""
        if self._asked is None:
            file = self._settings.slurm_file
            try:
                self._asked = request(self._settings, Path(file).read_text(encoding="utf-8") if file else None)
            except OSError as error:
                raise SettingsError(f"slurm_file: {file}: {error.strerror or error}") from error
            except ValueError as error:
                raise SettingsError(f"slurm_file: {file}: {error}") from error
            if problem := too_short(self._asked, self._settings.eon_lifetime):
                raise SettingsError(problem)
        return self._asked

    def submit(self, jobs: Sequence[ChainJob], after: ChainJob | None) -> list[Submitted]:
        import submitit

        base = jobs[0].base
        assert all(job.token == f"{base}-{index}" for index, job in enumerate(jobs)), "one submission, one base"
        if not shutil.which("sbatch") or not shutil.which("srun"):
            raise SubmissionError(
                "sbatch or srun is not on the PATH; is this a node of the cluster? Or --executor local"
            )
        quiet = redirect_stderr(io.StringIO())  # submitit repeats sbatch's words there
        with (
            _environment_for_submission(),
            quiet,
            permissions.files_of(self._run_folder),
        ):  # sbatch takes the umask along
            try:
                executor = self.executor(base, after)
                taken = executor.map_array(self._entry, *zip(*self._arguments(jobs), strict=True))
            except submitit.core.utils.FailedJobError as error:
                raise self._refused(str(error), len(jobs)) from error
            except OSError as error:
                raise SubmissionError(f"{self._run_folder / 'jobs'}: {error.strerror or error}") from error
        return [Submitted(job.job_id, it.job_id) for job, it in zip(jobs, taken, strict=True)]

    def _arguments(self, jobs: Sequence[ChainJob]) -> Iterator[tuple[str, int]]:
        return ((str(self._run_folder), job.worker_id) for job in jobs)

    def _refused(self, output: str, count: int) -> SubmissionError:
        if is_unreachable(output):
            return ClusterUnreachableError(
                f"Slurm does not answer: {refusal_of(output)}. `orch doctor` says more; --executor local runs here"
            )
        kind = NoRoomError if is_no_room(output) else SubmissionError
        return kind(advice(output, self.request, count))

    def executor(self, base: str, after: ChainJob | None = None) -> Any:
        """submitit's executor with everything that is asked for."""
        import submitit

        asked = self.request
        if not str(self._run_folder).isprintable():  # it stands in the script's #SBATCH lines
            raise SettingsError(
                f"the run folder {str(self._run_folder)!r} has a line break or another character that can't be printed "
                "in its name, and Slurm would read it in two; choose another --runs-dir"
            )
        executor = submitit.SlurmExecutor(self._run_folder / "jobs" / base)
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
        """What srun does not take over from sbatch by itself."""
        arguments = []
        if "cpus-per-task" in self.request.options:  # since Slurm 22.05; without it a task is bound to one core
            arguments.append(f"--cpus-per-task={self.request.options['cpus-per-task']}")
        if self._settings.gpus_per_worker > 1:  # if one process dies, the others are of no use
            arguments.append("--kill-on-bad-exit=1")
        return arguments or None

    def script(self, jobs: int) -> str:
        """What sbatch would be given, to the letter but for the folder's random name."""
        executor = self.executor("dry-run")
        if jobs > 1:
            executor.parameters["map_count"] = jobs
        text: str = executor._make_submission_file_text(executor._submitit_command_str, "dry-run")
        shutil.rmtree(self._run_folder / "jobs" / "dry-run", ignore_errors=True)
        return text

    def wait_turn(self, predecessor: ChainJob | None, should_stop: Callable[[], bool]) -> None:
        return  # afterany has seen to it

    # --- what Slurm says

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
        found = {}
        for cluster_id, listed in (queue() or {}).items():
            if listed.state not in GONE:
                found[f"{listed.name.rsplit('-', 1)[-1]}-{cluster_id.partition('_')[2] or 0}"] = cluster_id
        return {job.token: found[job.token] for job in jobs if job.token in found}

    def endings(self, jobs: Sequence[ChainJob]) -> dict[int, str]:
        """How jobs ended, in Slurm's words, as far as its accounting knows; that lags, so else as squeue has it."""
        ids = [job.cluster_id for job in jobs if job.cluster_id]
        if not ids:
            return {}
        said = {i: (j.name, j.state) for i, j in (queue() or {}).items() if i in ids and j.state in GONE}
        asked = ["sacct", "-n", "-P", "-X", "-o", "JobID,State,ExitCode,JobName", "-j", ",".join(ids)]
        for line in lines_of(run_slurm(asked) if shutil.which("sacct") else None) or ():
            cluster_id, state, code, name = [*line.split("|", 3), "", "", ""][:4]  # a name may hold anything
            if state.split()[:1] and state.split()[0] in GONE:
                said[cluster_id] = (name, f"{state.split()[0]} ({code})")
        return {
            job.job_id: said[job.cluster_id][1]
            for job in jobs
            if job.cluster_id in said and said[job.cluster_id][0].endswith(job.base)
        }

    # --- control

    def cancel(self, jobs: Sequence[ChainJob], now: bool) -> list[str]:
        trouble = []
        evidence = self.evidence(jobs)
        for running in (False, True):
            ids = [
                job.cluster_id
                for job in jobs
                if job.cluster_id
                and evidence[job.job_id] is not Evidence.GONE
                and (evidence[job.job_id] is Evidence.RUNNING) == running
            ]
            if ids:
                signal = ["--signal=USR2"] if running and not now else []
                if run_slurm(["scancel", *signal, *ids]) is None:
                    trouble.append(f"Slurm did not take the cancellation of {', '.join(ids)}; try again")
        return trouble

    def back_to_queue(self, job: ChainJob) -> bool:
        """Requeue the job that this process is: where a submit limit leaves no room for a successor, the same
        job goes to the queue again. Does not return if Slurm is quick."""
        return job.cluster_id is not None and run_slurm(["scontrol", "requeue", job.cluster_id]) is not None

    # --- the job that this process is

    def working_s(self) -> float:
        return self._settings.eon_lifetime

    def latest_work_s(self) -> float:
        return max(1.0, 60.0 * self.request.time_min - self.request.signal_delay_s)

    def time_limit_s(self) -> float:
        return 60.0 * self.request.time_min + LEASE_MARGIN_S

    def cores(self) -> int:
        processes, given = self._settings.gpus_per_worker, os.environ.get("SLURM_CPUS_PER_TASK")
        if self._settings.cores_per_worker:
            return max(1, self._settings.cores_per_worker // processes)
        on_node = int(os.environ.get("SLURM_CPUS_ON_NODE", "1024"))  # of this job; not every cluster binds its tasks
        return int(given) if given else max(1, min(len(os.sched_getaffinity(0)), on_node // processes))

    def token(self) -> str:
        return f"{Path(os.environ['SUBMITIT_FOLDER']).name}-{os.environ.get('SLURM_ARRAY_TASK_ID', 0)}"

    def identity(self) -> tuple[str, str]:
        array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
        cluster_id = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
        return cluster_id, os.environ.get("SLURMD_NODENAME") or socket.gethostname()


@dataclass(frozen=True, slots=True)
class Listed:
    """A job as squeue shows it."""

    state: str
    name: str
    end: float | None  # when it ended, or will by its time limit


def judge(job: ChainJob, listed: Listed | None, now: float) -> Evidence:
    """What squeue's answer proves of a job. Its id alone proves nothing: ids are used again after a crash of
    the controller, so the name must be the one that it was given."""
    if listed is None or not listed.name.endswith(job.base) or listed.state in GONE:
        return Evidence.GONE
    if listed.state == "COMPLETING":
        hangs = listed.end is not None and now > listed.end + COMPLETING_S
        return Evidence.GONE if hangs else Evidence.RUNNING
    if listed.state in WORKING:
        return Evidence.RUNNING
    return Evidence.QUEUED if listed.state in WAITING else Evidence.UNKNOWN


def queue() -> dict[str, Listed] | None:
    """The user's jobs by id, array tasks each by itself, jobs that ended lately included.

    None if Slurm does not answer, or not in whole: that is no evidence of anything. A job that is not listed counts
    as gone, so nothing may be left out: not what is in hidden partitions (--all), not the rest of a listing that
    breaks off, and not a line that can't be read, which may be the job's.
    """
    command = ["squeue", "--me", "--all", "--noheader", "--array", "--states=all", "--format=%i|%T|%e|%j"]
    return read_queue(run_slurm(command))


def read_queue(answer: str | None) -> dict[str, Listed] | None:
    """Of the answer to `queue`'s command."""
    lines = lines_of(answer)
    if lines is None:
        return None
    jobs: dict[str, Listed] = {}
    for line in lines:
        match = _LISTED.fullmatch(line)
        if match is None:
            return None
        cluster_id, state, end, name = match.groups()
        if cluster_id not in jobs or state in WORKING | WAITING:  # a federation may list it once for each cluster
            jobs[cluster_id] = Listed(state, name, _when(end))
    return jobs


def lines_of(answer: str | None) -> list[str] | None:
    """Of a listing; None if there is none, or if it breaks off: each line ends with a newline. (str.splitlines
    would split at other characters too, which a job's name may hold.)"""
    if answer is None:
        return None
    *lines, rest = answer.split("\n")
    return None if rest else lines


def _when(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):  # N/A, or a year that no clock has
        return None


def run_slurm(command: Sequence[str]) -> str | None:
    """A Slurm command's output, or None if it failed, took too long, or says that it was not answered (some do so
    and exit with 0)."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(USER_FORMAT_VARIABLES)}
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=COMMAND_TIMEOUT_S,
            check=True,
            env=environment,
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    complaint = done.stderr.decode("utf-8", "replace")
    if is_unreachable(complaint) or "slurm_load_" in complaint:
        return None
    return done.stdout.decode("utf-8", "replace")  # names of other jobs may be in any encoding


@contextmanager
def _environment_for_submission() -> Iterator[None]:
    """A job that submits a job must not pass its own allocation on; where the cluster is, it must."""
    from submitit.helpers import clean_env

    conf = os.environ.get("SLURM_CONF")
    with clean_env(extra_names=PER_JOB):
        if conf is not None:
            os.environ["SLURM_CONF"] = conf
        yield
