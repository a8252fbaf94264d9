"""Shared by the jobs on torchvision's small data sets: images in memory, subsets for quick tests, statistics."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from jobs.data import images
from jobs.data.download import Fetch
from jobs.data.images import Archives, Examples, Statistics, bring_archives
from jobs.errors import JobError
from jobs.job import Job, local_path
from orchestrator.settings.fields import Strict

Count = Annotated[int, Field(ge=1)]


class Limits(Strict):
    """Params of a job whose data set can be reduced for quick tests."""

    train_images: Count | None = None  # total number of images: the first ones of each class; None: all
    test_images: Count | None = None


class ImageSetJob(Job):
    """training_source_dir is the root of a torchvision data set, including its test images."""

    NAME: ClassVar[str]  # the data set's name in messages

    def open(self, root: str | Path, train: bool, download: bool = False) -> Examples:
        """Return all training or all test examples. Raises JobError if they are missing."""
        raise JobError(f"{type(self).__name__} has no open(root, train, download); it must return images and targets")

    def archives(self, root: str) -> Archives:
        """Return the files that `orch prepare --from` accepts; by default none."""
        return {}

    def fetch(self, how: Fetch) -> list[str]:
        root = self.context.settings.training_source_dir
        if how.stand_in or how.sha256 or not root:
            return super().fetch(how)
        return bring_archives(how.brought, self.archives(root))

    @cached_property
    def training_set(self) -> Examples:
        return self._examples(train=True)

    @cached_property
    def test_set(self) -> Examples:
        return self._examples(train=False)

    @cached_property
    def statistics(self) -> Statistics:
        """Mean and standard deviation of each channel over the training set, with pixels scaled to [0, 1]."""
        return images.channel_statistics(self.training_set[0])

    def _examples(self, train: bool) -> Examples:
        root = local_path(self.context.settings, "training_source_dir")
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
    """Return the indices of the examples to use; train_images or test_images sets their number (None: all)."""
    count, name = (limits.train_images, "train") if train else (limits.test_images, "test")
    return first_of_each_class(targets, count, f"job_params: {name}_images")


def first_of_each_class(targets: Tensor, count: int | None, setting: str) -> Tensor:
    """Return ascending indices (int64) of `count` examples (None: all): the first ones of each class; the numbers per
    class differ by at most one. targets: int64 (n,). Raises JobError, naming the setting, if count exceeds the number
    of examples or is below the number of classes."""
    if count is not None and count > len(targets):
        raise JobError(
            f"{setting}: {count} is more than the {len(targets)} available examples; use at most "
            f"{len(targets)}, or leave it out to use all"
        )
    if count is None or count == len(targets):
        return torch.arange(len(targets))
    classes = torch.unique(targets).tolist()
    if count < len(classes):
        raise JobError(f"{setting}: {count} is fewer than the {len(classes)} classes; use one per class or more")
    chosen = torch.zeros(len(targets), dtype=torch.bool)
    for number, label in enumerate(classes):
        wanted = count // len(classes) + (number < count % len(classes))
        chosen[torch.nonzero(targets == label)[:wanted, 0]] = True
    return chosen.nonzero()[:, 0]
