"""Find the live jobs of a run without its database, by their names and command lines."""

from __future__ import annotations

import os
import re
from pathlib import Path

import psutil

from orchestrator.cluster.slurm import GONE, queue
from orchestrator.files.run_folder import JOBS


def slurm_jobs(run_name: str, run_folder: Path) -> list[str] | None:
    """Return the ids of the run's pending and running Slurm jobs; None if Slurm does not answer.

    A run in another runs folder may have the same name, so a job counts only if its folder is in run_folder. (If
    run_folder has no job folders at all, every job of this name counts.)
    """
    listed = queue()
    if listed is None:
        return None
    name = re.compile(rf"orch-{re.escape(run_name)}-([0-9a-f]{{16}})")
    folders = {path.name for path in (run_folder / JOBS).glob("*")}
    alive = []
    for cluster_id, job in listed.items():
        match = name.fullmatch(job.name)
        if match and job.state not in GONE and (not folders or match[1] in folders):
            alive.append(cluster_id)
    return alive


def processes(run_folder: Path) -> list[int]:
    """Return the pids of the run's processes on this machine, found by the job folder in their command lines."""
    jobs = f"{run_folder / JOBS}{os.sep}"
    pids = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        arguments = process.info["cmdline"] or ()
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(part.startswith(jobs) for part in arguments):
            pids.append(process.info["pid"])
    return sorted(pids)
