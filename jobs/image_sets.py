"""What the jobs on torchvision's small data sets share: all images in memory, a subset for trials, statistics."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from jobs.data import images
from jobs.data.images import Examples, Statistics
from jobs.errors import JobError
from jobs.job import Job, local_path
from orchestrator.settings.fields import Strict

Count = Annotated[int, Field(ge=1)]


class Limits(Strict):
    """Params of a job whose data set can be cut down for trials."""

    train_images: Count | None = None  # this many in all, the first ones of each class
    test_images: Count | None = None


class ImageSetJob(Job):
    """training_source_dir is the root of one of torchvision's data sets, which holds its test images too."""

    NAME: ClassVar[str]  # of the data set, in messages

    def open(self, root: str | Path, train: bool, download: bool = False) -> Examples:
        """All training or all test examples. Raises JobError if they are not there."""
        raise JobError(f"{type(self).__name__} has no open(root, train, download); it must return images and targets")

    @cached_property
    def training_set(self) -> Examples:
        return self._examples(train=True)

    @cached_property
    def test_set(self) -> Examples:
        return self._examples(train=False)

    @cached_property
    def statistics(self) -> Statistics:
        """Mean and standard deviation of each channel over the training set, of values in [0, 1]."""
        return images.channel_statistics(self.training_set[0])

    def _examples(self, train: bool) -> Examples:
        root = local_path(self.context.settings.training_source_dir, "training_source_dir")
        pixels, targets = self.open(root, train)
        chosen = limited(targets, self.params, train)
        return pixels[chosen], targets[chosen]

    def prepare(self, download: bool) -> list[str]:
        root = self.context.settings.training_source_dir
        if download and root:
            for train in (True, False):
                self.open(root, train, download=True)
        counts = f"{len(self.training_set[1])} training and {len(self.test_set[1])} test images"
        self.data("train")
        return [f"{self.NAME}, {counts}, in {root}"]


def limited(targets: Tensor, limits: Limits, train: bool) -> Tensor:
    """first_of_each_class, as the limits say for the training or the test examples."""
    count, name = (limits.train_images, "train") if train else (limits.test_images, "test")
    return first_of_each_class(targets, count, f"job_params: {name}_images")


def first_of_each_class(targets: Tensor, count: int | None, setting: str) -> Tensor:
    """Indices (int64, rising) of `count` examples (None: all), the first ones of each class and about equally many of
    each. targets: int64 (n,). Raises JobError, naming the setting, if count is more than the examples or less than the
    classes."""
    if count is not None and count > len(targets):
        raise JobError(
            f"{setting}: {count} is more than the {len(targets)} examples that there are; allowed is at most "
            f"{len(targets)}, or leave it out to take them all"
        )
    if count is None or count == len(targets):
        return torch.arange(len(targets))
    classes = torch.unique(targets).tolist()
    if count < len(classes):
        raise JobError(f"{setting}: {count} examples can't hold one of each of {len(classes)} classes")
    chosen = torch.zeros(len(targets), dtype=torch.bool)
    for number, label in enumerate(classes):
        wanted = count // len(classes) + (number < count % len(classes))
        chosen[torch.nonzero(targets == label)[:wanted, 0]] = True
    return chosen.nonzero()[:, 0]
