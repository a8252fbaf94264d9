"""The original report's job: torchvision's AlexNet (Krizhevsky 2014, "One weird trick") on folders of images. The
report's three parts differ in which of the 13 feature and 7 classifier layers are pretrained and which are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision import models
from torchvision.datasets import ImageFolder

from jobs.errors import JobError
from jobs.job import JobContext, local_path
from jobs.pictures import Files, PictureJob, PictureParams
from jobs.training.pretrained import read_weights, weights_file
from orchestrator.messages import counted

LAYERS = {"features": 13, "classifier": 7}


class Params(PictureParams):
    image_size: Annotated[int, Field(ge=63)] = 224  # pixels; AlexNet's convolutions need at least 63


class AlexNet(PictureJob):
    """training_source_dir and testing_source_dir each contain one folder per class."""

    Params = Params

    def __init__(self, context: JobContext) -> None:
        super().__init__(context)
        self.pretrained = {part: self._flags("pretrained", part) for part in LAYERS}
        self.trainable = {part: self._flags("trainable", part) for part in LAYERS}
        if not any(any(flags) for flags in self.trainable.values()):
            raise JobError("trainable_features and trainable_classifier: nothing is trainable")
        self.uses_pretrained = any(any(flags) for flags in self.pretrained.values())

    def _flags(self, kind: str, part: str) -> list[bool]:
        key = f"{kind}_{part}"
        value: bool | list[bool] = getattr(self.context.settings, key)
        flags = [value] * LAYERS[part] if isinstance(value, bool) else value
        if len(flags) != LAYERS[part]:
            raise JobError(f"{key}: {len(flags)} flags; AlexNet's {part} part needs {LAYERS[part]}, one per layer")
        return flags

    def files(self, train: bool) -> Files:
        folder = self._listed(train)
        return [Path(path) for path, _ in folder.samples], folder.targets

    def _listed(self, train: bool) -> ImageFolder:
        """List the files and their classes. Raises JobError if a class has no file."""
        folder = self._folder(train)
        try:
            return ImageFolder(str(folder))
        except OSError as error:
            raise JobError(f"{folder}: {error}") from error

    def _folder(self, train: bool) -> Path:
        setting = "training_source_dir" if train else "testing_source_dir"
        return local_path(getattr(self.context.settings, setting), setting)

    def model(self) -> nn.Module:
        classes = sum(1 for path in self._folder(train=True).iterdir() if path.is_dir())
        net: nn.Module = models.alexnet(weights=None, num_classes=classes)
        if self.uses_pretrained:
            self._load_pretrained(net, read_weights(self.weights_file(), "pretrained_weights"))
        for part in LAYERS:
            for layer, trainable in zip(net.get_submodule(part).children(), self.trainable[part], strict=True):
                layer.requires_grad_(trainable)
        return net

    def _load_pretrained(self, net: nn.Module, state: dict[str, Tensor]) -> None:
        for part in LAYERS:
            for index, wanted in enumerate(self.pretrained[part]):
                layer = f"{part}.{index}"
                for name, value in net.get_submodule(layer).named_parameters() if wanted else ():
                    key = f"{layer}.{name}"
                    if key not in state or state[key].shape != value.shape:
                        shape = tuple(state[key].shape) if key in state else "none"
                        raise JobError(
                            f"pretrained_{part}[{index}]: {key} has shape {shape} in the weights file, "
                            f"{tuple(value.shape)} here; for other classes the last layer can't be pretrained"
                        )
                    with torch.no_grad():
                        value.copy_(state[key])

    def weights_file(self, download: bool = False) -> Path:
        wanted = self.context.settings.pretrained_weights
        return weights_file(wanted, models.AlexNet_Weights, "pretrained_weights", download)

    def frozen_part(self, model: nn.Module) -> nn.Module | None:
        """Return the feature layers if none of them is trained and images are not augmented."""
        features = model.get_submodule("features")
        if self.params.augment != "none" or any(p.requires_grad for p in features.parameters()):
            return None
        return features

    def prepare(self, download: bool) -> list[str]:
        train, test = self._listed(train=True), self._listed(train=False)
        if train.classes != test.classes:
            only = sorted(set(train.classes) ^ set(test.classes))
            raise JobError(f"training_source_dir and testing_source_dir have different classes: {', '.join(only[:5])}")
        classes = counted(len(train.classes), "class", "classes")
        return [f"{classes} in {train.root}", *self.prepared(train.targets, download)]
