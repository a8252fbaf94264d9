"""torchvision's ResNet-18 (He et al. 2016, arXiv:1512.03385) on the Oxford-IIIT Pet data set, 37 breeds of cats and
dogs (Parkhi et al. 2012). The job starts from random or pretrained weights and trains all layers or only the last.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, ResNet

from jobs.data.download import Fetch, Source
from jobs.data.images import Archives, bring_archives, open_set
from jobs.errors import JobError
from jobs.image_sets import Limits, limited
from jobs.job import JobContext, local_path
from jobs.pictures import Files, PictureJob, PictureParams
from jobs.training.pretrained import bring_weights, read_weights, weights_file, weights_source

BREEDS = 37
SETTING = "job_params: pretrained"


class Params(Limits, PictureParams):
    pretrained: Literal[False] | str = False  # the name of torchvision weights, or a file
    train: Literal["all", "head"] = "all"


class ResNet18(PictureJob):
    """training_source_dir is the root of torchvision's OxfordIIITPet. The job trains on its trainval split."""

    Params = Params

    def __init__(self, context: JobContext) -> None:
        super().__init__(context)
        self.uses_pretrained = self.params.pretrained is not False
        if self.params.train == "head" and not self.uses_pretrained:
            raise JobError(
                'job_params: train "head" needs pretrained weights, because all other layers stay as they are; '
                'set "pretrained", or set train to "all"'
            )

    def files(self, train: bool, download: bool = False) -> Files:
        """Return the files and classes, limited by train_images or test_images."""
        root: Any = self.context.settings.training_source_dir
        if not (download and root):
            root = local_path(self.context.settings, "training_source_dir")
        command, archives = self.context.settings.prepare_command, _archives(root)
        pets = open_set(_pets, "Oxford-IIIT Pet", root, train, download, command, archives)
        chosen = limited(torch.tensor(pets._labels), self.params, train).tolist()
        return [Path(pets._images[i]) for i in chosen], [pets._labels[i] for i in chosen]

    def model(self) -> nn.Module:
        kind = _FrozenBody if self.params.train == "head" else ResNet
        net = kind(BasicBlock, [2, 2, 2, 2], num_classes=BREEDS)
        if self.uses_pretrained:
            self._load(net)
        if self.params.train == "head":
            net.requires_grad_(False)
            net.fc.requires_grad_(True)
        return net

    def _load(self, net: nn.Module) -> None:
        """Load the pretrained weights, but not a last layer of another shape. Any other mismatch raises JobError."""
        own = net.state_dict()
        state = dict(read_weights(self.weights_file(), SETTING, self.context.settings.prepare_command))
        if "fc.weight" in state and state["fc.weight"].shape != own["fc.weight"].shape:
            state |= {name: own[name] for name in ("fc.weight", "fc.bias")}
        wrong = [name for name in own if name not in state or state[name].shape != own[name].shape]
        if wrong or len(state) != len(own):
            named = ", ".join([*wrong, *sorted(state.keys() - own.keys())][:3])
            raise JobError(
                f"{SETTING}: {self.params.pretrained} does not contain ResNet-18 weights: mismatch in {named}"
            )
        net.load_state_dict(state)

    def weights_file(self, download: bool = False) -> Path:
        file = Path(self.params.pretrained).expanduser()
        if file.is_file() and not file.is_absolute():
            raise JobError(f"{SETTING}: {file} must be an absolute path, such as {file.absolute()}")
        command = self.context.settings.prepare_command
        return weights_file(
            self.params.pretrained, models.ResNet18_Weights, SETTING, command=command, download=download
        )

    def frozen_part(self, model: nn.Module) -> nn.Module | None:
        """Return all layers but the last if only the last one is trained and images are not augmented."""
        if self.params.train != "head" or self.params.augment != "none":
            return None
        return nn.Sequential(*(child for name, child in model.named_children() if name != "fc"))

    def fetch(self, how: Fetch) -> list[str]:
        root = self.context.settings.training_source_dir
        if how.stand_in or how.sha256 or not root:
            return super().fetch(how)
        pretrained, brought = self.params.pretrained, list(how.brought)
        if pretrained is not False:
            source = weights_source(pretrained, models.ResNet18_Weights, SETTING)
            for file in how.brought:
                if isinstance(source, Source) and file.name == source.file.name:
                    bring_weights(file, source, how.say)
                    brought.remove(file)
        return bring_archives(brought, _archives(root))

    def prepare(self, download: bool) -> list[str]:
        (_, train), (_, test) = self.files(True, download), self.files(False, download)
        root = self.context.settings.training_source_dir
        counts = f"{len(train)} training and {len(test)} test images"
        return [f"Oxford-IIIT Pet, {counts}, in {root}", *self.prepared(train, download)]


class _FrozenBody(ResNet):  # type: ignore[misc]  # torchvision has no types
    """A ResNet that keeps all layers but the last in eval mode, so that batch norm does not update its statistics."""

    def train(self, mode: bool = True) -> _FrozenBody:
        super().train(mode)
        for name, child in self.named_children():
            if name != "fc":
                child.train(False)
        return self


def _archives(root: str) -> Archives:
    from torchvision.datasets import OxfordIIITPet

    resources = {url.rpartition("/")[2]: md5 for url, md5 in OxfordIIITPet._RESOURCES}
    return {name: (Path(root, "oxford-iiit-pet", name), md5) for name, md5 in resources.items()}


def _pets(root: str, train: bool, download: bool) -> Any:
    from torchvision.datasets import OxfordIIITPet

    return OxfordIIITPet(root, split="trainval" if train else "test", download=download)
