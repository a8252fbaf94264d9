"""The Slurm clients, run with the slurm.conf of one folder."""

from __future__ import annotations

import os
import pwd
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from devcluster_processes import DevClusterError, wait_for

# Variables such as SLURM_CONF, SLURM_JOB_ID, SBATCH_PARTITION and SQUEUE_FORMAT, set by a job or by the user, make a
# client ask another cluster, submit another job or print other columns.
FOREIGN_VARIABLES = ("SLURM", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SINFO_", "SACCT", "SCANCEL_")
SQUEUE_COLUMNS = {"id": "%i", "name": "%j", "state": "%T", "reason": "%r", "partition": "%P", "nodes": "%N"}
SACCT_COLUMNS = ["JobID", "JobName", "Partition", "QOS", "State", "ExitCode", "ElapsedRaw", "NodeList"]


class SlurmClient:
    """Runs Slurm's clients for the cluster in a folder, whoever started it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.user = pwd.getpwuid(os.getuid()).pw_name

    @property
    def conf(self) -> Path:
        return self.folder / "etc" / "slurm.conf"

    def env(self) -> dict[str, str]:
        """The environment of this process, with SLURM_CONF of this cluster and no variable of another."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN_VARIABLES)}
        return kept | {"SLURM_CONF": str(self.conf)}

    def run(
        self, command: Sequence[str], *, check: bool = True, stdin: str = "", timeout_s: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a client such as sbatch. If it fails, raises DevClusterError with its message, unless check is false."""
        result = subprocess.run(
            command,
            env=self.env(),
            input=stdin,
            text=True,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
        if check and result.returncode:
            message = (result.stderr or result.stdout).strip()
            raise DevClusterError(f"{shlex.join(command)}: exit {result.returncode}: {message}")
        return result

    def sbatch(self, script: str, *options: str) -> int:
        """Submit lines of bash; returns the job's id. They print to output(id), unless the options change that."""
        jobs = self.folder / "jobs"
        place = [f"--output={jobs}/%j.out", f"--chdir={jobs}", "--open-mode=append"]
        text = script if script.startswith("#!") else f"#!/bin/bash\n{script}\n"
        return int(self.run(["sbatch", "--parsable", *place, *options], stdin=text).stdout.split(";")[0])

    def output(self, job: int) -> str:
        """What a job of sbatch() has printed so far, in all its starts."""
        path = self.folder / "jobs" / f"{job}.out"
        return path.read_text() if path.exists() else ""

    def squeue(self, *options: str) -> list[dict[str, str]]:
        """The pending, running and ending jobs, one row for each array task; columns: SQUEUE_COLUMNS."""
        columns = "|".join(SQUEUE_COLUMNS.values())
        lines = self.run(["squeue", "-h", "-r", "-o", columns, *options]).stdout.splitlines()
        return [dict(zip(SQUEUE_COLUMNS, line.split("|"), strict=True)) for line in lines]

    def sacct(self, *options: str) -> list[dict[str, str]]:
        """Accounting's jobs, one row for each start (a requeued job has several); columns: SACCT_COLUMNS."""
        format_options = ["-X", "-n", "-P", "--duplicates", "-o", ",".join(SACCT_COLUMNS)]
        lines = self.run(["sacct", *format_options, *options]).stdout.splitlines()
        return [dict(zip(SACCT_COLUMNS, line.split("|"), strict=True)) for line in lines]

    def state(self, job: int) -> str:
        """PENDING, RUNNING, COMPLETED, ...; the controller forgets a job 300 s (MinJobAge) after its end."""
        return self.run(["squeue", "-h", "-t", "all", "-j", str(job), "-o", "%T"]).stdout.strip()

    def wait_state(self, job: int, *states: str, timeout_s: float = 30) -> str:
        """Return the job's state as soon as it is one of the states."""

        def reached() -> str:
            return state if (state := self.state(job)) in states else ""

        return wait_for(reached, timeout_s, f"job {job} to be {' or '.join(states)}", every_s=0.1)

    def wait_saved(self, job: int) -> None:
        """Return when the controller has saved what it knows of the job, and so will know it after a crash."""
        asked_at, saved = time.time(), self.folder / "state" / "job_state"
        self.run(["scontrol", "update", f"JobId={job}", "Comment=saved"])  # it saves after changes, some seconds later
        wait_for(lambda: saved.exists() and saved.stat().st_mtime > asked_at, 30, f"job {job} to be saved")

    def node_states(self) -> dict[str, str]:
        """The state of each node in sinfo: idle, mixed, allocated, down, ...; with * if the node does not answer."""
        lines = self.run(["sinfo", "-h", "-N", "-p", "main", "-o", "%N %T"]).stdout.splitlines()
        return dict(line.split() for line in lines)

    def cancel_all(self, timeout_s: float = 15) -> None:
        """Cancel every job of the user and return when the queue is empty."""
        if self.squeue():
            self.run(["scancel", f"--user={self.user}"])
            wait_for(lambda: not self.squeue(), timeout_s, "the queue to become empty")
