"""One worker on several GPUs: rank 0 is the worker, and its followers train what it trains, in step with it.

A rank that fails takes the others along, and the job ends: whatever the others were in the middle of, fresh
processes are the only ones that are known to agree.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from jobs.imports import look_first_in
from jobs.training.opening import open_session
from jobs.training.own_loop import OwnLoop
from jobs.training.ranks import RankLostError, Ranks
from jobs.training.session import Session
from orchestrator.records import EpochResult, Finished, Interrupted, Profile, Work

log = logging.getLogger("orch")


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
            self._ranks.tell(do="train", work=asdict(work))
            return self._session.train(work, should_stop, on_epoch)

    def save(self, target: IO[bytes]) -> None:
        self._session.save(target)

    def judged(self, promoted: bool) -> None:
        self._session.judged(promoted)

    def close(self) -> None:
        self._session.close()


def lead(
    ranks: Ranks,
    settings: Mapping[str, Any],
    cores: int,
    import_paths: Sequence[str] = (),
    gpus: str | None = None,
    on_failure: Callable[[], None] = lambda: None,
    run_folder: Path | None = None,
) -> DistributedSession:
    """Rank 0: let all open the job. cores: of each rank. gpus: what this worker may use, as a value for
    CUDA_VISIBLE_DEVICES; None: each rank has its own already. on_failure: the ranks can't be used any more.
    run_folder: where loggers write."""
    with _fatal_to_all(ranks, on_failure):
        opening = {"settings": dict(settings), "cores": cores, "import_paths": list(import_paths), "gpus": gpus}
        ranks.tell(do="open", opening=opening)
        return DistributedSession(_open(ranks, opening, run_folder), ranks, on_failure)


def follow(ranks: Ranks) -> str:
    """Any other rank: do as rank 0 says until it says stop or is gone. Never raises for what can be reported:
    where a process ends with an error, Slurm kills the others, and rank 0 has something to write down yet.

    Returns how it ended.
    """
    session: Session | OwnLoop | None = None
    failed = True
    try:
        while True:
            command = ranks.hear()
            if command["do"] == "stop":
                failed = False
                return "rank 0 said stop"
            if command["do"] == "open":
                session = _open(ranks, command["opening"])
            else:
                assert session is not None, "opened before anything is trained"
                session.train(_work(command["work"]), lambda: False, lambda _result: None)
    except RankLostError as error:
        return f"another rank is gone: {error}"
    except Exception as error:  # the user's model, data or device
        log.error("%s", traceback.format_exc())
        reason = f"{type(error).__name__}: {error}"
        _try(lambda: ranks.give_up(reason))
        return f"failed: {reason}"
    finally:
        _try(lambda: ranks.close(at_once=failed))


def dismiss(ranks: Ranks) -> None:
    """Rank 0: all followers end."""
    _try(lambda: ranks.tell(do="stop"))
    _try(lambda: ranks.close(at_once=False))


@contextmanager
def _fatal_to_all(ranks: Ranks, on_failure: Callable[[], None]) -> Iterator[None]:
    """On rank 0, an error inside ends all ranks; what another rank said before it ended takes its place."""
    try:
        yield
    except BaseException as error:
        on_failure()
        words = ranks.last_words() if isinstance(error, RankLostError) else []
        _try(lambda: ranks.tell(do="stop"))
        _try(lambda: ranks.close(at_once=True))
        if isinstance(error, RankLostError):
            reason = "; ".join(words) or f"another process of this job died or hangs ({error})"
            raise RankLostError(reason) from error
        raise


def _open(ranks: Ranks, opening: Mapping[str, Any], run_folder: Path | None = None) -> Session | OwnLoop:
    if opening["gpus"] is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = own_gpu(opening["gpus"].split(","), ranks.rank, ranks.count)
    look_first_in(opening["import_paths"])
    session = open_session(opening["settings"], opening["cores"], ranks, run_folder)
    ranks.use(session.job.context.device)
    return session


def own_gpu(gpus: Sequence[str], rank: int, count: int) -> str:
    """The one that this rank uses of those that it sees; "" where there is none, which means the CPU.

    Fewer than ranks: either the cluster has given each rank its own and shows no other, or there are too few,
    which Ranks.use finds out.
    """
    return gpus[rank] if len(gpus) >= count else "".join(gpus[:1])


def _work(sent: dict[str, Any]) -> Work:
    paths = {key: Path(sent[key]) if sent[key] else None for key in ("parent", "suspended")}
    return Work(**sent | paths | {"profile": Profile(**sent["profile"])})


def _try(step: Callable[[], None]) -> None:
    """What can't be said or closed any more is over already."""
    try:
        step()
    except Exception as error:
        log.debug("%s", error)
