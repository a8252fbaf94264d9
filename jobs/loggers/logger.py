"""What a logger is: built in or a user's own. Derive from Logger; every method has a default that does nothing."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.records import LockKind

TRAIN_LOSS, LEARNING_RATE = "train/loss", "train/learning_rate"


@dataclass(frozen=True, slots=True)
class Place:
    """What a logger is told when it is made."""

    run: str  # the run's name
    folder: Path  # the run's logs; a logger makes a folder of its own in it
    lock: LockKind = "soft"  # which one holds on this file system, for what several workers write


@dataclass(frozen=True, slots=True)
class Series:
    """The curves of one chunk. Their x axis are the optimizer steps of the lineage, so that the curves of a chunk
    begin where those of its parent end."""

    name: str  # chunk-00000012
    chunk: int
    tags: Mapping[str, str | int]  # the lineage: run, chunk, parent_chunk, founder, profile, worker, ...
    step: int  # the first that is written now
    new: bool = True  # False: an earlier job began it
    rewrites: bool = False  # an earlier job, which died, may have written steps from `step` on: they are trained anew


@dataclass(frozen=True, slots=True)
class Points:
    """Values at some steps, which ascend. Each of `values` is as long as `steps`."""

    steps: Sequence[int]
    times: Sequence[float]  # Unix seconds
    values: Mapping[str, Sequence[float]]  # by name: "train/loss", "train/learning_rate", "validation/accuracy", ...


class Logger:
    """Where curves go. Every method is called in one thread, which is not the training's: what it waits for holds
    nothing up, and what it raises turns this logger off for the rest of the job.

    Import what takes time inside the methods, not with the module.
    """

    def __init__(self, place: Place) -> None:
        self.run = place.run
        self.folder = place.folder
        self.lock = place.lock

    def begin(self, series: Series) -> None:
        """A chunk begins, or goes on (not series.new)."""

    def log(self, points: Points) -> None:
        """Points of the chunk that was begun last."""

    def judge(self, promoted: bool) -> None:
        """The chunk's model enters the board, or is dropped."""

    def test(self, step: int, metrics: Mapping[str, float]) -> None:
        """The model that this chunk made was tested; `orch evaluate` does that. By default they are points."""
        self.log(test_points(step, metrics))

    def end(self) -> None:
        """The chunk is over or suspended: write what is left."""

    def close(self) -> None:
        """The process ends; the last chunk was ended."""


def test_points(step: int, metrics: Mapping[str, float]) -> Points:
    return Points([step], [time.time()], {f"test/{name}": [value] for name, value in metrics.items()})


def run_id(folder: Path) -> str:
    """Eight characters that no other run has, also not one of the same name: for services that keep many runs in one
    place. Whichever worker asks first writes them down. Raises OSError."""
    path = folder / "run-id"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        mine = folder / f".run-id-{secrets.token_hex(8)}"
        mine.write_text(secrets.token_hex(4))
        try:
            os.link(mine, path)  # once or not at all, also between nodes
        except FileExistsError:
            pass
        finally:
            mine.unlink()
    return path.read_text()
