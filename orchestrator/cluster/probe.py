"""One short job of the doctor's, on several nodes at once; and what sbatch would say to a script."""

from __future__ import annotations

import getpass
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.cluster.protocol import JobMain
from orchestrator.cluster.sbatch import advice, is_no_room, is_unreachable, refusal_of
from orchestrator.cluster.slurm import (
    COMMAND_TIMEOUT_S,
    GONE,
    SlurmCluster,
    _environment_for_submission,
    lines_of,
    run_slurm,
)
from orchestrator.errors import ClusterUnreachableError, NoRoomError, SubmissionError
from orchestrator.settings.settings import Settings

POLL_S = 1.0
CANCEL_WAIT_S = 30.0


@dataclass(frozen=True, slots=True)
class Answer:
    """sbatch's, to a script that it was not to queue."""

    taken: bool
    said: str

    @property
    def unreachable(self) -> bool:
        return not self.taken and is_unreachable(self.said)

    @property
    def no_room(self) -> bool:
        """Is a submit limit why, and nothing in the script?"""
        return not self.taken and is_no_room(self.said)


def ask_sbatch(script: str) -> Answer:
    """Would sbatch take this script, here and now? Queues nothing. Never raises: its failure is an answer."""
    try:
        with _environment_for_submission():
            done = subprocess.run(
                ["sbatch", "--test-only"],
                input=script,
                capture_output=True,
                text=True,
                timeout=COMMAND_TIMEOUT_S,
                check=False,
            )
    except (OSError, subprocess.SubprocessError) as error:
        return Answer(False, f"{type(error).__name__}: {error}")
    return Answer(done.returncode == 0, (done.stderr + done.stdout).strip())


def job_names() -> list[str] | None:
    """Of the user's jobs in the queue, array tasks each by itself. None if Slurm does not answer."""
    answer = run_slurm(["squeue", "--me", "--noheader", "--array", "--format=%j"])
    return None if answer is None else answer.split("\n")[:-1]


@dataclass(frozen=True, slots=True)
class ProbeState:
    """What Slurm says of the job; state is empty if it knows it no more, None if Slurm does not answer."""

    state: str | None
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.state or 'not known'}{f' ({self.reason})' if self.reason not in ('', 'None') else ''}"

    @property
    def over(self) -> bool:
        return self.state is not None and (self.state == "" or self.state in GONE)


class ProbeJob:
    """A job that is in the queue."""

    def __init__(self, cluster_id: str, name: str) -> None:
        self.cluster_id = cluster_id
        self.name = name

    def state(self) -> ProbeState:
        lines = lines_of(run_slurm(["squeue", "--me", "--all", "--noheader", "--states=all", "--format=%i|%T|%r"]))
        if lines is None:
            return ProbeState(None)
        for line in lines:
            cluster_id, *said = line.split("|", 2)
            if len(said) != 2 or not cluster_id or not said[0]:
                return ProbeState(None)  # it may be the job's line
            if cluster_id == self.cluster_id:
                return ProbeState(said[0], said[1])
        return ProbeState("")


@contextmanager
def probe_job(
    settings: Settings, folder: Path, entry: JobMain, nodes: int, tasks: int, time_min: int, wait_s: float
) -> Iterator[ProbeJob]:
    """Queue entry(folder, 0) once on each of `tasks` tasks over `nodes` nodes, with what the settings ask of a
    worker's nodes. At the end of the block, however it comes, the job is cancelled and over.

    time_min: its limit. wait_s: how long the caller waits for it to start; if it is killed before it can cancel
    the job, Slurm drops a job that could not end by then. Raises SubmissionError and SettingsError.
    """
    name = f"orch-doctor-{folder.name.rsplit('-', 1)[-1]}"
    try:
        yield ProbeJob(_submit(settings, folder, entry, nodes, tasks, time_min, wait_s, name), name)
    finally:
        _cancel(name)


def _submit(
    settings: Settings,
    folder: Path,
    entry: JobMain,
    nodes: int,
    tasks: int,
    time_min: int,
    wait_s: float,
    name: str,
) -> str:
    import submitit

    cluster = SlurmCluster(settings, folder, entry)
    with _environment_for_submission():
        executor = cluster.executor("doctor")
        executor.update_parameters(
            job_name=name,
            nodes=nodes,
            ntasks_per_node=tasks // nodes,
            time=time_min,
            additional_parameters=_options(cluster.request.options, round(wait_s) + 60 * time_min + 60),
        )
        try:
            return str(executor.submit(entry, str(folder), 0).job_id)
        except submitit.core.utils.FailedJobError as error:
            said = str(error)
            if is_unreachable(said):
                raise ClusterUnreachableError(f"Slurm does not answer: {refusal_of(said)}") from error
            kind = NoRoomError if is_no_room(said) else SubmissionError
            raise kind(advice(said, replace(cluster.request, time_min=time_min), 1)) from error
        except OSError as error:
            raise SubmissionError(f"{folder}: {error.strerror or error}") from error


def _options(asked: Mapping[str, Any], deadline_s: int) -> dict[str, Any]:
    """A worker's, but never again after its end, and with GPUs counted for each node, not for the whole job."""
    options = {name: value for name, value in asked.items() if name not in ("requeue", "time-min", "begin")}
    if "gpus" in options:
        options.setdefault("gpus-per-node", options.pop("gpus"))
    return options | {"no-requeue": True, "deadline": f"now+{deadline_s}"}


def _cancel(name: str, sleep: Callable[[float], None] = time.sleep) -> None:
    """By its name, which is known even if its id never was. Returns when it is over, or can't be helped."""
    mine = ["--user", getpass.getuser(), "--name", name]
    end = time.monotonic() + CANCEL_WAIT_S
    while time.monotonic() < end:
        left = run_slurm(["squeue", "--noheader", "--format=%i", *mine])
        if left is not None and not left.strip():
            return
        run_slurm(["scancel", *mine])
        sleep(POLL_S)
