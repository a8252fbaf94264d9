"""What trains a chunk, what tells it to stop, and how a job ends."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import IO, Protocol

from orchestrator.records import EpochResult, Finished, Interrupted, Work


class Trainer(Protocol):
    """The job side (jobs.training.session.Session)."""

    def train(
        self, work: Work, should_stop: Callable[[], bool], on_epoch: Callable[[EpochResult], None]
    ) -> Finished | Interrupted: ...

    def save(self, target: IO[bytes]) -> None: ...


class StopFlag:
    """Signals only set it; the loop looks at it between two steps."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)

    def __init__(self) -> None:
        self.reason: str | None = None

    def listen(self) -> None:
        for signum in self.SIGNALS:
            signal.signal(signum, self._set)

    def _set(self, signum: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(signum).name


@dataclass(frozen=True, slots=True)
class Ending:
    """How a job ends. An error counts against its chain."""

    outcome: str
    error: bool = False
    final: bool = False  # the chain has failed too often in a row
