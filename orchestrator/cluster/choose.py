"""Which cluster a run uses."""

from __future__ import annotations

import shutil
from pathlib import Path

from orchestrator.cluster.protocol import Cluster, JobMain
from orchestrator.settings.settings import Settings


def default_executor() -> str:
    return "slurm" if shutil.which("sbatch") else "local"


def open_cluster(executor: str, settings: Settings, run_folder: Path, entry: JobMain) -> Cluster:
    """executor: slurm, local or inline. Imports submitit only now, for it is slow to."""
    if executor == "inline":
        from orchestrator.cluster.inline import InlineCluster

        return InlineCluster(settings)
    if executor == "local":
        from orchestrator.cluster.local import LocalCluster

        return LocalCluster(settings, run_folder, entry)
    from orchestrator.cluster.slurm import SlurmCluster

    return SlurmCluster(settings, run_folder, entry)
