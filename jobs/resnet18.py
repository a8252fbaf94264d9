"""ResNet-18 (He et al. 2016, arXiv:1512.03385; torchvision's) on the Oxford-IIIT Pet data set, 37 breeds of cats and
dogs (Parkhi et al. 2012). From scratch or from pretrained weights; all layers are trained, or the last one alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.utils.data import Dataset
from torchvision import models
from torchvision.models.resnet import BasicBlock, ResNet

from jobs.data import splits
from jobs.data.augment import CenterCrop, Flip, Normalize, RandomCrop, Step
from jobs.data.decode_cache import Decoded, decoded
from jobs.data.decoded import DecodedImages
from jobs.data.images import open_set
from jobs.data.splits import Split
from jobs.errors import JobError
from jobs.image_sets import Limits, limited
from jobs.job import Job, JobContext, local_path
from jobs.training.pretrained import IMAGENET, read_weights, weights_file

BREEDS = 37
SETTING = "job_params: pretrained"


class Params(Limits):
    image_size: Annotated[int, Field(ge=32)] = 224  # pixels, of a square; the network halves it five times
    pretrained: Literal[False] | str = False  # a name of torchvision's, or a file
    train: Literal["all", "head"] = "all"
    augment: Literal["random", "none"] = "random"  # crops and flips of the training images
    memory_gb: Annotated[float, Field(ge=0)] | None = None  # for images on the device; see docs/data.md


class ResNet18(Job):
    """training_source_dir is the root of torchvision's OxfordIIITPet: its trainval split is trained on, its test
    split is the test set."""

    Params = Params

    def __init__(self, context: JobContext) -> None:
        super().__init__(context)
        if self.params.train == "head" and self.params.pretrained is False:
            raise JobError(
                'job_params: train "head" needs pretrained weights, for all other layers stay as they are; '
                'name some in pretrained, or train "all"'
            )

    # --- data

    def data(self, split: Split) -> DecodedImages:
        """Pictures with a shorter side of 8/7 of image_size, of which a square is cropped; by chance in training."""
        pictures, targets = self._test if split == "test" else self._train
        size = self.params.image_size
        random = split == "train" and self.params.augment == "random"
        steps: list[Step] = [RandomCrop(size), Flip()] if random else [CenterCrop(size)]
        steps.append(Normalize(*self._normalisation))
        memory_bytes = None if self.params.memory_gb is None else self.params.memory_gb * 1e9
        return DecodedImages(pictures, targets, steps, memory_bytes)

    @property
    def _normalisation(self) -> tuple[Sequence[float], Sequence[float]]:
        """What the pretrained weights were trained with, else that of the training set."""
        return self.training_statistics if self.params.pretrained is False else IMAGENET

    @property
    def training_statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and standard deviation of each channel over the training set, of values in [0, 1]."""
        return self._train[0].statistics()

    @cached_property
    def _train(self) -> tuple[Decoded, list[int]]:
        return self._decoded(train=True)

    @cached_property
    def _test(self) -> tuple[Decoded, list[int]]:
        return self._decoded(train=False)

    def _decoded(self, train: bool) -> tuple[Decoded, list[int]]:
        paths, targets = self._listed(train)
        return decoded(paths, self.params.image_size * 8 // 7, self.context.cores), targets

    def _listed(self, train: bool, download: bool = False) -> tuple[list[Path], list[int]]:
        """Files and classes of one side, or of the part of it that is used."""
        root = self.context.settings["training_source_dir"]
        if not (download and root):
            root = local_path(root, "training_source_dir")
        found = open_set(_pets, "Oxford-IIIT Pet", root, train, download)
        chosen = limited(torch.tensor(found._labels), self.params, train).tolist()
        return [Path(found._images[i]) for i in chosen], [found._labels[i] for i in chosen]

    # --- model

    def model(self) -> nn.Module:
        kind = _HeadAlone if self.params.train == "head" else ResNet
        net = kind(BasicBlock, [2, 2, 2, 2], num_classes=BREEDS)
        if self.params.pretrained is not False:
            self._load(net)
        if self.params.train == "head":
            net.requires_grad_(False)
            net.fc.requires_grad_(True)
        return net

    def _load(self, net: nn.Module) -> None:
        """All layers; of the last one only if it is for as many classes. Raises JobError if another is not there."""
        own = net.state_dict()
        state = dict(read_weights(self._weights_file(download=False), SETTING))
        if "fc.weight" in state and state["fc.weight"].shape != own["fc.weight"].shape:
            state |= {name: own[name] for name in ("fc.weight", "fc.bias")}
        wrong = [name for name in own if name not in state or state[name].shape != own[name].shape]
        if wrong or len(state) != len(own):
            named = ", ".join([*wrong, *sorted(state.keys() - own.keys())][:3])
            raise JobError(f"{SETTING}: {self.params.pretrained} holds no weights of a ResNet-18: {named} do not fit")
        net.load_state_dict(state)

    def _weights_file(self, download: bool) -> Path:
        wanted = Path(self.params.pretrained).expanduser()
        if wanted.is_file() and not wanted.is_absolute():
            raise JobError(f"{SETTING}: {wanted} must be an absolute path, such as {wanted.absolute()}")
        return weights_file(self.params.pretrained, models.ResNet18_Weights, SETTING, download)

    def frozen_part(self, model: nn.Module) -> nn.Module | None:
        """All but the last layer where that alone is trained, and no image is shown in different ways."""
        if self.params.train != "head" or self.params.augment != "none":
            return None
        return nn.Sequential(*(child for name, child in model.named_children() if name != "fc"))

    # --- before anything is queued

    def prepare(self, download: bool) -> list[str]:
        sides = {name: self._listed(name == "training", download) for name in ("training", "test")}
        counts = " and ".join(f"{len(targets)} {name}" for name, (_, targets) in sides.items())
        lines = [f"Oxford-IIIT Pet, {counts} images, in {self.context.settings['training_source_dir']}"]
        if self.params.pretrained is not False:
            lines.append(f"pretrained weights: {self._weights_file(download)}")
        self.model()
        if self.context.settings["select_on"] == "validation":
            fraction, seed = self.context.settings["validation_fraction"], self.context.settings["seed"]
            splits.split(_Labels(sides["training"][1]), fraction, seed)
        return lines


class _HeadAlone(ResNet):  # type: ignore[misc]  # torchvision has no types
    """Its frozen layers' batch norm keeps its statistics: they are in eval mode in training too."""

    def train(self, mode: bool = True) -> _HeadAlone:
        super().train(mode)
        for name, child in self.named_children():
            if name != "fc":
                child.train(False)
        return self


class _Labels(Dataset[Any]):
    """What can be split without a look at the pictures."""

    def __init__(self, targets: list[int]) -> None:
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)


def _pets(root: str, train: bool, download: bool) -> Any:
    from torchvision.datasets import OxfordIIITPet

    return OxfordIIITPet(root, split="trainval" if train else "test", download=download)
