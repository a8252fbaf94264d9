"""The queue of a run that belongs to another user and is shared with a group.

squeue and /proc may hide another user's jobs, so their listings prove nothing; and jobs that this user queued would run
under this user's name, where the owner can't see them. So only the owner queues jobs. Other users read the run and
write requests to its database, which the workers then follow.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.cluster.protocol import JobQueue
from orchestrator.errors import SubmissionError
from orchestrator.records import ChainJob, Evidence, JobState, Submitted


class ForeignQueue(JobQueue):
    """The owner's queue, as another user may use it."""

    chains = False  # only the owner's commands and jobs repair broken chains

    def __init__(self, name: str, owner: str) -> None:
        self.name = name
        self._owner = owner

    def submit(self, jobs: Sequence[ChainJob], after: ChainJob | None) -> list[Submitted]:
        raise SubmissionError(f"the jobs of this run are {self._owner}'s: only {self._owner} can queue more of them")

    def evidence(self, jobs: Sequence[ChainJob]) -> dict[int, Evidence]:
        return {job.job_id: Evidence.UNKNOWN for job in jobs}

    def cancel(self, jobs: Sequence[ChainJob], now: bool) -> list[str]:
        running = [job.cluster_id for job in jobs if job.cluster_id and job.state is JobState.RUNNING]
        if not running:
            return []  # a queued job sees that it has nothing to do when it starts
        return [f"jobs {', '.join(running)} are {self._owner}'s: they end when they next read the run's state"]
