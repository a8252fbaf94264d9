"""Record the failures of a job's chunks: any error of the user's code, data or device while a chunk trains."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.files import checkpoints
from orchestrator.files.checkpoints import Written
from orchestrator.files.run_folder import CHECKPOINTS
from orchestrator.messages import described
from orchestrator.records import Claim, Kept
from orchestrator.rules import failing
from orchestrator.worker.opened_run import OpenedRun
from orchestrator.worker.trainer import Ending
from orchestrator.worker.writing import CheckpointWriter

log = logging.getLogger("orch")


def trace() -> str:
    """Return the traceback of the current error, as text that every log can store."""
    return traceback.format_exc().encode("utf-8", "backslashreplace").decode()


@dataclass
class Failures:
    """The failures of one job since its last finished chunk."""

    run: OpenedRun
    writer: CheckpointWriter
    clock: Callable[[], float]
    in_a_row: int = 0
    stepped: bool | None = None  # whether the last chunk that failed had made a step; None: no chunk has failed

    def forget(self) -> None:
        """Called after a finished chunk."""
        self.in_a_row, self.stepped = 0, None

    def record(self, claim: Claim, error: BaseException, kept: Sequence[Kept], stepped: bool) -> Ending:
        """Record that a chunk has failed. Raises StaleClaimError.

        kept: states of the chunk from before the error. stepped: whether the chunk has made a step in this job.
        """
        board, message = self.run.leaderboard.board, described(error)
        follows, self.stepped = failing.follows_from(self.stepped, stepped), stepped
        self.in_a_row += 1
        if follows:
            reason = f"the process can't train any more since its last chunk failed: {message}"
            board.give_back(claim, reason, self.clock())
            return Ending(f"chunk {claim.chunk_id} is given back, because {reason}")
        fresh = claim.suspended_file is None and not stepped
        early = failing.signature(error) if fresh else None
        written = self._written(claim, kept)
        source = None if written is None else {"file": written.file, "sha256": written.sha256}
        failed = board.fail(claim, message, self.clock(), source, early)
        files = {claim.suspended_file, written.file if written else None} - {failed.resumes_from}
        checkpoints.remove(self.run.folder / CHECKPOINTS, [file for file in files if file])
        if failed.resumes_from is not None:
            log.info("the next claim of chunk %d goes on from %s", claim.chunk_id, failed.resumes_from)
        final = failed.stopped is not None or failed.failures >= self.run.settings.max_failures
        return Ending(f"chunk {claim.chunk_id} failed ({failed.failures} in a row): {message}", final=final)

    def _written(self, claim: Claim, kept: Sequence[Kept]) -> Written | None:
        """Write the first state that can be written; return None if none can."""
        for state in kept:
            try:
                return self.writer.write_suspended(claim, state.steps, state.save)
            except Exception as error:  # for example, a GPU that no longer answers, or a full disk
                log.warning("a state from before the failure can't be written: %s", described(error))
        return None
