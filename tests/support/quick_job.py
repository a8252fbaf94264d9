"""A job without torch, for tests of chains: it sleeps instead of training, and can be suspended."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from orchestrator.records import EpochResult, Finished, Interrupted, Work
from orchestrator.settings.settings import Settings
from orchestrator.worker.trainer import Trainer

STEPS = 10


class Quick(Trainer):
    """job_params: {"seconds": duration of an epoch}. The score depends only on the parent and the profile."""

    @staticmethod
    def open_trainer(settings: Settings, cores: int) -> Quick:
        return Quick(settings.job_params.get("seconds", 0.5))

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.state: dict[str, Any] = {}

    def train(
        self, work: Work, should_stop: Callable[[], bool], on_epoch: Callable[[EpochResult], None]
    ) -> Finished | Interrupted:
        source = work.suspended or work.parent
        self.state = json.loads(Path(source).read_bytes()) if source else {"epochs": 0, "name": str(work.seed)}
        self.state.setdefault("step", 0)
        while self.state["step"] < STEPS * work.epochs:
            if should_stop():
                return Interrupted(self.state["step"])
            time.sleep(self.seconds / STEPS)
            self.state["step"] += 1
        name = hashlib.sha256(f"{self.state['name']} {work.profile.name} {work.repeat}".encode()).hexdigest()
        first = self.state["epochs"] + 1
        score = int(name[:8], 16) / 2**32
        results = tuple(
            EpochResult(first + i, self.seconds, {"accuracy": score, "train_loss": 1 - score})
            for i in range(work.epochs)
        )
        self.state = {"epochs": self.state["epochs"] + work.epochs, "name": name}
        return Finished(score, self.state["epochs"], results, self.seconds * work.epochs)

    def save(self, target: IO[bytes]) -> None:
        target.write(json.dumps(self.state).encode())
