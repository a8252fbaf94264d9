"""Run a single worker in the process that launches the run, for debugging."""

from __future__ import annotations

import os
from collections.abc import Sequence

from orchestrator.cluster.host import host_name, this_process
from orchestrator.cluster.local import ProcessQueue
from orchestrator.cluster.protocol import ThisJob
from orchestrator.records import ChainJob, Submitted
from orchestrator.settings.settings import Settings


class InlineQueue(ProcessQueue):
    """Runs every job in this process. Jobs have no successors."""

    name = "inline"
    chains = False

    def submit(self, jobs: Sequence[ChainJob], after: ChainJob | None) -> list[Submitted]:
        return [Submitted(job.job_id, str(os.getpid()), *this_process(), host_name()) for job in jobs]


class InlineJob(ThisJob):
    """A job in this process; it may work for the whole lifetime of the run."""

    def __init__(self, settings: Settings, token: str) -> None:
        super().__init__(settings)
        self._token = token

    def token(self) -> str:
        return self._token

    def identity(self) -> tuple[str, str]:
        return str(os.getpid()), host_name()

    def cores(self) -> int:
        return self.settings.cores_per_worker or len(os.sched_getaffinity(0))

    def working_s(self) -> float:
        return self.settings.total_lifetime

    latest_work_s = time_limit_s = working_s
