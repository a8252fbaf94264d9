"""The first five minutes: scikit-learn's 1,797 handwritten digits (8x8 pixels), seconds an epoch on a CPU."""

from __future__ import annotations

from functools import cache

import torch
from pydantic import Field
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import TensorDataset

from jobs.job import Job, Split
from orchestrator.settings import Strict

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
    """Always the same stratified fifth for the test: the data set comes without a split of its own."""
    images, labels = load_digits(return_X_y=True)
    train, test = train_test_split(range(len(labels)), test_size=TEST_SHARE, stratify=labels, random_state=0)
    pixels = torch.tensor(images / 16.0, dtype=torch.float32).view(-1, 1, 8, 8)
    targets = torch.tensor(labels, dtype=torch.int64)
    return {
        "train": TensorDataset(pixels[train], targets[train]),
        "test": TensorDataset(pixels[test], targets[test]),
    }
