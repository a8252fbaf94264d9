"""What trains a chunk, what tells it to stop, and how a job ends."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import IO, Any, Protocol, runtime_checkable

from orchestrator.records import EpochResult, Finished, Interrupted, Work


@runtime_checkable
class Trainer(Protocol):
    """What trains: jobs.training.session.Session, or a class of the user's that is derived from this one."""

    def train(
        self, work: Work, should_stop: Callable[[], bool], on_epoch: Callable[[EpochResult], None]
    ) -> Finished | Interrupted:
        """Train one chunk. Ask should_stop before each step; where it is true, return Interrupted."""
        ...

    def save(self, target: IO[bytes]) -> None:
        """Write the whole training state, of a finished or an interrupted chunk, to target."""
        ...

    def judged(self, promoted: bool) -> None:
        """The chunk that was finished last has entered the leaderboard, or not."""

    def close(self) -> None:
        """The process ends."""


class WithDefaults(Trainer):
    """A user's trainer that is not derived from Trainer: its own methods, and the defaults of those that it lacks."""

    def __init__(self, own: Any) -> None:
        methods = ("train", "save", "judged", "close")
        self.__dict__.update({name: getattr(own, name) for name in methods if hasattr(own, name)})


class StopFlag:
    """Signals only set it; the loop reads it between two steps."""

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
