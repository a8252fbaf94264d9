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
    """What a logger is given when it is made."""

    run: str  # the run's name
    folder: Path  # the run's logs; a logger makes a folder of its own in it
    lock: LockKind = "soft"  # the kind that holds on this file system, for files that several workers write


@dataclass(frozen=True, slots=True)
class Series:
    """The curves of one chunk. Their x axis is the lineage's optimizer steps, so a chunk's curves begin where those of
    its parent end."""

    name: str  # chunk-00000012
    chunk: int
    tags: Mapping[str, str | int]  # the lineage: run, chunk, parent_chunk, founder, profile, worker, ...
    step: int  # the first that is written now
    new: bool = True  # False: an earlier job began it
    rewrites: bool = False  # True: a job that died may have written steps from `step` on, which are trained again


@dataclass(frozen=True, slots=True)
class Points:
    """Values at some steps, which ascend. Each of `values` is as long as `steps`."""

    steps: Sequence[int]
    times: Sequence[float]  # Unix seconds
    values: Mapping[str, Sequence[float]]  # by name: "train/loss", "train/learning_rate", "validation/accuracy", ...


class Logger:
    """Where curves go. All methods are called in one thread, which is not the training's: waiting in them delays
    nothing, and an error in one of them turns this logger off for the rest of the job.

    Import slow libraries inside the methods, not at the top of the module.
    """

    def __init__(self, place: Place) -> None:
        self.run = place.run
        self.folder = place.folder
        self.lock = place.lock

    def begin(self, series: Series) -> None:
        """A chunk begins, or continues (not series.new)."""

    def log(self, points: Points) -> None:
        """Points of the chunk that was begun last."""

    def judge(self, promoted: bool) -> None:
        """The chunk's model was admitted to the board or not."""

    def test(self, step: int, metrics: Mapping[str, float]) -> None:
        """`orch evaluate` tested this chunk's model. By default the metrics are logged as points."""
        self.log(Points([step], [time.time()], {f"test/{name}": [value] for name, value in metrics.items()}))

    def end(self) -> None:
        """The chunk is over or suspended: write what is left."""

    def close(self) -> None:
        """The process ends; the last chunk was ended."""


def run_id(folder: Path) -> str:
    """Eight characters that identify the run, also among runs of the same name, for services that keep many runs in
    one place. The first worker that asks writes them down. Raises OSError."""
    path = folder / "run-id"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        mine = folder / f".run-id-{secrets.token_hex(8)}"
        mine.write_text(secrets.token_hex(4))
        try:
            os.link(mine, path)  # atomic, also between nodes
        except FileExistsError:
            pass
        finally:
            mine.unlink()
    return path.read_text()
