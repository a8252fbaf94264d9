"""The two sides of the place where jobs run: the queue of a run's jobs, and the job that this process is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from orchestrator.records import ChainJob, Evidence, Submitted
from orchestrator.settings.settings import Settings

JobMain = Callable[[str, int], object]  # (run folder, worker id): submitit pickles nothing else


class JobQueue(ABC):
    """The queue of a run's jobs, as commands and workers use it."""

    name: str
    chains = True  # do jobs queue successors?

    @abstractmethod
    def submit(self, jobs: Sequence[ChainJob], after: ChainJob | None) -> list[Submitted]:
        """Queue these jobs, to start when `after` has ended. All or none: raises SubmissionError."""

    @abstractmethod
    def evidence(self, jobs: Sequence[ChainJob]) -> dict[int, Evidence]:
        """What is known of each job, by job_id."""

    @abstractmethod
    def cancel(self, jobs: Sequence[ChainJob], now: bool) -> list[str]:
        """Ask jobs to end at the next safe point, or kill them now. Returns a line for each failure."""

    def find(self, jobs: Sequence[ChainJob]) -> dict[str, str]:
        """The queue's ids, by token, of jobs whose submitter died before it wrote the id to the database."""
        return {}

    def endings(self, jobs: Sequence[ChainJob]) -> dict[int, str]:
        """How jobs ended, in the scheduler's words, by job_id. Jobs without a known ending are left out."""
        return {}

    def back_to_queue(self, job: ChainJob) -> bool:
        """Queue the job of this process again, where there is no room for a successor. False if not possible."""
        return False


class ThisJob(ABC):
    """The job that this process is."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings  # replaced when the run was amended before this job's turn

    @abstractmethod
    def token(self) -> str:
        """Names this job in the database."""

    @abstractmethod
    def identity(self) -> tuple[str, str]:
        """(the queue's id of this job, host)."""

    @abstractmethod
    def cores(self) -> int:
        """CPU cores for each process of this job."""

    @abstractmethod
    def latest_work_s(self) -> float:
        """Seconds from the job's start until it must stop working, to end in time."""

    @abstractmethod
    def time_limit_s(self) -> float:
        """Seconds from the job's start to its hard end, after which it can't be alive."""

    def working_s(self) -> float:
        """Seconds of work, counted from when the model and data are loaded."""
        return self.settings.eon_lifetime

    def wait_turn(self, predecessor: ChainJob | None, should_stop: Callable[[], bool]) -> None:
        """Return when the predecessor has ended. A queue with dependencies starts the job only then."""
        return
