"""A small job with every kind of state, and Sessions that train it, for tests of what a training step depends on."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from jobs.data import randomness
from jobs.data.splits import Split
from jobs.job import Averaging, Job, JobContext
from jobs.loggers.observer import Observer
from jobs.training.session import Session
from jobs.training.states import read
from jobs.verify_resume.exactness import differences
from orchestrator.profile import Profile
from orchestrator.records import Finished, Interrupted, Work
from tests.support.settings import settings

SGD = Profile("sgd", learning_rate=0.05, momentum=0.9, weight_decay=0.001)
STEPS = 5  # steps in an epoch


class Small(Job):
    """A job with noise in three classes as data, and a model whose layers have every kind of state."""

    def model(self) -> nn.Module:
        layers = (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 3))
        return nn.Sequential(*layers)

    def data(self, split: Split) -> Dataset[Any]:
        generator = torch.Generator().manual_seed(int(split == "test"))
        targets = torch.arange(60) % 3
        images = torch.randn(60, 2, 6, 6, generator=generator) + targets.view(-1, 1, 1, 1)
        return TensorDataset(images, targets)


class Averaged(Small):
    def averaging(self) -> Averaging:
        return Averaging(0.9, every_steps=2)


def context(**changes: Any) -> JobContext:
    values = {"deterministic": True, "validation_fraction": 0.2, "max_batch_size": 10, "precision": "fp32"}
    return JobContext(settings(**values | changes))


def session_of(job: type[Job] = Small, observer: Observer | None = None, **changes: Any) -> Session:
    return Session(job(context(**changes)), observer=observer)


def founder(profile: Profile = SGD, epochs: int = 1) -> Work:
    return Work(profile, epochs, seed=7, repeat=0, parent=None, suspended=None)


def child(parent: Path, profile: Profile = SGD, epochs: int = 1) -> Work:
    return Work(profile, epochs, seed=0, repeat=0, parent=parent, suspended=None)


_processes = itertools.count(5000)


def train(session: Session, work: Work, file: Path, steps: int | None = None) -> dict[str, Any]:
    """Train a chunk, or `steps` steps of it, as a new process would, and return the state read from its file."""
    randomness.seed_all(next(_processes))
    asked = itertools.count()
    result = session.train(work, lambda: steps is not None and next(asked) >= steps, lambda _epoch: None)
    assert isinstance(result, Finished if steps is None else Interrupted)
    with file.open("wb") as target:
        session.save(target)
    return read(file)


def rates(state: dict[str, Any]) -> list[float]:
    return [group["lr"] for group in state["optimizer"]["param_groups"]]


def assert_same(left: Any, right: Any) -> None:
    assert not list(differences(left, right))
