"""The base class of all loggers: the built-in ones and users' own. Every method has a default implementation."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orchestrator.records import LockKind

TRAIN_LOSS, LEARNING_RATE = "train/loss", "train/learning_rate"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a logger writes: the argument of its constructor."""

    run: str  # the run's name
    folder: Path  # the run's log folder, shared by all its loggers
    lock: LockKind = "soft"  # the lock that works on this file system, for files shared by several workers


@dataclass(frozen=True, slots=True)
class Series:
    """The curves of one chunk. The x axis is the lineage's optimizer steps, so a chunk's curves start where its
    parent's curves end."""

    name: str  # chunk-00000012
    chunk: int
    tags: Mapping[str, str | int]  # the lineage: run, chunk, parent_chunk, founder, profile, worker, ...
    step: int  # the first step to be written
    new: bool = True  # False: an earlier job started this series
    rewrites: bool = False  # True: a job that died may already have logged some steps from `step` on


@dataclass(frozen=True, slots=True)
class Points:
    """Values at ascending steps. Each sequence in `values` has one value per step."""

    steps: Sequence[int]
    times: Sequence[float]  # Unix seconds
    values: Mapping[str, Sequence[float]]  # by name: "train/loss", "train/learning_rate", "validation/accuracy", ...


class Logger:
    """Writes curves. All methods are called in one thread, separate from the training thread: blocking in them does
    not delay the training. An error in one of them turns this logger off for the rest of the job.

    Import slow libraries inside the methods, not at the top of the module.
    """

    def __init__(self, place: Place) -> None:
        self.run = place.run
        self.folder = place.folder
        self.lock = place.lock

    def begin(self, series: Series) -> None:
        """Start the series of a chunk, or continue it if series.new is False."""

    def log(self, points: Points) -> None:
        """Log points of the most recently started chunk."""

    def image(self, step: int, name: str, pixels: NDArray[np.uint8]) -> None:
        """Write a picture of the job: (height, width, 1 or 3)."""

    def histogram(self, step: int, name: str, values: NDArray[np.float32]) -> None:
        """Write the distribution of some values of the job."""

    def judge(self, promoted: bool) -> None:
        """Record whether the chunk's model was admitted to the board."""

    def test(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics that `orch evaluate` measured for this chunk's model. The default logs them as points."""
        self.log(Points([step], [time.time()], {f"test/{name}": [value] for name, value in metrics.items()}))

    def end(self) -> None:
        """Write all remaining data: the chunk is finished or suspended."""

    def close(self) -> None:
        """Clean up before the process ends. The last chunk has already been ended."""


def run_id(folder: Path) -> str:
    """Return eight characters that identify the run, even among runs with the same name, for services that store many
    runs in one place. The first worker that needs them writes them to folder/run-id. Raises OSError."""
    path = folder / "run-id"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        mine = folder / f".run-id-{secrets.token_hex(8)}"
        mine.write_text(secrets.token_hex(4))
        try:
            os.link(mine, path)  # atomic, even between nodes
        except FileExistsError:
            pass
        finally:
            mine.unlink()
    return path.read_text()
