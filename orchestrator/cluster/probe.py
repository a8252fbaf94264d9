"""For `orch doctor`: run one short job on several nodes, and test whether sbatch would accept a script."""

from __future__ import annotations

import getpass
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.cluster.protocol import JobMain
from orchestrator.cluster.sbatch import refusal_of, refused
from orchestrator.cluster.slurm import COMMAND_TIMEOUT_S, GONE, SlurmQueue, lines_of, run_slurm, submission_environment
from orchestrator.errors import Refusal, SubmissionError
from orchestrator.settings.settings import Settings

POLL_S = 1.0
CANCEL_WAIT_S = 30.0


@dataclass(frozen=True, slots=True)
class Answer:
    """sbatch's answer to `sbatch --test-only`."""

    taken: bool
    said: str

    @property
    def refusal(self) -> Refusal | None:
        """Why sbatch refused the script; None if sbatch accepted it."""
        return None if self.taken else refusal_of(self.said)


def ask_sbatch(script: str) -> Answer:
    """Test whether sbatch would accept this script, without queueing it. An error counts as a refusal."""
    try:
        with submission_environment():
            command = ["sbatch", "--test-only"]
            done = subprocess.run(command, input=script, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        return Answer(False, f"{type(error).__name__}: {error}")
    return Answer(done.returncode == 0, (done.stderr + done.stdout).strip())


def job_names() -> list[str] | None:
    """Return the names of the user's jobs in the queue, one per array task; None if Slurm does not answer."""
    answer = run_slurm(["squeue", "--me", "--noheader", "--array", "--format=%j"])
    return None if answer is None else answer.split("\n")[:-1]


@dataclass(frozen=True, slots=True)
class ProbeState:
    """A job's state in Slurm. state: "" if Slurm no longer knows the job, None if Slurm does not answer."""

    state: str | None
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.state or 'not known'}{f' ({self.reason})' if self.reason not in ('', 'None') else ''}"

    @property
    def over(self) -> bool:
        return self.state is not None and (self.state == "" or self.state in GONE)


class ProbeJob:
    """A probe job that was submitted to Slurm."""

    def __init__(self, cluster_id: str) -> None:
        self.cluster_id = cluster_id

    def state(self) -> ProbeState:
        lines = lines_of(run_slurm(["squeue", "--me", "--all", "--noheader", "--states=all", "--format=%i|%T|%r"]))
        if lines is None:
            return ProbeState(None)
        for line in lines:
            cluster_id, state, reason = [*line.split("|", 2), "", ""][:3]
            if line.count("|") < 2 or not cluster_id or not state:
                return ProbeState(None)  # this malformed line may describe the job
            if cluster_id == self.cluster_id:
                return ProbeState(state, reason)
        return ProbeState("")


@contextmanager
def probe_job(
    settings: Settings, folder: Path, entry: JobMain, *, nodes: int, tasks: int, time_min: int, wait_s: float
) -> Iterator[ProbeJob]:
    """Queue a job that has a worker's sbatch options and calls entry(folder, 0) in each of its tasks. At the end of the
    block, cancel the job and wait until it has ended.

    tasks: how many tasks the job has on all nodes together. time_min: the job's time limit. wait_s: how long the caller
    waits for the job to start. If the caller is killed and can't cancel the job, Slurm removes the job at its deadline.
    Raises SubmissionError and SettingsError.
    """
    import submitit

    name = f"orch-doctor-{folder.name.rsplit('-', 1)[-1]}"
    queue = SlurmQueue(settings, folder, entry)
    try:
        with submission_environment():
            executor = queue.executor("doctor")
            executor.update_parameters(
                job_name=name,
                nodes=nodes,
                ntasks_per_node=tasks // nodes,
                time=time_min,
                additional_parameters=_options(queue.request.options, round(wait_s) + 60 * time_min + 60),
            )
            try:
                job_id = str(executor.submit(entry, str(folder), 0).job_id)
            except submitit.core.utils.FailedJobError as error:
                raise refused(str(error), replace(queue.request, time_min=time_min), 1) from error
            except OSError as error:
                raise SubmissionError(f"{folder}: {error.strerror or error}") from error
        yield ProbeJob(job_id)
    finally:
        _cancel(name)


def _options(asked: Mapping[str, Any], deadline_s: int) -> dict[str, Any]:
    """Return a worker's options with a deadline, without requeue or delayed start, and with GPUs requested per node."""
    options = {name: value for name, value in asked.items() if name not in ("requeue", "time-min", "begin")}
    if "gpus" in options:
        options.setdefault("gpus-per-node", options.pop("gpus"))
    return options | {"no-requeue": True, "deadline": f"now+{deadline_s}"}


def _cancel(name: str) -> None:
    """Cancel the job by name, since its id may be unknown, and wait up to CANCEL_WAIT_S seconds until it has ended."""
    mine = ["--user", getpass.getuser(), "--name", name]
    end = time.monotonic() + CANCEL_WAIT_S
    while time.monotonic() < end:
        left = run_slurm(["squeue", "--noheader", "--format=%i", *mine])
        if left is not None and not left.strip():
            return
        run_slurm(["scancel", *mine])
        time.sleep(POLL_S)
