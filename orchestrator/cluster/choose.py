"""Choose the queue for a run. Each implementation is imported only when it is used."""

from __future__ import annotations

import shutil
from pathlib import Path

from orchestrator.cluster.protocol import JobMain, JobQueue, ThisJob
from orchestrator.settings.settings import Settings


def default_executor() -> str:
    return "slurm" if shutil.which("sbatch") else "local"


def open_queue(settings: Settings, run_folder: Path, job_main: JobMain) -> JobQueue:
    """Return the queue for settings.executor: slurm, local or inline."""
    if settings.executor == "slurm":
        from orchestrator.cluster.slurm import SlurmQueue

        return SlurmQueue(settings, run_folder, job_main)
    if settings.executor == "inline":
        from orchestrator.cluster.inline import InlineQueue

        return InlineQueue()
    from orchestrator.cluster.local import LocalQueue

    return LocalQueue(settings, run_folder, job_main)


def open_this_job(settings: Settings) -> ThisJob:
    """Return the job that this process runs. submitit must have started the process; inline jobs use InlineJob."""
    if settings.executor == "slurm":
        from orchestrator.cluster.slurm import SlurmJob

        return SlurmJob(settings)
    from orchestrator.cluster.local import LocalJob

    return LocalJob(settings)
