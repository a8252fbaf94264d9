"""DavidNet on CIFAR-10: D. Page's 9-layer residual network, 94 % in 24 epochs, with each of his bag of tricks.

"How to Train Your ResNet" (myrtle.ai, 2018-2019; code: github.com/davidcpage/cifar10-fast). What is here without any
trick is the network and recipe of post 4 and of the author's `dawn.py`; the tricks are post 8, "Bag of Tricks", where
each stands under its own heading, with what it brought.

Page sums the loss over a batch of 512 and divides the learning rate by 512; the loss here is the mean, so that his
learning rate of 0.4 is 0.4 here, and his weight decay of 5e-4 * 512, multiplied with 0.4 / 512, is 5e-4 here. His
momentum buffer holds steps, each with the learning rate of its time; torch's holds gradients, which all get that of
now: with a schedule this smooth the two are as good as one. He leaves out the incomplete batch at an epoch's end;
here it is trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from jobs import augment, davidnet_parts, images, optimizers
from jobs.davidnet_parts import PatchWhitening, Pool
from jobs.image_sets import Count, Examples, ImageSetJob, Limits
from jobs.job import Averaging, JobError, Split
from orchestrator.records import Profile

SIDE = 32  # pixels
PADDING = 4

Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Params(Limits):
    """Without any of them: the network and the augmentation of post 4. In quotes: the headings of post 8."""

    channels: tuple[Count, Count, Count, Count] = (64, 128, 256, 512)  # of prep, layer1, layer2, layer3
    classifier_scale: Positive = 0.125  # the logits are multiplied with it; 1/16 with batchnorm_scale 1
    flip: Literal["random", "alternating", "none"] = "random"
    cutout: Annotated[int, Field(ge=0, le=SIDE)] = 8  # pixels; 0: none
    preprocessing: Literal["device", "loader"] = "device"  # "Preprocessing on the GPU"; loader: one by one, on the CPU
    pool: Pool = "after_activation"  # "Moving max-pool layers": before_norm
    label_smoothing: Share = 0.0  # 0.2
    celu_alpha: Positive | None = None  # "CELU activations": 0.075, or 0.3 with batchnorm_scale 1; null: ReLU
    ghost_batch: Annotated[int, Field(ge=2)] | None = None  # "Ghost batch norm": 32 images
    batchnorm_scale: Positive | None = None  # "Frozen batch norm scales": 1 (or 0.25); null: learned
    bias_lr_factor: Positive = 1.0  # of batch norm's biases: 64 with batchnorm_scale 1 (16 undoes the change of scale)
    bias_weight_decay_factor: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0  # 1/64
    whitening: bool = False  # "Input patch whitening"
    ema_decay: Share | None = None  # "Exponential moving averages": 0.99 a step; null: none
    ema_every: Count = 5  # steps between two updates of the average
    test_flip: bool = False  # "Test-time augmentation": the mean over an image and its mirror image


class DavidNet(ImageSetJob):
    """training_source_dir is the root of torchvision's CIFAR10."""

    NAME = "CIFAR-10"
    Params = Params

    def open(self, root: str | Path, train: bool, download: bool = False) -> Examples:
        return images.cifar10(root, train, download)

    # --- data

    def data(self, split: Split) -> Dataset[Any]:
        """On the device as a whole (`ImageTensors`); or, as a loader's, each image on its own, by torchvision."""
        pixels, targets = self.test_set if split == "test" else self.training_set
        if self.params.preprocessing == "loader":
            return Pictures(pixels, targets, self._transforms(augmented=split == "train"))
        return images.ImageTensors(pixels, targets, self._steps(augmented=split == "train"))

    def _steps(self, augmented: bool) -> list[augment.Step]:
        """Page's: padded by reflection, cropped, flipped; what is cut out is as grey as the mean."""
        normalize = augment.Normalize(*self.statistics)
        if not augmented:
            return [normalize]
        flips = {"random": augment.Flip, "alternating": augment.AlternatingFlip}
        steps: list[augment.Step] = [augment.PadCrop(SIDE, PADDING, "reflect")]
        steps += [flips[self.params.flip]()] if self.params.flip in flips else []
        steps += [normalize]
        steps += [augment.Cutout(self.params.cutout)] if self.params.cutout else []
        return steps

    def _transforms(self, augmented: bool) -> Callable[[Any], Tensor]:
        """The same, for one image at a time."""
        from torchvision.transforms import v2

        if self.params.flip == "alternating":
            raise JobError('job_params: flip "alternating" needs preprocessing "device": a loader knows no epoch')
        share = (self.params.cutout / SIDE) ** 2
        crop = [v2.RandomCrop(SIDE, PADDING, padding_mode="reflect")]
        flip = [v2.RandomHorizontalFlip()] if self.params.flip == "random" else []
        cutout = [v2.RandomErasing(1.0, (share, share), (1.0, 1.0))] if share else []
        plain = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(*self.statistics)]
        transforms: Callable[[Any], Tensor] = v2.Compose([*crop, *flip, *plain, *cutout] if augmented else plain)
        return transforms

    # --- model

    def model(self) -> nn.Module:
        params = self.params
        net = davidnet_parts.network(
            params.channels,
            scale=params.classifier_scale,
            pool=params.pool,
            activation=nn.ReLU if params.celu_alpha is None else partial(nn.CELU, params.celu_alpha),
            norm=partial(
                davidnet_parts.batch_norm, ghost_batch=params.ghost_batch, frozen_scale=params.batchnorm_scale
            ),
            whitening=params.whitening,
        )
        for module in net.modules():
            if isinstance(module, PatchWhitening) and not module.weight.is_meta:  # meta: only its size is asked for
                module.set_filters(self._whitening)
        return net

    @cached_property
    def _whitening(self) -> Tensor:
        """Of the first training images, as the notebook does it; a checkpoint has its own."""
        some = self.training_set[0][: davidnet_parts.WHITENING_IMAGES]
        return davidnet_parts.whitening_filters(images.as_floats(augment.Normalize(*self.statistics).apply(some, {})))

    # --- training

    def optimizer(self, model: nn.Module, profile: Profile) -> torch.optim.Optimizer:
        """SGD with Nesterov's momentum, unless the profile names another; biases in a group of their own."""
        if profile.optimizer is None:
            nesterov = {"nesterov": profile.momentum > 0}
            profile = replace(profile, optimizer="SGD", optimizer_options=nesterov | dict(profile.optimizer_options))
        named = list(model.named_parameters())
        biases = {
            optimizers.LR_FACTOR: self.params.bias_lr_factor,
            optimizers.DECAY_FACTOR: self.params.bias_weight_decay_factor,
        }
        groups = [
            {"params": [value for name, value in named if not name.endswith("bias")]},
            {"params": [value for name, value in named if name.endswith("bias")], **biases},
        ]
        return optimizers.make(profile, groups)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets, label_smoothing=self.params.label_smoothing)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The loss without label smoothing, so that it can be compared."""
        return {
            "accuracy": (outputs.argmax(dim=1) == targets).float().mean(),
            "loss": functional.cross_entropy(outputs, targets),
        }

    def predict(self, model: nn.Module, inputs: Tensor) -> Tensor:
        outputs: Tensor = model(inputs)
        return (outputs + model(inputs.flip(3))) / 2 if self.params.test_flip else outputs

    def averaging(self) -> Averaging | None:
        """Page's decay is that of a step, and the average is updated every fifth."""
        if self.params.ema_decay is None:
            return None
        return Averaging(self.params.ema_decay**self.params.ema_every, self.params.ema_every)


class Pictures(Dataset[tuple[Tensor, int]]):
    """Images and targets in memory, transformed one by one as they are asked for."""

    def __init__(self, pixels: Tensor, targets: Tensor, transform: Callable[[Any], Tensor]) -> None:
        self.pixels, self.targets, self.transform = pixels, targets, transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from torchvision.tv_tensors import Image

        return self.transform(Image(self.pixels[index])).as_subclass(Tensor), int(self.targets[index])
