"""The report's job: torchvision's AlexNet (Krizhevsky 2014, "One weird trick") on folders of images.

Its three parts differ in which of the 13 feature layers and 7 classifier layers start from pretrained
weights and which are trained.
"""

from __future__ import annotations

import pickle
import urllib.error
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torchvision import models
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from jobs import data
from jobs.job import Job, JobContext, JobError, Split, local_path
from orchestrator.settings import Strict

LAYERS = {"features": 13, "classifier": 7}
# Of ImageNet's training set, as torchvision's pretrained weights expect their input.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Params(Strict):
    image_size: int = Field(default=224, ge=63)  # pixels; AlexNet's convolutions need 63


class AlexNet(Job):
    """One class a folder, in training_source_dir and testing_source_dir."""

    Params = Params

    def __init__(self, context: JobContext) -> None:
        super().__init__(context)
        self.pretrained = {part: self._flags("pretrained", part) for part in LAYERS}
        self.trainable = {part: self._flags("trainable", part) for part in LAYERS}
        if not any(flag for flags in self.trainable.values() for flag in flags):
            raise JobError("trainable_features and trainable_classifier: nothing is trainable")

    def _flags(self, kind: str, part: str) -> list[bool]:
        key = f"{kind}_{part}"
        value = self.context.settings[key]
        flags = [value] * LAYERS[part] if isinstance(value, bool) else list(value)
        if len(flags) != LAYERS[part]:
            raise JobError(f"{key}: {len(flags)} flags; AlexNet's {part} have {LAYERS[part]} layers, a flag each")
        return flags

    # --- data

    def data(self, split: Split) -> ImageFolder:
        size, margin = self.params.image_size, self.params.image_size * 8 // 7  # 256 for 224
        steps: list[Any] = [v2.Resize(margin)]
        steps += [v2.RandomCrop(size), v2.RandomHorizontalFlip()] if split == "train" else [v2.CenterCrop(size)]
        steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        return ImageFolder(str(self._folder(split)), v2.Compose(steps))

    def _folder(self, split: Split) -> Path:
        key = "testing_source_dir" if split == "test" else "training_source_dir"
        return local_path(self.context.settings[key], key)

    # --- model

    def model(self) -> nn.Module:
        classes = sum(1 for path in self._folder("train").iterdir() if path.is_dir())
        net: nn.Module = models.alexnet(weights=None, num_classes=classes)
        if any(flag for flags in self.pretrained.values() for flag in flags):
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
        file = self._weights_file(download=False)
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            reason = str(error).partition("\n")[0]
            raise JobError(f"pretrained_weights: {file} can't be read: {reason}; fetch it again") from error
        if not isinstance(state, dict):
            raise JobError(f"pretrained_weights: {self.context.settings['pretrained_weights']} holds no weights")
        return state

    def _weights_file(self, download: bool) -> Path:
        """The file that pretrained_weights means. Raises JobError if it is not here."""
        wanted: str = self.context.settings["pretrained_weights"]
        if Path(wanted).expanduser().is_file():
            return Path(wanted).expanduser()
        if wanted not in models.AlexNet_Weights.__members__:
            known = ", ".join(models.AlexNet_Weights.__members__)
            raise JobError(f"pretrained_weights: {wanted!r} is neither a file nor one of torchvision's: {known}")
        url = models.AlexNet_Weights[wanted].url
        cached: Path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
        if not cached.is_file() and download:
            try:
                torch.hub.load_state_dict_from_url(url, progress=False, check_hash=True, weights_only=True)
            except (OSError, urllib.error.URLError, RuntimeError) as error:
                raise JobError(
                    f"pretrained_weights: {wanted} can't be downloaded: {error}. On a machine with internet, run "
                    f"`orch prepare` and copy {cached.name} to {cached.parent}, or name a file in pretrained_weights"
                ) from error
        if not cached.is_file():
            raise JobError(
                f"pretrained_weights: {wanted} is not on this machine ({cached}). Run `orch prepare SETTINGS` where "
                "there is internet, or name a file in pretrained_weights"
            )
        return cached

    # --- before anything is queued

    def prepare(self, download: bool) -> list[str]:
        train, test = self._classes("train"), self._classes("test")
        if train != test:
            only = sorted(set(train) ^ set(test))
            raise JobError(f"training_source_dir and testing_source_dir have different classes: {', '.join(only[:5])}")
        lines = [f"{len(train)} classes in {self._folder('train')}"]
        if any(flag for flags in self.pretrained.values() for flag in flags):
            lines.append(f"pretrained weights: {self._weights_file(download)}")
        self.model()
        if self.context.settings["select_on"] == "validation":
            data.split(self.data("train"), self.context.settings["validation_fraction"], self.context.settings["seed"])
        return lines

    def _classes(self, split: Split) -> Sequence[str]:
        try:
            classes: Sequence[str] = ImageFolder(str(self._folder(split))).classes
            return classes
        except (FileNotFoundError, OSError) as error:
            raise JobError(f"{self._folder(split)}: {error}") from error
