"""The interface of trainers, the flag that stops a job, and the description of how a job ended."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import IO, Any, Protocol, runtime_checkable

from orchestrator.records import EpochResult, Finished, Interrupted, Kept, Work


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

    def kept(self) -> Sequence[Kept]:
        """Called after `train` has raised: return the chunk's states from before the error, the latest first. The chunk
        goes on from the first of them that can be written."""
        return ()

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
        methods = ("train", "save", "snapshot", "kept", "confirmed", "judged", "close")
        self.__dict__.update({name: getattr(own, name) for name in methods if hasattr(own, name)})


class StopFlag:
    """A flag set by signals and read by the loop between steps."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)

    def __init__(self) -> None:
        self.reason: str | None = None
        self._listens = False
        self._interactive = False

    def listen(self) -> None:
        self._listens = True
        self.listen_again()

    def listen_again(self) -> None:
        """Take the signals back if the user's code or a library has set its own handlers, which would end the process
        or ignore Slurm's warning. Called before every step, so it only looks if nothing has changed."""
        if self._listens:
            for signum in self.SIGNALS:
                if signal.getsignal(signum) != self._set:  # a bound method is another object each time
                    signal.signal(signum, self._set)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen inside the block, in a process that has a life of its own: at the end of the block, a signal has the
        effect that it would have had without it. A second Ctrl-C raises KeyboardInterrupt inside the block."""
        if threading.current_thread() is not threading.main_thread():  # Python can set signal handlers only there
            yield
            return
        had = {signum: signal.getsignal(signum) for signum in self.SIGNALS}
        self._interactive = True
        self.listen()
        try:
            yield
        finally:
            self._listens = False
            for signum, handler in had.items():
                signal.signal(signum, handler)
        if self.reason in {signum.name for signum in self.SIGNALS}:
            signal.raise_signal(signal.Signals[self.reason])

    def raise_if_pressed_again(self, error: BaseException) -> None:
        """Raise the error if it is the KeyboardInterrupt of a second Ctrl-C. Any other is an error of the user's code,
        which may raise anything (also by sys.exit())."""
        if isinstance(error, KeyboardInterrupt) and self._interactive and self.reason is not None:
            raise error

    def _set(self, signum: int, frame: FrameType | None) -> None:
        if self.reason is not None and self._interactive and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = signal.Signals(signum).name


@dataclass(frozen=True, slots=True)
class Ending:
    """How a job ended. An error counts as a failure of the job's chain."""

    outcome: str
    error: bool = False
    final: bool = False  # the chain ends too, because it has failed too often in a row
    early: str | None = None  # the signature of an error that came when the job was opened (see rules/failing)
