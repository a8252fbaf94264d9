"""A job without torch, for tests of chains: it sleeps instead of training, and can be suspended."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from orchestrator.records import EpochResult, Finished, Interrupted, Work
from orchestrator.settings.settings import Settings
from orchestrator.worker.trainer import Trainer

STEPS = 10
MEETINGS = 3  # the first jobs of each worker, if they are told to meet


class Quick(Trainer):
    """The score depends only on the parent and the profile. job_params:

    seconds: the duration of an epoch
    hold: [file, step]: at this step of a chunk, wait while the file exists, or until the job is asked to stop
    meet: a folder: the nth job of each worker trains only when the nth jobs of all workers train
    """

    @staticmethod
    def open_trainer(settings: Settings, cores: int) -> Quick:
        return Quick(settings.workers, **settings.job_params)

    def __init__(
        self, workers: int = 1, seconds: float = 0.5, hold: tuple[str, int] | None = None, meet: str | None = None
    ) -> None:
        self.workers = workers
        self.seconds = seconds
        self.hold = hold
        self.meet = meet
        self.state: dict[str, Any] = {}

    def train(
        self, work: Work, should_stop: Callable[[], bool], on_epoch: Callable[[EpochResult], None]
    ) -> Finished | Interrupted:
        source = work.suspended or work.parent
        self.state = json.loads(Path(source).read_bytes()) if source else {"epochs": 0, "name": str(work.seed)}
        self.state.setdefault("step", 0)
        name = hashlib.sha256(f"{self.state['name']} {work.profile.name} {work.repeat}".encode()).hexdigest()
        first = self.state["epochs"] + 1
        score = int(name[:8], 16) / 2**32
        metrics = {"accuracy": score, "train_loss": 1 - score}
        results = tuple(EpochResult(first + i, self.seconds, metrics) for i in range(work.epochs))
        if self.meet is not None:
            self._meet(Path(self.meet), work.worker_id)
        while self.state["step"] < STEPS * work.epochs:
            if self._stops_at(self.state["step"], should_stop):
                return Interrupted(self.state["step"])
            time.sleep(self.seconds / STEPS)
            self.state["step"] += 1
            if self.state["step"] % STEPS == 0:
                on_epoch(results[self.state["step"] // STEPS - 1])
        self.state = {"epochs": self.state["epochs"] + work.epochs, "name": name}
        return Finished(score, self.state["epochs"], results, self.seconds * work.epochs)

    def _stops_at(self, step: int, should_stop: Callable[[], bool]) -> bool:
        stop = should_stop()
        while not stop and self.hold is not None and step == self.hold[1] and Path(self.hold[0]).exists():
            time.sleep(0.02)
            stop = should_stop()
        return stop

    def _meet(self, folder: Path, worker_id: int) -> None:
        self.meet = None  # once in each job
        (folder / f"{worker_id}-{os.getpid()}").touch()
        number = min(len(list(folder.glob(f"{worker_id}-*"))), MEETINGS)
        end = time.monotonic() + 120
        while any(len(list(folder.glob(f"{worker}-*"))) < number for worker in range(self.workers)):
            if time.monotonic() > end:
                raise TimeoutError(f"worker {worker_id} trains alone in its job {number}")
            time.sleep(0.02)

    def save(self, target: IO[bytes]) -> None:
        target.write(json.dumps(self.state).encode())
