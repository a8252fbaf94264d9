"""Shared by the jobs on picture files: decoding once per node, crops, normalisation, pretrained weights."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from jobs.data import splits
from jobs.data.augment import CenterCrop, Flip, Normalize, RandomCrop, Step
from jobs.data.decode_cache import Decoded, decoded, verify
from jobs.data.decoded import DecodedImages
from jobs.data.images import Statistics
from jobs.data.splits import Split
from jobs.errors import JobError
from jobs.job import Job
from jobs.training.pretrained import IMAGENET
from orchestrator.messages import counted
from orchestrator.settings.fields import Strict

CORES_AT_LAUNCH = 16  # at most, to check pictures: a login node is shared

Files = tuple[list[Path], list[int]]  # picture files, and the class of each picture


class PictureParams(Strict):
    image_size: Annotated[int, Field(ge=32)] = 224  # side of the square network input, in pixels
    augment: Literal["random", "none"] = "random"  # "random": crop and flip training images at random
    # Whose mean and deviation normalise the images. "auto": ImageNet's if weights are pretrained, else this data set's.
    normalization: Literal["auto", "imagenet", "training"] = "auto"
    memory_gb: Annotated[float, Field(ge=0)] | None = None  # device memory for images, in GB; see docs/data.md


class PictureJob(Job):
    """Subclasses define `files`, set `uses_pretrained`, and derive their Params from PictureParams."""

    uses_pretrained: bool  # must be set before `data` or `prepared` is called

    def files(self, train: bool) -> Files:
        """Return the training or the test pictures. Raises JobError if they are missing."""
        raise JobError(f"{type(self).__name__} has no files(train); it must return pictures and their classes")

    def weights_file(self, download: bool = False) -> Path:
        """Return the file of pretrained weights; with `download`, fetch it first. Raises JobError if it is missing."""
        raise JobError(f"{type(self).__name__} has no weights_file(download); it must return a path")

    def data(self, split: Split) -> DecodedImages:
        """Return pictures resized to a shorter side of 8/7 * image_size, then cropped to squares (random or center)."""
        pictures, targets = self._test if split == "test" else self._train
        size = self.params.image_size
        random = split == "train" and self.params.augment == "random"
        steps: list[Step] = [RandomCrop(size), Flip()] if random else [CenterCrop(size)]
        steps.append(Normalize(*(IMAGENET if self._like_imagenet else self.training_statistics)))
        memory_bytes = None if self.params.memory_gb is None else self.params.memory_gb * 1e9
        return DecodedImages(pictures, targets, steps, memory_bytes)

    @property
    def _like_imagenet(self) -> bool:
        wanted = self.params.normalization
        return self.uses_pretrained if wanted == "auto" else bool(wanted == "imagenet")

    @cached_property
    def training_statistics(self) -> Statistics:
        """Mean and standard deviation of each channel over the training set, with pixels scaled to [0, 1]."""
        return self._train[0].statistics()

    @cached_property
    def _train(self) -> tuple[Decoded, list[int]]:
        return self._decoded(train=True)

    @cached_property
    def _test(self) -> tuple[Decoded, list[int]]:
        return self._decoded(train=False)

    def _decoded(self, train: bool) -> tuple[Decoded, list[int]]:
        paths, targets = self.files(train)
        return decoded(paths, self._shorter_side, self.context.cores), targets

    @property
    def _shorter_side(self) -> int:
        return int(self.params.image_size) * 8 // 7  # 256 if image_size is 224

    def prepare(self, download: bool) -> list[str]:
        _, targets = self.files(train=True)
        counts = f"{counted(len(targets), 'training picture')} of {counted(len(set(targets)), 'class', 'classes')}"
        return [counts, *self.prepared(targets, download)]

    def prepared(self, targets: list[int], download: bool) -> list[str]:
        """Check weights, model, validation split and each picture. targets: for training. Returns messages. Raises
        JobError."""
        lines = [f"pretrained weights: {self.weights_file(download)}"] if self.uses_pretrained else []
        self.model()
        settings = self.context.settings
        if settings.select_on == "validation":
            splits.split_labels(targets, len(targets), settings.validation_fraction, settings.seed)
        return lines + self._verified()

    def _verified(self) -> list[str]:
        """Read each picture once, so that damaged files are known before anything is queued. Raises JobError."""
        lists, lines = [self.files(train=True)[0]], []
        try:
            lists.append(self.files(train=False)[0])
        except JobError as error:  # only `orch evaluate` needs them
            lines = [f"note: the test pictures are not checked: {error}"]
        verify(lists, self._shorter_side, max(self.context.cores, min(len(os.sched_getaffinity(0)), CORES_AT_LAUNCH)))
        return lines
