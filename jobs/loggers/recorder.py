"""The observer that loggers hang on: it gathers what the training says, and hands it to a thread of each logger.

Nothing of it makes the training wait. Losses stay on the device until a logger's thread fetches many at once, and what
a logger does not take in time, or fails with, costs that logger and nothing else.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Generic, TypeVar

import torch
from torch import Tensor

from jobs.loggers.logger import LEARNING_RATE, TRAIN_LOSS, Logger, Points, Series
from orchestrator.files.checkpoint_record import lineage
from orchestrator.records import EpochResult, Work

EVERY_S = 10.0  # points are handed over so often, and at the end of each epoch
MOST_POINTS = 1024  # or when there are so many: each holds some memory of the device
MOST_WAITING = 1000  # orders; a logger that lets more wait does not keep up
CLOSE_S = 20.0  # for all loggers together, to write what is left when the job ends; Slurm grants 30 s (KillWait)

log = logging.getLogger("orch")
T = TypeVar("T")


class Once(Generic[T]):
    """A value that the first of several threads makes which asks for it."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make: Callable[[], T] | None = make
        self._lock = Lock()
        self._value: T

    def __call__(self) -> T:
        with self._lock:
            if self._make is not None:
                self._value = self._make()
                self._make = None  # and with it what it was made of
            return self._value


class Channel:
    """One logger and its thread, which begins with the first order: that is when the logger is imported and made."""

    def __init__(self, name: str, make: Callable[[], Logger]) -> None:
        self.name = name
        self.off = False
        self._make = make
        self._orders: SimpleQueue[Callable[[Logger], None] | None] = SimpleQueue()
        self._thread: Thread | None = None
        self._giving_up = Lock()

    def put(self, order: Callable[[Logger], None]) -> None:
        """Never waits."""
        if self.off:
            return
        if self._orders.qsize() >= MOST_WAITING:
            self._give_up(f"it does not keep up: {MOST_WAITING} orders wait")
            return
        self._orders.put(order)
        if self._thread is None:
            self._thread = Thread(target=self._serve, name=f"logger {self.name}", daemon=True)
            self._thread.start()

    def finish(self) -> None:
        """No order comes after this."""
        self._orders.put(None)

    def wait(self, deadline: float) -> None:
        """Let it write what is left, until this time.monotonic()."""
        if self._thread is None or self.off:
            return
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive() and not self.off:
            self._give_up(f"it has not written everything {CLOSE_S:g} s after the end")

    def _serve(self) -> None:
        try:
            logger = self._make()
            while (order := self._orders.get()) is not None:
                if self.off:
                    return
                order(logger)
                del order  # and the tensors that it holds
            logger.close()
        except BaseException as error:  # a library may even call exit()
            self._give_up(f"{type(error).__name__}: {error}")

    def _give_up(self, reason: str) -> None:
        with self._giving_up:
            if not self.off:
                log.warning("logger %s is off for the rest of this job: %s", self.name, reason)
                self.off = True  # after the warning, which the end of the process must not cut off


class Channels:
    """All loggers of a process."""

    def __init__(self, makers: Mapping[str, Callable[[], Logger]]) -> None:
        """makers: of each logger, by its name."""
        self._channels = [Channel(name, make) for name, make in makers.items()]

    def put(self, order: Callable[[Logger], None]) -> None:
        for channel in self._channels:
            channel.put(order)

    def close(self) -> None:
        """Takes CLOSE_S at most."""
        deadline = time.monotonic() + CLOSE_S
        for channel in self._channels:
            channel.finish()
        for channel in self._channels:
            channel.wait(deadline)


class Recorder:
    """A jobs.loggers.observer.Observer."""

    def __init__(
        self,
        run: str,
        checkpoints_folder: Path,
        select_on: str,
        makers: Mapping[str, Callable[[], Logger]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """select_on: the split that each epoch is evaluated on. makers: of each logger, by its name."""
        self._run = run
        self._checkpoints = checkpoints_folder
        self._select_on = select_on
        self._channels = Channels(makers)
        self._clock = clock
        self._work: Work | None = None
        self._begun = False  # has the chunk's series been begun?
        self._last_step: int | None = None
        self._handed_over_at = 0.0
        self._fresh()

    def _fresh(self) -> None:
        self._steps: list[int] = []
        self._losses: list[Tensor] = []
        self._rates: list[float] = []
        self._times: list[float] = []

    # --- what the training says

    def chunk(self, work: Work) -> None:
        self._end()
        self._work = work
        self._handed_over_at = self._clock()

    def step(self, step: int, loss: Tensor, learning_rate: float) -> None:
        now = self._clock()
        self._steps.append(step)
        self._losses.append(loss)
        self._rates.append(learning_rate)
        self._times.append(now)
        self._last_step = step
        if len(self._steps) >= MOST_POINTS or now - self._handed_over_at >= EVERY_S:
            self._hand_over()

    def epoch(self, result: EpochResult) -> None:
        """A loop of the job's own that tells no steps has epochs on its x axis."""
        self._hand_over()
        step = result.number if self._last_step is None else self._last_step
        self._tell(step, Points([step], [self._clock()], self._epoch_values(result)))

    def judged(self, promoted: bool) -> None:
        self._hand_over()
        if self._begun:
            self._channels.put(lambda logger: logger.judge(promoted))

    def close(self) -> None:
        self._end()
        self._channels.close()

    # --- what the loggers are told

    def _epoch_values(self, result: EpochResult) -> dict[str, list[float]]:
        names = {name: f"{self._select_on}/{name}" for name in result.metrics} | {"train_loss": "train/epoch_loss"}
        values = {names[name]: [value] for name, value in result.metrics.items()}
        return values | {"epoch": [float(result.number)], "train/epoch_seconds": [result.seconds]}

    def _hand_over(self) -> None:
        self._handed_over_at = self._clock()
        if self._steps:
            steps, times, rates, losses = self._steps, self._times, self._rates, self._losses
            self._fresh()
            points = Once(lambda: Points(steps, times, {TRAIN_LOSS: _fetched(losses), LEARNING_RATE: rates}))
            self._tell(steps[0], points)

    def _tell(self, first_step: int, points: Points | Once[Points]) -> None:
        if not self._begun:
            self._begun = True
            assert self._work is not None, "a chunk begins before its first step"
            work = self._work
            series = Once(lambda: series_of(self._run, self._checkpoints, work, first_step))
            self._channels.put(lambda logger: logger.begin(series()))
        self._channels.put(lambda logger: logger.log(points if isinstance(points, Points) else points()))

    def _end(self) -> None:
        self._hand_over()
        if self._begun:
            self._channels.put(lambda logger: logger.end())
        self._begun, self._last_step = False, None


def series_of(run: str, checkpoints_folder: Path, work: Work, first_step: int) -> Series:
    """The series of a chunk that begins or goes on. What the records beside the checkpoints do not tell is left out."""
    line = lineage(checkpoints_folder, work.parent_file)
    founder = work.chunk_id if not work.parent_file else line[0].chunk if line else None
    tags = _known(
        run=run,
        chunk=work.chunk_id,
        founder=founder,
        parent_chunk=line[-1].chunk if line else None,
        parent_checkpoint=work.parent_file,
        profile=work.profile.name,
        position=work.position,
        worker=work.worker_id,
        generation=work.generation,
    )
    resumed = work.suspended is not None
    return Series(series_name(work.chunk_id), work.chunk_id, tags, first_step, not resumed, resumed)


def series_of_tested(run: str, checkpoints_folder: Path, file: str, step: int) -> Series | None:
    """The series of the chunk that made this checkpoint; None where its record is gone. step: its lineage's last."""
    line = lineage(checkpoints_folder, file)
    if not line:
        return None
    own = line[-1]
    tags = _known(
        run=run,
        chunk=own.chunk,
        founder=line[0].chunk,
        parent_chunk=line[-2].chunk if len(line) > 1 else None,
        parent_checkpoint=own.parent_file,
        profile=own.profile,
        position=own.position,
        worker=own.worker,
        generation=own.generation,
    )
    return Series(series_name(own.chunk), own.chunk, tags, step, new=False)


def _known(**tags: str | int | None) -> dict[str, str | int]:
    return {name: value for name, value in tags.items() if value is not None}


def tell_tests(
    run: str,
    checkpoints_folder: Path,
    makers: Mapping[str, Callable[[], Logger]],
    tests: Mapping[str, tuple[int, Mapping[str, float]]],
) -> None:
    """Models were tested. tests: by a checkpoint's file, the last step of its lineage, and the metrics."""
    channels = Channels(makers)
    for file, (step, metrics) in tests.items():
        series = series_of_tested(run, checkpoints_folder, file, step)
        if series is not None:
            channels.put(partial(_tell_test, series=series, metrics=metrics))
    channels.close()


def _tell_test(logger: Logger, series: Series, metrics: Mapping[str, float]) -> None:
    logger.begin(series)
    logger.judge(True)  # else nobody would have asked
    logger.test(series.step, metrics)
    logger.end()


def series_name(chunk: int) -> str:
    return f"chunk-{chunk:08d}"


def _fetched(losses: Sequence[Tensor]) -> list[float]:
    """Their values, in one transfer."""
    values: list[float] = torch.stack([loss.detach().reshape(()) for loss in losses]).tolist()
    return values
