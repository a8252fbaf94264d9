"""Queue a job's successor, the next link of its chain, while the job works."""

from __future__ import annotations

import logging
from collections.abc import Callable

from tenacity import Retrying, retry_if_result, stop_after_delay, wait_exponential

from orchestrator.cluster.protocol import JobQueue
from orchestrator.errors import Refusal, SubmissionError
from orchestrator.leaderboard.chains import Chains
from orchestrator.records import JobState, Started

RETRY_S = 300.0  # how long to retry at the job's end while the queue does not answer
log = logging.getLogger("orch")


class Successor:
    """The next link of this job's chain, which is already in the database but not yet submitted to the queue."""

    def __init__(self, started: Started, chains: Chains, queue: JobQueue, clock: Callable[[], float]) -> None:
        self._job = started.job
        self._link = started.successor  # None: there is no link to submit, or it has been submitted
        self._chains = chains
        self._queue = queue
        self._clock = clock
        self._error: SubmissionError | None = None  # raised by the last attempt that failed

    def submit(self) -> None:
        """Submit the link unless it has been submitted. The job calls this at its start, before each chunk and at its
        end. If all attempts fail, another worker or `orch status` repairs the chain later."""
        if self._link is None:
            return
        try:
            taken = self._queue.submit([self._link], after=self._job)
        except SubmissionError as error:
            log.warning("the successor is not queued yet: %s", error)
            self._error = error
            return
        self._queue.cancel(self._chains.submitted(taken), now=True)
        log.info("successor queued: %s", taken[0].cluster_id)
        self._link = None

    def retry_at_end(self) -> bool:
        """Submit the link if it has not been submitted; if the queue does not answer, retry for up to RETRY_S seconds.
        Return True if this job was requeued instead, because a submit limit leaves no room for a successor."""
        retrying = Retrying(
            stop=stop_after_delay(RETRY_S),
            wait=wait_exponential(max=30),
            retry=retry_if_result(lambda _none: self._refused_with() is Refusal.UNREACHABLE),
            retry_error_callback=lambda _state: None,
        )
        retrying(self.submit)
        link, refusal = self._link, self._refused_with()
        if link is None or refusal is None or refusal is Refusal.UNREACHABLE:
            return False
        if refusal is Refusal.NO_ROOM and self._chains.back_to_queue(self._job, link, self._clock()):
            log.info("a submit limit leaves no room for a successor: this job goes back to the queue itself")
            if self._queue.back_to_queue(self._job):
                return True
        # The next repair of the chain submits a new link and, if the queue refuses that link too, reports why.
        self._chains.close([link], JobState.LOST, str(self._error), self._clock())
        return False

    def _refused_with(self) -> Refusal | None:
        return self._error.refusal if self._link is not None and self._error is not None else None
