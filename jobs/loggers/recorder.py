"""The observer that serves all loggers: it collects the training's reports and passes them to each logger's thread.

The training never waits for a logger. Losses stay on the device until a logger's thread fetches many of them at once.
A logger that fails or is too slow is turned off; nothing else is affected.
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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jobs.loggers.logger import LEARNING_RATE, TRAIN_LOSS, Logger, Points, Series
from jobs.loggers.observer import Observer
from orchestrator.files.checkpoint_record import CheckpointRecord, lineage
from orchestrator.records import EpochResult, Work

EVERY_S = 10.0  # how often points are passed to the loggers; this also happens at the end of each epoch
MOST_POINTS = 1024  # points are passed on when this many are collected, because they occupy device memory
MOST_WAITING = 1000  # maximum length of a logger's queue; a logger with a longer queue counts as too slow
CLOSE_S = 20.0  # how long all loggers together may keep writing when the job ends; Slurm allows 30 s (KillWait)

log = logging.getLogger("orch")
T = TypeVar("T")
Makers = Mapping[str, Callable[[], Logger]]  # functions that create the loggers, by name


class Once(Generic[T]):
    """A value shared by several threads. The first call computes it; later calls return the same value."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make: Callable[[], T] | None = make
        self._lock = Lock()
        self._value: T

    def __call__(self) -> T:
        with self._lock:
            if self._make is not None:
                self._value = self._make()
                self._make = None  # frees the objects that the function refers to
            return self._value


class Channel:
    """One logger and its thread. The first `put` starts the thread, which imports and creates the logger."""

    def __init__(self, name: str, make: Callable[[], Logger]) -> None:
        self.name = name
        self.off = False
        self._make = make
        self._calls: SimpleQueue[Callable[[Logger], None] | None] = SimpleQueue()
        self._thread: Thread | None = None
        self._turning_off = Lock()

    def put(self, call: Callable[[Logger], None]) -> None:
        """Queue a call to the logger; never blocks."""
        if self.off:
            return
        if self._calls.qsize() >= MOST_WAITING:
            self._turn_off(f"it is too slow: {MOST_WAITING} calls are waiting")
            return
        self._calls.put(call)
        if self._thread is None:
            self._thread = Thread(target=self._serve, name=f"logger {self.name}", daemon=True)
            self._thread.start()

    def finish(self) -> None:
        """Mark the end of the queue; `put` must not be called afterwards."""
        self._calls.put(None)

    def wait(self, deadline: float) -> None:
        """Wait until everything is written, or until time.monotonic() reaches the deadline."""
        if self._thread is None or self.off:
            return
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive() and not self.off:
            self._turn_off(f"it has not written everything {CLOSE_S:g} s after the end")

    def _serve(self) -> None:
        try:
            logger = self._make()
            while (call := self._calls.get()) is not None:
                if self.off:
                    return
                call(logger)
                del call  # frees the tensors that it refers to
            logger.close()
        except BaseException as error:  # a library may even call exit()
            self._turn_off(f"{type(error).__name__}: {error}")

    def _turn_off(self, reason: str) -> None:
        with self._turning_off:
            if not self.off:
                log.warning("logger %s is off for the rest of this job: %s", self.name, reason)
                self.off = True  # set last: the process may end as soon as `wait` sees it


class Channels:
    """All loggers of a process."""

    def __init__(self, makers: Makers) -> None:
        self._channels = [Channel(name, make) for name, make in makers.items()]

    def put(self, call: Callable[[Logger], None]) -> None:
        for channel in self._channels:
            channel.put(call)

    def close(self) -> None:
        """Close all loggers. Takes CLOSE_S at most."""
        deadline = time.monotonic() + CLOSE_S
        for channel in self._channels:
            channel.finish()
        for channel in self._channels:
            channel.wait(deadline)


class Recorder(Observer):
    """Reports the training to all loggers of a run."""

    def __init__(
        self, run: str, folder: Path, select_on: str, makers: Makers, clock: Callable[[], float] = time.time
    ) -> None:
        """folder: the checkpoints folder. select_on: the split on which each epoch is evaluated."""
        self._run = run
        self._checkpoints = folder
        self._select_on = select_on
        self._channels = Channels(makers)
        self._clock = clock
        self._work: Work | None = None
        self._begun = False  # has the chunk's series been started?
        self._last_step: int | None = None
        self._handed_over_at = 0.0
        self._steps: list[tuple[int, float, Tensor, float]] = []  # (step, time, loss, learning rate)

    # --- reports from the training

    def chunk(self, work: Work) -> None:
        self._end()
        self._work = work
        self._handed_over_at = self._clock()

    def step(self, step: int, loss: Tensor, learning_rate: float) -> None:
        now = self._clock()
        self._steps.append((step, now, loss, learning_rate))
        self._last_step = step
        if len(self._steps) >= MOST_POINTS or now - self._handed_over_at >= EVERY_S:
            self._hand_over()

    def epoch(self, result: EpochResult) -> None:
        """Log an epoch's metrics at the epoch's last step, or, if no steps were reported, at the epoch's number."""
        self._hand_over()
        step = result.number if self._last_step is None else self._last_step
        names = {name: f"{self._select_on}/{name}" for name in result.metrics} | {"train_loss": "train/epoch_loss"}
        values = {names[name]: [value] for name, value in result.metrics.items()}
        values |= {"epoch": [float(result.number)], "train/epoch_seconds": [result.seconds]}
        self._log(step, Points([step], [self._clock()], values))

    def metrics(self, metrics: Mapping[str, float]) -> None:
        self._hand_over()
        step = self._last_step or 0
        values = {f"{self._select_on}/{name}": [value] for name, value in metrics.items()}
        self._log(step, Points([step], [self._clock()], values))

    def show(self, kind: str, name: str, values: Tensor) -> None:
        self._hand_over()
        step = self._last_step or 0
        self._begin(step)
        array = values.detach().float().numpy() if kind == "histogram" else as_picture(values)
        shown = {"image": Logger.image.__name__, "histogram": Logger.histogram.__name__}[kind]
        self._channels.put(lambda logger: getattr(logger, shown)(step, name, array))

    def judged(self, promoted: bool) -> None:
        self._hand_over()
        if self._begun:
            self._channels.put(lambda logger: logger.judge(promoted))

    def close(self) -> None:
        self._end()
        self._channels.close()

    # --- calls to the loggers

    def _hand_over(self) -> None:
        self._handed_over_at = self._clock()
        if self._steps:
            points = Once(partial(_points, self._steps))
            self._log(self._steps[0][0], points)
            self._steps = []

    def _log(self, first_step: int, points: Points | Once[Points]) -> None:
        self._begin(first_step)
        self._channels.put(lambda logger: logger.log(points if isinstance(points, Points) else points()))

    def _begin(self, first_step: int) -> None:
        if not self._begun:
            self._begun = True
            assert self._work is not None, "chunk() must be called before step()"
            work = self._work
            series = Once(lambda: series_of(self._run, self._checkpoints, work, first_step))
            self._channels.put(lambda logger: logger.begin(series()))

    def _end(self) -> None:
        self._hand_over()
        if self._begun:
            self._channels.put(lambda logger: logger.end())
        self._begun, self._last_step = False, None


def as_picture(values: Tensor) -> NDArray[np.uint8]:
    """Convert a picture (channels, height, width) of 1 or 3 channels, uint8 or from 0 to 1, to (height, width,
    channels) uint8."""
    pixels = values if values.dtype is torch.uint8 else values.float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return pixels.permute(1, 2, 0).contiguous().numpy()


def series_of(run: str, checkpoints_folder: Path, work: Work, first_step: int) -> Series:
    """Return the series of a chunk that starts or continues. Tags whose values are not in the records are left out."""
    tags = _tags(
        run,
        lineage(checkpoints_folder, work.parent_file),
        chunk=work.chunk_id,
        parent_file=work.parent_file,
        generation=work.generation,
        worker=work.worker_id,
        position=work.position,
        profile=work.profile.name,
    )
    resumed = work.suspended is not None
    return Series(series_name(work.chunk_id), work.chunk_id, tags, first_step, new=not resumed, rewrites=resumed)


def series_of_tested(run: str, checkpoints_folder: Path, file: str, step: int) -> Series | None:
    """Return the series of the chunk that wrote a checkpoint; None without a record. step: the lineage's last step."""
    line = lineage(checkpoints_folder, file)
    if not line:
        return None
    *parents, own = line
    fields = own.model_dump(include={"chunk", "parent_file", "generation", "worker", "position", "profile"})
    tags = _tags(run, parents, **fields)
    return Series(series_name(own.chunk), own.chunk, tags, step, new=False)


def _tags(
    run: str, parents: Sequence[CheckpointRecord], *, chunk: int, parent_file: str | None, **others: str | int
) -> dict[str, str | int]:
    """Return a series' tags. parents: the known ancestors, founder first."""
    founder = chunk if parent_file is None else parents[0].chunk if parents else None
    parent = parents[-1].chunk if parents else None
    line = {"founder": founder, "parent_chunk": parent, "parent_checkpoint": parent_file}
    known = {name: value for name, value in line.items() if value is not None}
    return {"run": run, "chunk": chunk, **known, **others}


def series_name(chunk: int) -> str:
    return f"chunk-{chunk:08d}"


def _points(steps: list[tuple[int, float, Tensor, float]]) -> Points:
    """Convert steps to points, fetching all losses from the device in one transfer."""
    numbers, times, losses, rates = zip(*steps, strict=True)
    values: list[float] = torch.stack([loss.detach().reshape(()) for loss in losses]).tolist()
    return Points(numbers, times, {TRAIN_LOSS: values, LEARNING_RATE: rates})
