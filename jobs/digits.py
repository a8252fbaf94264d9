"""A quick-start job: scikit-learn's 1,797 handwritten digits, 8x8 pixels, fast on a CPU."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from torch import nn
from torch.utils.data import TensorDataset

from jobs.data.splits import Split, stratified
from jobs.errors import JobError
from jobs.job import Job
from orchestrator.settings.fields import Strict

TEST_SHARE = 0.2


class Params(Strict):
    width: int = Field(default=32, ge=1)  # channels of the first convolution


class Digits(Job):
    """A small convolutional network."""

    Params = Params

    def model(self) -> nn.Module:
        width = self.params.width
        return nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.25),
            nn.Linear(2 * width * 4 * 4, 10),
        )

    def data(self, split: Split) -> TensorDataset:
        return _digits()["test" if split == "test" else "train"]


@cache
def _digits() -> dict[str, TensorDataset]:
    """Return the training and test sets. There is no official split, so the test set is a fixed stratified fifth."""
    package = find_spec("sklearn")  # not imported: that would take most of a second in every job
    if package is None or package.origin is None:
        raise JobError("the digits are part of scikit-learn, which is not installed; run: pip install scikit-learn")
    table = np.loadtxt(Path(package.origin).parent / "datasets/data/digits.csv.gz", delimiter=",", dtype=np.int64)
    pixels = torch.tensor(table[:, :-1] / 16.0, dtype=torch.float32).view(-1, 1, 8, 8)
    targets = torch.tensor(table[:, -1])
    test = torch.from_numpy(stratified(table[:, -1], TEST_SHARE, seed=0))
    return {"train": TensorDataset(pixels[~test], targets[~test]), "test": TensorDataset(pixels[test], targets[test])}
