"""Which jobs of a run are there, where no database says which there should be: by their names and command lines."""

from __future__ import annotations

import os
import re
from pathlib import Path

import psutil

from orchestrator.cluster.slurm import GONE, queue


def slurm_jobs(run_name: str, run_folder: Path) -> list[str] | None:
    """The ids of the run's jobs in Slurm's queue, waiting or running; None if Slurm does not answer.

    A run of the same name in another folder has jobs of the same names, but other folders for them.
    """
    listed = queue()
    if listed is None:
        return None
    name = re.compile(rf"orch-{re.escape(run_name)}-([0-9a-f]{{16}})")
    folders = {path.name for path in (run_folder / "jobs").glob("*")}
    found = []
    for cluster_id, job in listed.items():
        match = name.fullmatch(job.name)
        if match and job.state not in GONE and (not folders or match[1] in folders):
            found.append(cluster_id)
    return found


def processes(run_folder: Path) -> list[int]:
    """The ids of this machine's processes that work for the run: submitit's, with the folder of their job."""
    jobs = f"{run_folder / 'jobs'}{os.sep}"
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        arguments = process.info["cmdline"] or ()
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(part.startswith(jobs) for part in arguments):
            found.append(process.info["pid"])
    return sorted(found)
