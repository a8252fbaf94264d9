"""Interfaces to the executors: the queue of a run's jobs, and the job that this process runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from orchestrator.records import ChainJob, Evidence, Submitted
from orchestrator.settings.settings import Settings

JobMain = Callable[[str, int], object]  # called with (run folder, worker id); submitit pickles these arguments


class JobQueue(ABC):
    """The queue of a run's jobs, used by commands and workers."""

    name: str
    chains = True  # whether jobs queue successors

    @abstractmethod
    def submit(self, jobs: Sequence[ChainJob], after: ChainJob | None) -> list[Submitted]:
        """Queue all jobs to start once `after` has ended. If they are refused, queue none and raise SubmissionError."""

    @abstractmethod
    def evidence(self, jobs: Sequence[ChainJob]) -> dict[int, Evidence]:
        """Return what the queue reports about each job, by job_id."""

    @abstractmethod
    def cancel(self, jobs: Sequence[ChainJob], now: bool) -> list[str]:
        """Ask jobs to end at their next safe point. now: kill them instead. Returns a message for each failure."""

    def find(self, jobs: Sequence[ChainJob]) -> dict[str, str]:
        """Return, by token, the cluster ids of queued jobs whose submitter died before recording the id."""
        return {}

    def endings(self, jobs: Sequence[ChainJob]) -> dict[int, str]:
        """Return, by job_id, how each job ended according to the scheduler. Omits jobs whose end is not known."""
        return {}

    def back_to_queue(self, job: ChainJob) -> bool:
        """Requeue this process's job, when a submit limit leaves no room for a successor. Returns False on failure."""
        return False


class ThisJob(ABC):
    """The job that this process runs."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings  # replaced if the run was amended while this job waited

    @abstractmethod
    def token(self) -> str:
        """Return the token that identifies this job in the database."""

    @abstractmethod
    def identity(self) -> tuple[str, str]:
        """Return (the queue's id of this job, host)."""

    @abstractmethod
    def cores(self) -> int:
        """Return the number of CPU cores for each process of this job."""

    @abstractmethod
    def latest_work_s(self) -> float:
        """Return how many seconds after its start the job must stop working, so that it ends before its hard end."""

    @abstractmethod
    def time_limit_s(self) -> float:
        """Return the seconds from the job's start to its hard end. After the hard end, the job can't be alive."""

    def working_s(self) -> float:
        """Return how many seconds the job may work after the model and data are loaded."""
        return self.settings.eon_lifetime

    def wait_turn(self, predecessor: ChainJob | None, should_stop: Callable[[], bool]) -> None:
        """Wait until the predecessor has ended. Not needed on Slurm, where a dependency delays the job's start."""
        return
