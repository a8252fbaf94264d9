"""Runs Slurm's client commands with the slurm.conf of one folder."""

from __future__ import annotations

import os
import pwd
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from devcluster_processes import DevClusterError, wait_for

# Variables such as SLURM_CONF, SLURM_JOB_ID, SBATCH_PARTITION and SQUEUE_FORMAT, set by a job or by the user, can make
# a client use another cluster, submit with other options or print other columns.
FOREIGN_VARIABLES = ("SLURM", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SINFO_", "SACCT", "SCANCEL_")
SQUEUE_COLUMNS = {"id": "%i", "name": "%j", "state": "%T", "reason": "%r", "partition": "%P", "nodes": "%N"}
SACCT_COLUMNS = ["JobID", "JobName", "Partition", "QOS", "State", "ExitCode", "ElapsedRaw", "NodeList"]


class SlurmClient:
    """Runs Slurm's client commands for the cluster in a folder, even if another process started it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.user = pwd.getpwuid(os.getuid()).pw_name

    @property
    def conf(self) -> Path:
        return self.folder / "etc" / "slurm.conf"

    def env(self) -> dict[str, str]:
        """Return this process's environment with this cluster's SLURM_CONF and without other Slurm variables."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN_VARIABLES)}
        return kept | {"SLURM_CONF": str(self.conf)}

    def run(
        self, command: Sequence[str], *, check: bool = True, stdin: str = "", timeout_s: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a command such as sbatch. If it fails and `check` is set, raise DevClusterError with its message."""
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
        """Submit lines of bash and return the job's id. output(id) returns what they print, unless redirected."""
        jobs = self.folder / "jobs"
        place = [f"--output={jobs}/%j.out", f"--chdir={jobs}", "--open-mode=append"]
        text = script if script.startswith("#!") else f"#!/bin/bash\n{script}\n"
        return int(self.run(["sbatch", "--parsable", *place, *options], stdin=text).stdout.split(";")[0])

    def output(self, job: int) -> str:
        """Return what a job submitted by sbatch() has printed so far, including earlier starts if it was requeued."""
        path = self.folder / "jobs" / f"{job}.out"
        return path.read_text() if path.exists() else ""

    def squeue(self, *options: str) -> list[dict[str, str]]:
        """Return pending, running and ending jobs, one row for each array task; columns: SQUEUE_COLUMNS."""
        columns = "|".join(SQUEUE_COLUMNS.values())
        lines = self.run(["squeue", "-h", "-r", "-o", columns, *options]).stdout.splitlines()
        return [dict(zip(SQUEUE_COLUMNS, line.split("|"), strict=True)) for line in lines]

    def sacct(self, *options: str) -> list[dict[str, str]]:
        """Return jobs from accounting, one row for each start (requeued jobs have several); columns: SACCT_COLUMNS."""
        format_options = ["-X", "-n", "-P", "--duplicates", "-o", ",".join(SACCT_COLUMNS)]
        lines = self.run(["sacct", *format_options, *options]).stdout.splitlines()
        return [dict(zip(SACCT_COLUMNS, line.split("|"), strict=True)) for line in lines]

    def state(self, job: int) -> str:
        """Return PENDING, RUNNING, COMPLETED, ..., or "" when a job ended more than 300 s (MinJobAge) ago."""
        return self.run(["squeue", "-h", "-t", "all", "-j", str(job), "-o", "%T"]).stdout.strip()

    def wait_state(self, job: int, *states: str, timeout_s: float = 30) -> str:
        """Wait until the job has one of these states, and return its state."""

        def reached() -> str:
            return state if (state := self.state(job)) in states else ""

        return wait_for(reached, timeout_s, f"job {job} to be {' or '.join(states)}", every_s=0.1)

    def wait_saved(self, job: int) -> None:
        """Wait until the controller has saved the job's state, which then survives a crash of the controller."""
        asked_at, saved = time.time(), self.folder / "state" / "job_state"
        self.run(["scontrol", "update", f"JobId={job}", "Comment=saved"])  # makes the controller save soon
        wait_for(lambda: saved.exists() and saved.stat().st_mtime > asked_at, 30, f"job {job} to be saved")

    def node_states(self) -> dict[str, str]:
        """Return each node's state in sinfo: idle, mixed, allocated, down, ...; with * if the node does not answer."""
        lines = self.run(["sinfo", "-h", "-N", "-p", "main", "-o", "%N %T"]).stdout.splitlines()
        return dict(line.split() for line in lines)

    def cancel_all(self, timeout_s: float = 15) -> None:
        """Cancel every job of the user and return when the queue is empty."""
        if self.squeue():
            self.run(["scancel", f"--user={self.user}"])
            wait_for(lambda: not self.squeue(), timeout_s, "the queue to become empty")
