"""A run of somebody else, which is shared with a group: its jobs are its owner's.

squeue and /proc may hide another user's jobs, so nothing that they show proves anything; and jobs that this user
queued would run in this user's name, unseen by the owner. So whoever only shares the run looks, and writes to its
database what the workers then do; the queue is the owner's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from orchestrator.cluster.protocol import Cluster
from orchestrator.errors import SubmissionError
from orchestrator.records import ChainJob, Evidence, JobState, Submitted


class ForeignCluster:
    """The owner's cluster as another user has it."""

    chains = False  # what is broken, the owner's commands and jobs mend

    def __init__(self, cluster: Cluster, owner: str) -> None:
        self.name = cluster.name
        self._cluster = cluster
        self._owner = owner

    def submit(self, jobs: Sequence[ChainJob], after: ChainJob | None) -> list[Submitted]:
        raise SubmissionError(f"the jobs of this run are {self._owner}'s: only {self._owner} can queue more of them")

    def wait_turn(self, predecessor: ChainJob | None, should_stop: Callable[[], bool]) -> None:
        return

    def evidence(self, jobs: Sequence[ChainJob]) -> dict[int, Evidence]:
        return {job.job_id: Evidence.UNKNOWN for job in jobs}

    def find(self, jobs: Sequence[ChainJob]) -> dict[str, str]:
        return {}

    def cancel(self, jobs: Sequence[ChainJob], now: bool) -> list[str]:
        running = [job.cluster_id for job in jobs if job.cluster_id and job.state is JobState.RUNNING]
        if not running:
            return []  # what is queued finds, when it starts, that it has nothing to do
        return [f"jobs {', '.join(running)} are {self._owner}'s: they end at their next look at the run"]

    def endings(self, jobs: Sequence[ChainJob]) -> dict[int, str]:
        return {}

    def back_to_queue(self, job: ChainJob) -> bool:
        return False

    def working_s(self) -> float:
        return self._cluster.working_s()

    def latest_work_s(self) -> float:
        return self._cluster.latest_work_s()

    def time_limit_s(self) -> float:
        return self._cluster.time_limit_s()

    def cores(self) -> int:
        return self._cluster.cores()

    def token(self) -> str:
        return self._cluster.token()

    def identity(self) -> tuple[str, str]:
        return self._cluster.identity()
