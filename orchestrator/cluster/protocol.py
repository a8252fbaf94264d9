"""What a run and a worker ask of the place where jobs run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from orchestrator.records import ChainJob, Evidence, Submitted

JobMain = Callable[[str, int], object]  # (run folder, worker id): all that is ever pickled


class Cluster(Protocol):
    """What a run and a worker ask of the place where jobs run."""

    name: str
    chains: bool  # do jobs queue successors?

    def submit(self, jobs: Sequence[ChainJob], after: ChainJob | None) -> list[Submitted]:
        """Queue these jobs, to start when `after` is over. All or none: raises SubmissionError."""

    def wait_turn(self, predecessor: ChainJob | None, should_stop: Callable[[], bool]) -> None:
        """Return when the predecessor is over (at once where the cluster's queue has seen to that)."""

    def evidence(self, jobs: Sequence[ChainJob]) -> dict[int, Evidence]:
        """What is known of each job, by job_id."""

    def find(self, jobs: Sequence[ChainJob]) -> dict[str, str]:
        """The cluster's ids, by token, of jobs that were submitted by somebody who died before writing them
        down."""

    def cancel(self, jobs: Sequence[ChainJob], now: bool) -> list[str]:
        """Ask jobs to end at the next safe point, or kill them now. Returns what could not be done."""

    def endings(self, jobs: Sequence[ChainJob]) -> dict[int, str]:
        """How jobs ended, in the cluster's words, by job_id, as far as it knows."""

    def back_to_queue(self, job: ChainJob) -> bool:
        """Put the job that this process is into the queue again, where no successor can be; False if not."""

    def working_s(self) -> float:
        """How long a job works, from when its model and data are loaded."""

    def latest_work_s(self) -> float:
        """From a job's start to the moment when it must stop working, to end in time."""

    def time_limit_s(self) -> float:
        """From a job's start to its hard end, after which it can't be alive."""

    def cores(self) -> int:
        """That this job was given, for each of its processes."""

    def token(self) -> str:
        """Of the job that this process is."""

    def identity(self) -> tuple[str, str]:
        """(cluster's id, host) of the job that this process is."""
