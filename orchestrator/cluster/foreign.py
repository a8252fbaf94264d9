"""The queue of a run that another user owns and shares with a group.

Only the owner queues jobs: jobs submitted by another user would run under that user's name, and the owner could not see
them. squeue and /proc may also hide the owner's jobs from other users, so a job that is missing there may be alive.
Other users read the run and write requests to its database; the owner's workers carry out the requests.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.cluster.protocol import JobQueue
from orchestrator.errors import SubmissionError
from orchestrator.records import ChainJob, Evidence, JobState, Submitted


class ForeignQueue(JobQueue):
    """The run's queue for users other than its owner, who can't submit, see or kill jobs."""

    chains = False  # broken chains are repaired only by the owner's commands and jobs

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
            return []  # queued jobs need no signal: when they start, they read the run's state and end
        return [f"jobs {', '.join(running)} belong to {self._owner}: they end when they next read the run's state"]
