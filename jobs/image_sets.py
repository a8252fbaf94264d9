"""What the jobs on torchvision's data sets have in common: images in memory, some of them for trials, statistics."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from jobs.data import images
from jobs.errors import JobError
from jobs.job import Job, local_path
from orchestrator.settings.fields import Strict

Count = Annotated[int, Field(ge=1)]
Examples = tuple[Tensor, Tensor]  # images, uint8 (n, channels, height, width); targets, int64 (n,)


class Limits(Strict):
    """To be derived from by a job's Params."""

    train_images: Count | None = None  # for trials: the first of each class, so many in all
    test_images: Count | None = None


class ImageSetJob(Job):
    """training_source_dir is the root of one of torchvision's data sets, which has its test images there too."""

    NAME: ClassVar[str]  # of the data set, for people

    def open(self, root: str | Path, train: bool, download: bool = False) -> Examples:
        """All examples of one side. Raises JobError if they are not there."""
        raise JobError(f"{type(self).__name__} does not say how {self.NAME} is opened: it has no open(root, ...)")

    @cached_property
    def training_set(self) -> Examples:
        return self._side(train=True)

    @cached_property
    def test_set(self) -> Examples:
        return self._side(train=False)

    @cached_property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel over the training set, of values in [0, 1]."""
        return images.channel_statistics(self.training_set[0])

    def _side(self, train: bool) -> Examples:
        root = local_path(self.context.settings["training_source_dir"], "training_source_dir")
        pixels, targets = self.open(root, train)
        chosen = limited(targets, self.params, train)
        return pixels[chosen], targets[chosen]

    def prepare(self, download: bool) -> list[str]:
        root = self.context.settings["training_source_dir"]
        if download and root:
            for train in (True, False):
                self.open(root, train, download=True)
        counts = f"{len(self.training_set[1])} training and {len(self.test_set[1])} test images"
        self.data("train")
        return [f"{self.NAME}, {counts}, in {root}"]


def limited(targets: Tensor, limits: Limits, train: bool) -> Tensor:
    """Indices (int64) of the examples of one side that are used. Raises JobError if they are more than there are, or if
    a class would have none."""
    count, name = (limits.train_images, "train") if train else (limits.test_images, "test")
    return first_of_each_class(targets, count, f"job_params: {name}_images")


def first_of_each_class(targets: Tensor, count: int | None, setting: str) -> Tensor:
    """Indices (int64, rising) of about so many examples: the first of each class, of all classes equally many, one
    more of some if it does not come out even. None: all.

    targets: int64 (n,). Raises JobError, naming the setting, if count is more than there are, or less than the classes.
    """
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
    for rank, label in enumerate(classes):
        wanted = count // len(classes) + (rank < count % len(classes))
        chosen[torch.nonzero(targets == label)[:wanted, 0]] = True
    return chosen.nonzero()[:, 0]
