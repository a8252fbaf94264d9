"""Find out which rank of its job this process is."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Place:
    """This process's rank in its job, and the file through which the ranks of the job find each other."""

    executor: str
    rank: int
    count: int
    meeting_file: Path  # each start of the job uses a new file


def this_place() -> Place:
    """Return this process's place, read from the environment variables set by Slurm and submitit."""
    env = os.environ
    folder, executor = Path(env["SUBMITIT_FOLDER"]), env["SUBMITIT_EXECUTOR"]
    if executor == "local":
        rank, count, start = env["SUBMITIT_LOCAL_GLOBALID"], env["SUBMITIT_LOCAL_NTASKS"], env["SUBMITIT_LOCAL_JOB_ID"]
    else:
        rank, count = env.get("SLURM_PROCID", "0"), env.get("SLURM_NTASKS", "1")
        start = f"{env['SLURM_JOB_ID']}-{env.get('SLURM_RESTART_COUNT', '0')}"
    return Place(executor, int(rank), int(count), folder / f"meeting-{start}")
