"""One worker in this very process, for debugging."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from orchestrator.cluster.host import host_name, this_process
from orchestrator.cluster.local import LocalCluster
from orchestrator.records import ChainJob, Evidence, Submitted
from orchestrator.settings.settings import Settings


class InlineCluster:
    """One worker in this process; it has no successor and no end but the run's."""

    name = "inline"
    chains = False

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def submit(self, jobs: Sequence[ChainJob], after: ChainJob | None) -> list[Submitted]:
        return [Submitted(job.job_id, str(os.getpid()), *this_process(), host_name()) for job in jobs]

    def wait_turn(self, predecessor: ChainJob | None, should_stop: Callable[[], bool]) -> None:
        return

    def evidence(self, jobs: Sequence[ChainJob]) -> dict[int, Evidence]:
        return LocalCluster.evidence(self, jobs)  # type: ignore[arg-type]  # the same processes

    _evidence = LocalCluster._evidence

    def find(self, jobs: Sequence[ChainJob]) -> dict[str, str]:
        return {}

    cancel = LocalCluster.cancel

    endings = LocalCluster.endings
    back_to_queue = LocalCluster.back_to_queue
    token = LocalCluster.token

    def working_s(self) -> float:
        return self._settings.total_lifetime

    latest_work_s = working_s

    def time_limit_s(self) -> float:
        return self._settings.total_lifetime

    def cores(self) -> int:
        return self._settings.cores_per_worker or len(os.sched_getaffinity(0))

    def identity(self) -> tuple[str, str]:
        return str(os.getpid()), host_name()
