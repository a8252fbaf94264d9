"""The queue of a run that another user owns and shares with a group.

Only the owner queues jobs: jobs submitted by another user would run under that user's name, where the owner can't see
them. squeue and /proc may also hide the owner's jobs from other users, so a missing job proves nothing. Other users
read the run and write requests to its database; the workers carry them out.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.cluster.protocol import JobQueue
from orchestrator.errors import SubmissionError
from orchestrator.records import ChainJob, Evidence, JobState, Submitted


class ForeignQueue(JobQueue):
    """The owner's queue, restricted to what another user may do."""

    chains = False  # only the owner's commands and jobs repair broken chains

    def __init__(self, name: str, owner: str) -> None:
        self.name = name
        self._owner = owner

    def submit(self, jobs: Sequence[ChainJob], after: ChainJob | None) -> list[Submitted]:
        raise SubmissionError(f"this run belongs to {self._owner}: only {self._owner} can queue jobs for it")

    def evidence(self, jobs: Sequence[ChainJob]) -> dict[int, Evidence]:
        return {job.job_id: Evidence.UNKNOWN for job in jobs}

    def cancel(self, jobs: Sequence[ChainJob], now: bool) -> list[str]:
        running = [job.cluster_id for job in jobs if job.cluster_id and job.state is JobState.RUNNING]
        if not running:
            return []  # when a queued job starts, it reads the run's state and ends
        return [f"jobs {', '.join(running)} belong to {self._owner}: they end when they next read the run's state"]
