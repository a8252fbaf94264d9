"""DavidNet on CIFAR-10: D. Page's 9-layer residual network, 94 % in 24 epochs. The tricks of post 8 are options.

Source: "How to Train Your ResNet" (myrtle.ai, 2018-2019; code: github.com/davidcpage/cifar10-fast). Without tricks this
is the network and recipe of post 4 and of Page's `dawn.py`. Post 8 is "Bag of Tricks".

Page sums the loss over a batch of 512 and divides the learning rate by 512. This job averages the loss instead, so the
equivalent learning rate is 0.4 and the equivalent weight decay 5e-4 (Page's 5e-4 * 512, divided by 512). Page
multiplies each gradient by the learning rate before adding it to the momentum buffer; torch adds the gradient and
multiplies the whole buffer by the current rate. For a smooth schedule, the updates are nearly equal. Page drops the
incomplete last batch of an epoch; this job trains on it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from jobs.data import augment, images
from jobs.data.images import Examples
from jobs.data.splits import Split
from jobs.errors import JobError
from jobs.image_sets import Count, ImageSetJob, Limits
from jobs.job import Averaging
from jobs.optim import optimizers
from orchestrator.profile import Profile

Pool = Literal["after_activation", "before_activation", "before_norm"]
PATCH = 3  # side of the whitened patches and of every other convolution kernel, in pixels
WHITENING_IMAGES = 10_000  # number of images that the patch covariance is estimated from, as in Page's notebook
WHITENING_EPSILON = 0.01  # added to the eigenvalues, so that noise (the smallest eigenvalues) is not amplified
SIDE = 32  # pixels
PADDING = 4

Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Params(Limits):
    """The defaults are the network and augmentation of post 4. The comments quote the headings of post 8."""

    channels: tuple[Count, Count, Count, Count] = (64, 128, 256, 512)  # of prep, layer1, layer2 and layer3
    classifier_scale: Positive = 0.125  # factor applied to the logits; use 1/16 with batchnorm_scale 1
    flip: Literal["random", "alternating", "none"] = "random"
    cutout: Annotated[int, Field(ge=0, le=SIDE)] = 8  # pixels; 0: none
    preprocessing: Literal["device", "loader"] = "device"  # "Preprocessing on the GPU"; loader: on the CPU
    pool: Pool = "after_activation"  # "Moving max-pool layers": before_norm
    label_smoothing: Share = 0.0  # "Label smoothing": 0.2
    celu_alpha: Positive | None = None  # "CELU activations": 0.075, or 0.3 with batchnorm_scale 1; null: ReLU
    ghost_batch: Annotated[int, Field(ge=2)] | None = None  # "Ghost batch norm": 32 images
    batchnorm_scale: Positive | None = None  # "Frozen batch norm scales": 1 (or 0.25); null: learned
    bias_lr_factor: Positive = 1.0  # for batch norm biases; Page: 64 with batchnorm_scale 1 (equal to 4 with 0.25)
    bias_weight_decay_factor: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0  # same biases; Page: 1/64
    whitening: bool = False  # "Input patch whitening"
    ema_decay: Share | None = None  # "Exponential moving averages": 0.99 per step; null: none
    ema_every: Count = 5  # number of steps between updates of the average
    test_flip: bool = False  # "Test-time augmentation": average the logits of an image and its mirror image


class DavidNet(ImageSetJob):
    """training_source_dir is the root of torchvision's CIFAR10."""

    NAME = "CIFAR-10"
    Params = Params

    def open(self, root: str | Path, train: bool, download: bool = False) -> Examples:
        return images.cifar10(root, train, download, self.context.settings.prepare_command)

    def archives(self, root: str) -> images.Archives:
        return images.cifar10_archives(root)

    def data(self, split: Split) -> Dataset[Any]:
        """Return an `ImageTensors`; for preprocessing "loader", a data set that uses torchvision's transforms."""
        pixels, targets = self.test_set if split == "test" else self.training_set
        if self.params.preprocessing == "loader":
            return Pictures(pixels, targets, self._transforms(augmented=split == "train"))
        return images.ImageTensors(pixels, targets, self._steps(augmented=split == "train"))

    def _steps(self, augmented: bool) -> list[augment.Step]:
        """Return Page's steps: pad by reflection, crop, flip, normalize, cut out a square in the mean colour."""
        normalize = augment.Normalize(*self.statistics)
        if not augmented:
            return [normalize]
        flips: dict[str, list[augment.Step]] = {"random": [augment.Flip()], "alternating": [augment.AlternatingFlip()]}
        cutout = [augment.Cutout(self.params.cutout)] if self.params.cutout else []
        return [augment.PadCrop(SIDE, PADDING, "reflect"), *flips.get(self.params.flip, []), normalize, *cutout]

    def _transforms(self, augmented: bool) -> Callable[[Any], Tensor]:
        """Return equivalent torchvision transforms for single images."""
        from torchvision.transforms import v2

        if self.params.flip == "alternating":
            raise JobError('job_params: flip "alternating" needs preprocessing "device"; loaders lack the epoch')
        share = (self.params.cutout / SIDE) ** 2
        crop = [v2.RandomCrop(SIDE, PADDING, padding_mode="reflect")]
        flip = [v2.RandomHorizontalFlip()] if self.params.flip == "random" else []
        cutout = [v2.RandomErasing(1.0, (share, share), (1.0, 1.0))] if share else []
        plain = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(*self.statistics)]
        transforms: Callable[[Any], Tensor] = v2.Compose([*crop, *flip, *plain, *cutout] if augmented else plain)
        return transforms

    def model(self) -> nn.Module:
        params = self.params
        net = network(
            params.channels,
            scale=params.classifier_scale,
            pool=params.pool,
            activation=nn.ReLU if params.celu_alpha is None else partial(nn.CELU, params.celu_alpha),
            norm=partial(batch_norm, ghost_batch=params.ghost_batch, frozen_scale=params.batchnorm_scale),
            whitening=params.whitening,
        )
        for module in net.modules():
            if isinstance(module, PatchWhitening) and not module.weight.is_meta:  # a "meta" model has only shapes
                module.set_filters(self._whitening)
        return net

    @cached_property
    def _whitening(self) -> Tensor:
        """Filters that whiten the first training images, as in Page's notebook. A loaded checkpoint replaces them."""
        first = self.training_set[0][:WHITENING_IMAGES]
        return whitening_filters(images.as_floats(augment.Normalize(*self.statistics).apply(first, {})))

    def optimizer(self, model: nn.Module, profile: Profile) -> torch.optim.Optimizer:
        """Return the profile's optimizer (default: SGD with Nesterov momentum); biases form a group of their own."""
        if profile.optimizer is None:
            nesterov = {"nesterov": profile.momentum > 0}
            profile = replace(profile, optimizer="SGD", optimizer_options=nesterov | dict(profile.optimizer_options))
        weights = [value for name, value in model.named_parameters() if not name.endswith("bias")]
        biases = [value for name, value in model.named_parameters() if name.endswith("bias")]
        bias_group = {
            "params": biases,
            optimizers.LR_FACTOR: self.params.bias_lr_factor,
            optimizers.DECAY_FACTOR: self.params.bias_weight_decay_factor,
        }
        return optimizers.make(profile, [{"params": weights}, bias_group])

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets, label_smoothing=self.params.label_smoothing)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return accuracy and loss; the loss ignores label smoothing, so that runs can be compared."""
        return super().metrics(outputs, targets) | {"loss": functional.cross_entropy(outputs, targets)}

    def predict(self, model: nn.Module, inputs: Tensor) -> Tensor:
        outputs: Tensor = model(inputs)
        return (outputs + model(inputs.flip(3))) / 2 if self.params.test_flip else outputs

    def averaging(self) -> Averaging | None:
        """Convert ema_decay, a decay per step, to a decay per update of the average. Return None if it is not set."""
        if self.params.ema_decay is None:
            return None
        return Averaging(self.params.ema_decay**self.params.ema_every, self.params.ema_every)


class Pictures(Dataset[tuple[Tensor, int]]):
    """Images and targets in memory; each image is transformed when it is read."""

    def __init__(self, pixels: Tensor, targets: Tensor, transform: Callable[[Any], Tensor]) -> None:
        self.pixels, self.targets, self.transform = pixels, targets, transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from torchvision.tv_tensors import Image

        return self.transform(Image(self.pixels[index])).as_subclass(Tensor), int(self.targets[index])


# --- the network


def network(
    channels: Sequence[int],
    *,
    scale: float = 0.125,
    pool: Pool = "after_activation",
    activation: Callable[[], nn.Module] = nn.ReLU,
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    whitening: bool = False,
    classes: int = 10,
) -> nn.Sequential:
    """Return DavidNet, which maps images (n, 3, 32, 32) to logits (n, classes). channels: widths of prep and layer1 to
    layer3 (Page: 64, 128, 256, 512). scale: factor applied to the logits. pool: position of max-pool in a layer.
    activation: factory for activation layers. norm: factory for norm layers, called with the number of channels.
    whitening: replace prep's convolution with a frozen `PatchWhitening` (all zeros until its filters are set) followed
    by a 1x1 convolution."""

    def block(before: int, after: int, pooled: bool = False) -> OrderedDict[str, nn.Module]:
        layers: list[tuple[str, nn.Module]] = [
            ("conv", nn.Conv2d(before, after, PATCH, padding=1, bias=False)),
            ("norm", norm(after)),
            ("act", activation()),
        ]
        if pooled:
            place = {"before_norm": 1, "before_activation": 2, "after_activation": 3}[pool]
            layers.insert(place, ("pool", nn.MaxPool2d(2)))
        return OrderedDict(layers)

    def residual(width: int) -> Residual:
        return Residual(nn.Sequential(block(width, width)), nn.Sequential(block(width, width)))

    first, second, third, fourth = channels
    prep = block(3, first)
    if whitening:
        one_by_one = nn.Conv2d(3 * PATCH * PATCH, first, 1, bias=False)
        prep = OrderedDict([("whitening", PatchWhitening(3)), *(prep | {"conv": one_by_one}).items()])
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            prep=nn.Sequential(prep),
            layer1=nn.Sequential(block(first, second, pooled=True) | {"residual": residual(second)}),
            layer2=nn.Sequential(block(second, third, pooled=True)),
            layer3=nn.Sequential(block(third, fourth, pooled=True) | {"residual": residual(fourth)}),
            pool=nn.MaxPool2d(4),
            flatten=nn.Flatten(),
            classifier=Classifier(fourth, classes, scale),
        )
    )


class Residual(nn.Module):
    """Adds the output of its layers to the input."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, input: Tensor) -> Tensor:
        added: Tensor = self.layers(input)
        return input + added


class Classifier(nn.Linear):
    """A linear layer with scaled logits, in float32 even under autocast: in bf16 the top two logits would often tie."""

    def __init__(self, width: int, classes: int, scale: float) -> None:
        super().__init__(width, classes, bias=False)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return functional.linear(input.to(self.weight.dtype), self.weight) * self.scale

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, scale={self.scale}"


def batch_norm(channels: int, ghost_batch: int | None = None, frozen_scale: float | None = None) -> nn.BatchNorm2d:
    """Return batch norm. ghost_batch: images per ghost batch. frozen_scale: constant to fix the weights to."""
    norm = nn.BatchNorm2d(channels) if ghost_batch is None else GhostBatchNorm(channels, ghost_batch)
    if frozen_scale is not None:
        nn.init.constant_(norm.weight, frozen_scale)
        norm.weight.requires_grad_(False)
    return norm


class GhostBatchNorm(nn.BatchNorm2d):
    """Batch norm with separate statistics for parts of a batch, "ghost batches" (Hoffer et al. 2017, arXiv:1705.08741).

    A batch is divided into groups of ghost_batch images; the remainder joins the last group. The running statistics,
    used in evaluation, track the mean over the groups. Parameters and buffers are the same as in nn.BatchNorm2d.
    """

    def __init__(self, channels: int, ghost_batch: int) -> None:
        super().__init__(channels)
        self.ghost_batch = ghost_batch

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        groups = max(1, len(input) // self.ghost_batch)
        if len(input) % groups == 0:
            output, mean, variance = self._in_groups(input, groups)
        else:
            border = (groups - 1) * self.ghost_batch
            head, tail = self._in_groups(input[:border], groups - 1), self._in_groups(input[border:], 1)
            output, mean, variance = (torch.cat(both) for both in zip(head, tail, strict=True))
        with torch.no_grad():
            self.running_mean.copy_(mean.mean(0))  # type: ignore[union-attr]  # None only without running statistics
            self.running_var.copy_(variance.mean(0))  # type: ignore[union-attr]
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        return output

    def _in_groups(self, input: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the normalised images, and each group's new running mean and variance (groups, channels). Image i
        belongs to group i % groups, because a contiguous (n, c, h, w) is viewed as (n / groups, groups * c, h, w)."""
        count, channels, height, width = input.shape
        layout = torch.contiguous_format if input.is_contiguous() else torch.channels_last
        mean = self.running_mean.repeat(groups)  # type: ignore[union-attr]  # as above
        variance = self.running_var.repeat(groups)  # type: ignore[union-attr]
        output = functional.batch_norm(
            input.contiguous().view(count // groups, groups * channels, height, width),
            mean,
            variance,
            self.weight.repeat(groups),
            self.bias.repeat(groups),
            training=True,
            momentum=self.momentum,  # type: ignore[arg-type]  # None only if set explicitly
            eps=self.eps,
        ).view(count, channels, height, width)
        output = output.contiguous(memory_format=layout)
        return output, mean.view(groups, channels), variance.view(groups, channels)


class PatchWhitening(nn.Conv2d):
    """A frozen 3x3 convolution whose outputs over the training images are uncorrelated and have about equal variance.

    The filters are the eigenvectors of the covariance of 3x3 patches, each divided by the square root of its eigenvalue
    (post 8, "Input patch whitening"; `whitening_filters`). They are zero until `set_filters` sets them. Checkpoints
    contain them.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels * PATCH * PATCH, PATCH, padding=1, bias=False)
        nn.init.zeros_(self.weight)
        self.weight.requires_grad_(False)

    def set_filters(self, filters: Tensor) -> None:
        with torch.no_grad():
            self.weight.copy_(filters)


def whitening_filters(images: Tensor, epsilon: float = WHITENING_EPSILON) -> Tensor:
    """Return the filters (c*9, c, 3, 3), float32, that whiten the 3x3 patches of these images, largest variance first.

    images: (n, c, h, w), normalised, not padded. Over the patches, the output of a filter has variance
    eigenvalue / (eigenvalue + epsilon). In each filter, the weight with the largest magnitude is positive.
    """
    size = images.shape[1] * PATCH * PATCH
    total = torch.zeros(size, dtype=torch.float64, device=images.device)
    products = torch.zeros(size, size, dtype=torch.float64, device=images.device)
    count = 0
    for part in torch.split(images, 100):  # 100 at a time: patches take nine times the memory of the images
        patches = functional.unfold(part.float(), PATCH)  # (images, size, places)
        total += patches.sum((0, 2))
        products += (patches @ patches.mT).sum(0)
        count += patches.shape[0] * patches.shape[2]
    mean = total / count
    values, vectors = torch.linalg.eigh(products / count - torch.outer(mean, mean))  # ascending; vectors in columns
    values, vectors = values.flip(0).clamp(min=0), vectors.T.flip(0)
    vectors = vectors * vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()
    filters: Tensor = vectors / (values + epsilon).sqrt()[:, None]
    return filters.to(torch.float32).view(size, images.shape[1], PATCH, PATCH)
