"""The interface of trainers, the flag that stops a job, and the description of how a job ended."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import IO, Any, Protocol, runtime_checkable

from orchestrator.records import EpochResult, Finished, Interrupted, Work


@runtime_checkable
class Trainer(Protocol):
    """Trains chunks. Implemented by jobs.training.session.Session, or by the user's own class."""

    def train(
        self, work: Work, should_stop: Callable[[], bool], on_epoch: Callable[[EpochResult], None]
    ) -> Finished | Interrupted:
        """Train one chunk. Call should_stop before each step; if it returns True, stop and return Interrupted."""
        ...

    def save(self, target: IO[bytes]) -> None:
        """Write the complete training state of the finished or interrupted chunk to target."""
        ...

    def snapshot(self) -> Callable[[IO[bytes]], None] | None:
        """Copy the complete training state. Return a function that writes the copy to a file; another thread calls it
        while the next chunk trains. Return None if this trainer can't do that: then `save` is called.

        A trainer that returns a function must also support `Work.in_memory` and `Work.tentative`."""
        return None

    def confirmed(self, work: Work) -> None:
        """Called while a chunk with work.tentative trains, or after it: the chunk has been claimed as `work`. Without
        this call, the chunk's result is thrown away."""

    def judged(self, promoted: bool) -> None:
        """Called after each finished chunk. promoted: whether the chunk entered the leaderboard."""

    def close(self) -> None:
        """Release resources before the process ends."""


class WithDefaults(Trainer):
    """Wraps a user's trainer that does not inherit from Trainer. Adds the default methods that the trainer lacks."""

    def __init__(self, own: Any) -> None:
        methods = ("train", "save", "snapshot", "confirmed", "judged", "close")
        self.__dict__.update({name: getattr(own, name) for name in methods if hasattr(own, name)})


class StopFlag:
    """A flag set by signals and read by the loop between steps."""

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
    """How a job ended. An error counts as a failure of the job's chain."""

    outcome: str
    error: bool = False
    final: bool = False  # the chain ends too, because it has failed too often in a row
