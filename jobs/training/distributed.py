"""One worker on several GPUs: rank 0 is the worker, and the other ranks (followers) train the same chunks in lockstep.

If a rank fails, all ranks end, and so does the job: only newly started ranks are certain to have equal states.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pydantic import TypeAdapter

from jobs.imports import look_first_in, start_in
from jobs.training.opening import open_session
from jobs.training.own_loop import OwnLoop
from jobs.training.ranks import RankLostError, Ranks
from jobs.training.session import Session
from orchestrator.messages import described
from orchestrator.records import EpochResult, Finished, Interrupted, Kept, Work
from orchestrator.settings.settings import Settings

log = logging.getLogger("orch")


@dataclass(frozen=True)
class Opening:
    """Everything a rank needs to open the job."""

    settings: Settings
    cores: int  # per rank
    import_paths: Sequence[str] = ()
    run_folder: str | None = None  # None: there is no run
    gpus: str | None = None  # the worker's GPUs, as in CUDA_VISIBLE_DEVICES; None: each rank sees only its own GPU


OPENING, WORK = TypeAdapter(Opening), TypeAdapter(Work)  # convert to and from JSON, to send to other ranks


class DistributedSession:
    """The Trainer of rank 0."""

    def __init__(self, session: Session | OwnLoop, ranks: Ranks, on_failure: Callable[[], None]) -> None:
        self._session = session
        self._ranks = ranks
        self._on_failure = on_failure

    def train(
        self, work: Work, should_stop: Callable[[], bool], on_epoch: Callable[[EpochResult], None]
    ) -> Finished | Interrupted:
        with _fatal_to_all(self._ranks, self._on_failure):
            self._ranks.tell(do="train", work=WORK.dump_python(work, mode="json"))
            return self._session.train(work, should_stop, on_epoch)

    def save(self, target: IO[bytes]) -> None:
        self._session.save(target)

    def snapshot(self) -> Callable[[IO[bytes]], None] | None:
        return None

    def kept(self) -> Sequence[Kept]:
        return ()

    def confirmed(self, work: Work) -> None:
        """Never called, since `snapshot` returns None."""

    def judged(self, promoted: bool) -> None:
        self._session.judged(promoted)

    def close(self) -> None:
        self._session.close()


def lead(ranks: Ranks, opening: Opening, on_failure: Callable[[], None]) -> DistributedSession:
    """Open the job on all ranks (called on rank 0). on_failure: called when the ranks can no longer be used."""
    with _fatal_to_all(ranks, on_failure):
        ranks.tell(do="open", opening=OPENING.dump_python(opening, mode="json"))
        return DistributedSession(_open(ranks, opening), ranks, on_failure)


def follow(ranks: Ranks, before_step: Callable[[], object] = lambda: None) -> str:
    """Execute rank 0's commands until "stop" or a failure (called on all ranks except 0). Returns why it ended. Errors
    are reported to rank 0, not raised: otherwise Slurm would kill rank 0 before it records the failure.
    before_step: called before each chunk and each step."""

    def should_stop() -> bool:
        before_step()
        return False  # rank 0 decides

    session: Session | OwnLoop | None = None
    failed = True
    try:
        while True:
            command = ranks.hear()
            if command["do"] == "stop":
                failed = False
                return "stopped by rank 0"
            if command["do"] == "open":
                session = _open(ranks, OPENING.validate_python(command["opening"]))
            else:
                assert session is not None, "rank 0 must open the job before training a chunk"
                before_step()
                session.train(WORK.validate_python(command["work"]), should_stop, lambda _result: None)
    except RankLostError as error:
        return f"another rank is gone: {error}"
    except BaseException as error:  # the user's model, data or device
        log.error("%s", traceback.format_exc())
        reason = described(error)
        _ignore_errors(lambda: ranks.report_failure(reason))
        return f"failed: {reason}"
    finally:
        _ignore_errors(lambda: ranks.close(at_once=failed))


def dismiss(ranks: Ranks) -> None:
    """End all followers (called on rank 0)."""
    _ignore_errors(lambda: ranks.tell(do="stop"))
    _ignore_errors(lambda: ranks.close(at_once=False))


@contextmanager
def _fatal_to_all(ranks: Ranks, on_failure: Callable[[], None]) -> Iterator[None]:
    """If the block raises on rank 0, end all ranks. If another rank failed, raise RankLostError with its error."""
    try:
        yield
    except BaseException as error:
        on_failure()
        failures = ranks.failures() if isinstance(error, RankLostError) else []
        _ignore_errors(lambda: ranks.tell(do="stop"))
        _ignore_errors(lambda: ranks.close(at_once=True))
        if isinstance(error, RankLostError):
            reason = "; ".join(failures) or f"another process of this job died or hangs ({error})"
            raise RankLostError(reason) from error
        raise


def _open(ranks: Ranks, opening: Opening) -> Session | OwnLoop:
    if opening.gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = own_gpu(opening.gpus.split(","), ranks.rank, ranks.count)
    look_first_in(opening.import_paths)
    start_in(opening.import_paths)
    run_folder = None if opening.run_folder is None else Path(opening.run_folder)
    session = open_session(opening.settings, opening.cores, ranks, run_folder)
    ranks.use(session.device)
    return session


def own_gpu(gpus: Sequence[str], rank: int, count: int) -> str:
    """Return this rank's GPU, or "" to train on the CPU if there is none. gpus: the GPUs visible to this rank. If there
    are fewer than `count`, returns the first: each rank may see only its own GPU. If not, Ranks.use raises JobError."""
    return gpus[rank] if len(gpus) >= count else "".join(gpus[:1])


def _ignore_errors(step: Callable[[], None]) -> None:
    """Run a shutdown step and ignore its errors: the connection may already be broken."""
    try:
        step()
    except Exception as error:
        log.debug("%s", error)
