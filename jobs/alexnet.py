"""The report's job: torchvision's AlexNet (Krizhevsky 2014, "One weird trick") on folders of images.

Its three parts differ in which of the 13 feature layers and 7 classifier layers start from pretrained
weights and which are trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision import models
from torchvision.datasets import ImageFolder

from jobs.data import splits
from jobs.data.augment import CenterCrop, Flip, Normalize, RandomCrop, Step
from jobs.data.decode_cache import Decoded, decoded
from jobs.data.decoded import DecodedImages
from jobs.data.splits import Split
from jobs.errors import JobError
from jobs.job import Job, JobContext, local_path
from jobs.training.pretrained import IMAGENET, read_weights, weights_file
from orchestrator.messages import counted
from orchestrator.settings.fields import Strict

LAYERS = {"features": 13, "classifier": 7}


class Params(Strict):
    image_size: int = Field(default=224, ge=63)  # pixels; AlexNet's convolutions need 63
    augment: Literal["random", "none"] = "random"  # crops and flips of the training images
    memory_gb: float | None = Field(default=None, ge=0)  # for images on the device; see docs/data.md


class AlexNet(Job):
    """One class a folder, in training_source_dir and testing_source_dir."""

    Params = Params

    def __init__(self, context: JobContext) -> None:
        super().__init__(context)
        self.pretrained = {part: self._flags("pretrained", part) for part in LAYERS}
        self.trainable = {part: self._flags("trainable", part) for part in LAYERS}
        if not any(flag for flags in self.trainable.values() for flag in flags):
            raise JobError("trainable_features and trainable_classifier: nothing is trainable")
        self._decoded: dict[str, Decoded] = {}  # by folder

    @property
    def _wants_weights(self) -> bool:
        return any(flag for flags in self.pretrained.values() for flag in flags)

    def _flags(self, kind: str, part: str) -> list[bool]:
        key = f"{kind}_{part}"
        value = self.context.settings[key]
        flags = [value] * LAYERS[part] if isinstance(value, bool) else list(value)
        if len(flags) != LAYERS[part]:
            raise JobError(f"{key}: {len(flags)} flags; AlexNet's {part} have {LAYERS[part]} layers, a flag each")
        return flags

    # --- data

    def data(self, split: Split) -> DecodedImages:
        folder, size = self._listed(split), self.params.image_size
        random = split == "train" and self.params.augment == "random"
        steps: list[Step] = [RandomCrop(size), Flip()] if random else [CenterCrop(size)]
        steps.append(Normalize(*self._normalisation))
        memory_bytes = None if self.params.memory_gb is None else self.params.memory_gb * 1e9
        return DecodedImages(self._pictures(folder), folder.targets, steps, memory_bytes)

    @cached_property
    def _normalisation(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and standard deviation of each channel: those that the pretrained weights were trained with, else the
        training set's own."""
        if self._wants_weights:
            return IMAGENET
        return self._pictures(self._listed("train")).statistics()

    def _pictures(self, folder: ImageFolder) -> Decoded:
        if folder.root not in self._decoded:
            paths = [Path(path) for path, _ in folder.samples]
            margin = self.params.image_size * 8 // 7  # 256 for 224
            self._decoded[folder.root] = decoded(paths, margin, self.context.cores)
        return self._decoded[folder.root]

    def _listed(self, split: Split) -> ImageFolder:
        """Which files there are, of which classes. Raises JobError if a class has none."""
        try:
            return ImageFolder(str(self._folder(split)))
        except OSError as error:
            raise JobError(f"{self._folder(split)}: {error}") from error

    def _folder(self, split: Split) -> Path:
        key = "testing_source_dir" if split == "test" else "training_source_dir"
        return local_path(self.context.settings[key], key)

    # --- model

    def model(self) -> nn.Module:
        classes = sum(1 for path in self._folder("train").iterdir() if path.is_dir())
        net: nn.Module = models.alexnet(weights=None, num_classes=classes)
        if self._wants_weights:
            self._load_pretrained(net, self._pretrained_state())
        for part in LAYERS:
            for layer, trainable in zip(getattr(net, part), self.trainable[part], strict=True):
                layer.requires_grad_(trainable)
        return net

    def _load_pretrained(self, net: nn.Module, state: dict[str, Tensor]) -> None:
        for part in LAYERS:
            for index, wanted in enumerate(self.pretrained[part]):
                for name, value in getattr(net, part)[index].named_parameters() if wanted else ():
                    key = f"{part}.{index}.{name}"
                    if key not in state or state[key].shape != value.shape:
                        found = tuple(state[key].shape) if key in state else "none"
                        raise JobError(
                            f"pretrained_{part}[{index}]: the weights' {key} has shape {found}, this model's "
                            f"{tuple(value.shape)}; the last classifier layer can't be pretrained for other classes"
                        )
                    with torch.no_grad():
                        value.copy_(state[key])

    def _pretrained_state(self) -> dict[str, Tensor]:
        return read_weights(self._weights_file(download=False), "pretrained_weights")

    def _weights_file(self, download: bool) -> Path:
        """The file that pretrained_weights means. Raises JobError if it is not here."""
        wanted: str = self.context.settings["pretrained_weights"]
        return weights_file(wanted, models.AlexNet_Weights, "pretrained_weights", download)

    def frozen_part(self, model: nn.Module) -> nn.Module | None:
        """The features where none is trained and none is shown twice in different ways."""
        features = model.get_submodule("features")
        if self.params.augment != "none" or any(p.requires_grad for p in features.parameters()):
            return None
        return features

    # --- before anything is queued

    def prepare(self, download: bool) -> list[str]:
        train, test = self._classes("train"), self._classes("test")
        if train != test:
            only = sorted(set(train) ^ set(test))
            raise JobError(f"training_source_dir and testing_source_dir have different classes: {', '.join(only[:5])}")
        lines = [f"{counted(len(train), 'class', 'classes')} in {self._folder('train')}"]
        if self._wants_weights:
            lines.append(f"pretrained weights: {self._weights_file(download)}")
        self.model()
        if self.context.settings["select_on"] == "validation":
            splits.split(
                self._listed("train"), self.context.settings["validation_fraction"], self.context.settings["seed"]
            )
        return lines

    def _classes(self, split: Split) -> Sequence[str]:
        classes: Sequence[str] = self._listed(split).classes
        return classes
