"""Short training for tests: a job with data in memory, a job with files, and functions that train as a chain does."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from jobs.data import randomness
from jobs.data.splits import Split
from jobs.digits import Digits
from jobs.job import Job, JobContext
from jobs.training.session import Session
from orchestrator.profile import Profile
from orchestrator.records import EpochResult, Finished, Interrupted, Work
from orchestrator.settings.settings import Settings
from tests.support.settings import settings

FAST = Profile("fast", learning_rate=0.05, momentum=0.9, weight_decay=0.0005)
PLAIN = Profile("plain", learning_rate=0.01, momentum=0.0, weight_decay=0.0)
FINE = Profile("fine", learning_rate=0.002, momentum=0.5, weight_decay=0.01)
STEPS = 6  # steps in an epoch of either job below, with the settings below

Fresh = Callable[[], Session]


# --- jobs


class PicturesParams(BaseModel):
    folder: str


class Pictures(Job):
    """A job on PNG files, which are read, randomly cropped and mirrored in each epoch."""

    Params = PicturesParams

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(4 * 6 * 6, 4),
        )

    def data(self, split: Split) -> Dataset[Any]:
        crop = [v2.RandomCrop(8), v2.RandomHorizontalFlip()] if split == "train" else [v2.CenterCrop(8)]
        steps = v2.Compose([*crop, v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
        return ImageFolder(str(Path(self.params.folder) / ("test" if split == "test" else "train")), steps)


def draw_pictures(folder: Path, classes: int, each: int, seed: int) -> None:
    """Write PNG files of 10x10 pixels; each class has a colour, and each picture has its own noise."""
    pixels = np.random.default_rng(seed)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(each):
            colour = np.array([60 * label, 200 - 60 * label, 30 * label])
            picture = np.clip(colour + pixels.integers(0, 60, (10, 10, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(picture).save(folder / f"class{label}" / f"{number}.png")


def digits_settings(**changes: Any) -> Settings:
    values = {"job": "jobs.digits:Digits", "job_params": {"width": 4}, "seed": 3}
    return settings(**values | {"validation_fraction": 0.2, "max_batch_size": 200} | changes)


def digits_session(job: type[Job] = Digits, **changes: Any) -> Session:
    return Session(job(JobContext(digits_settings(**changes))))


def picture_sessions(folder: Path) -> Fresh:
    """Draw pictures in the folder, and return a factory of Sessions that train on them."""
    draw_pictures(folder / "train", classes=4, each=15, seed=0)
    draw_pictures(folder / "test", classes=4, each=5, seed=1)
    given = settings(seed=3, job_params={"folder": str(folder)}, validation_fraction=0.2, max_batch_size=8)
    return lambda: Session(Pictures(JobContext(given)))


# --- helpers

_processes = itertools.count(1000)


def in_a_new_process() -> None:
    """Simulate a new process, which does not have the previous one's random state."""
    randomness.seed_all(next(_processes))


def never() -> bool:
    return False


def after(steps: int) -> Callable[[], bool]:
    """Return a should_stop function, which is called before each step and returns True after this many steps."""
    asked = iter(range(steps + 1))
    return lambda: next(asked) == steps


def train(
    session: Session, work: Work, stop: Callable[[], bool] = never, seen: list[EpochResult] | None = None
) -> Finished:
    in_a_new_process()
    result = session.train(work, stop, [].append if seen is None else seen.append)
    assert isinstance(result, Finished)
    return result


def interrupt(
    session: Session, work: Work, steps: int, file: Path, seen: list[EpochResult] | None = None
) -> Interrupted:
    in_a_new_process()
    result = session.train(work, after(steps), [].append if seen is None else seen.append)
    assert isinstance(result, Interrupted)
    return save(session, file) and result


def save(session: Session, file: Path) -> Path:
    with file.open("wb") as target:
        session.save(target)
    return file


def differences(left: Any, right: Any, place: str = "state") -> list[str]:
    """Return a line for each place where two states are not bit-for-bit the same."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return [] if left.dtype == right.dtype and torch.equal(left, right) else [place]
    if isinstance(left, dict) and isinstance(right, dict):
        if list(left) != list(right):
            return [f"{place}: {list(left)}, {list(right)}"]
        return [line for key in left for line in differences(left[key], right[key], f"{place}.{key}")]
    if isinstance(left, list | tuple) and isinstance(right, list | tuple) and len(left) == len(right):
        return [
            line
            for i, (a, b) in enumerate(zip(left, right, strict=True))
            for line in differences(a, b, f"{place}[{i}]")
        ]
    return [] if left == right else [f"{place}: {left}, {right}"]


def measured(result: Finished) -> list[tuple[int, dict[str, float]]]:
    return [(epoch.number, dict(epoch.metrics)) for epoch in result.results]


def founder(seed: int = 1, epochs: int = 1, profile: Profile = FAST) -> Work:
    return Work(profile, epochs, seed, repeat=0, parent=None, suspended=None)


def child(parent: Path, profile: Profile = FAST, epochs: int = 1, repeat: int = 0) -> Work:
    return Work(profile, epochs, seed=0, repeat=repeat, parent=parent, suspended=None)


def momentum(state: dict[str, Any]) -> list[Tensor]:
    return [moved["momentum_buffer"] for moved in state["optimizer"]["state"].values()]


def save_trained(session: Session, work: Work, file: Path) -> Path:
    train(session, work)
    return save(session, file)
