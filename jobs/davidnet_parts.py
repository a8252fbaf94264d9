"""The parts of DavidNet, and what the bag of tricks changes in them.

The network is D. Page's, "How to Train Your ResNet" (myrtle.ai, 2018-2019; code and notebook: github.com/davidcpage/
cifar10-fast): post 4, "Architecture", and post 8, "Bag of Tricks".
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Pool = Literal["after_activation", "before_activation", "before_norm"]
PATCH = 3  # pixels: the side of a patch that is whitened, and of every other convolution
WHITENING_IMAGES = 10_000  # whose patches the covariance is taken of; the notebook's number
WHITENING_EPSILON = 0.01  # added to the eigenvalues: the smallest are noise, and would be blown up


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
    """DavidNet for images (n, 3, 32, 32), giving logits (n, classes).

    channels: of prep and of layer1 to layer3 (Page: 64, 128, 256, 512). scale: what the logits are multiplied with.
    pool: where in a layer its max-pool stands. activation and norm make these layers, norm from its channels.
    whitening: prep is a frozen `PatchWhitening`, zero until it is given its filters, and a 1x1 convolution.
    """

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
    """What comes in, plus what its layers make of it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, input: Tensor) -> Tensor:
        added: Tensor = self.layers(input)
        return input + added


class Classifier(nn.Linear):
    """Logits times a constant, in float32 under autocast too: rounded to bf16, the best two are often the same."""

    def __init__(self, width: int, classes: int, scale: float) -> None:
        super().__init__(width, classes, bias=False)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return functional.linear(input.to(self.weight.dtype), self.weight) * self.scale

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, scale={self.scale}"


def batch_norm(channels: int, ghost_batch: int | None = None, frozen_scale: float | None = None) -> nn.BatchNorm2d:
    """Batch norm over a whole batch or over ghost batches of so many images; with frozen_scale its weight is that
    constant, and only the bias is learned."""
    norm = nn.BatchNorm2d(channels) if ghost_batch is None else GhostBatchNorm(channels, ghost_batch)
    if frozen_scale is not None:
        nn.init.constant_(norm.weight, frozen_scale)
        norm.weight.requires_grad_(False)
    return norm


class GhostBatchNorm(nn.BatchNorm2d):
    """Batch norm with the statistics of parts of the batch, "ghost batches" (Hoffer et al. 2017, arXiv:1705.08741).

    A batch is cut into groups of ghost_batch images. What is left over joins the last group: no group is smaller,
    unless the batch is. The running statistics, used in evaluation, follow the mean over the groups. Parameters and
    buffers are those of nn.BatchNorm2d.
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
            head, head_mean, head_variance = self._in_groups(input[:border], groups - 1)
            tail, tail_mean, tail_variance = self._in_groups(input[border:], 1)
            output = torch.cat([head, tail])
            mean = torch.cat([head_mean, tail_mean])
            variance = torch.cat([head_variance, tail_variance])
        with torch.no_grad():
            self.running_mean.copy_(mean.mean(0))  # type: ignore[union-attr]
            self.running_var.copy_(variance.mean(0))  # type: ignore[union-attr]
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        return output

    def _in_groups(self, input: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised, with every groups-th image in one group; and each group's new running mean and variance
        (groups, channels).

        The groups stand in for channels: a contiguous (n, c, h, w) is seen as (n / groups, groups * c, h, w).
        """
        count, channels, height, width = input.shape
        last = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
        mean = self.running_mean.repeat(groups)  # type: ignore[union-attr]
        variance = self.running_var.repeat(groups)  # type: ignore[union-attr]
        output = functional.batch_norm(
            input.contiguous().view(count // groups, groups * channels, height, width),
            mean,
            variance,
            self.weight.repeat(groups),
            self.bias.repeat(groups),
            training=True,
            momentum=self.momentum,  # type: ignore[arg-type]  # it is only None where a user says so
            eps=self.eps,
        ).view(count, channels, height, width)
        if last:
            output = output.contiguous(memory_format=torch.channels_last)
        return output, mean.view(groups, channels), variance.view(groups, channels)

    def extra_repr(self) -> str:
        return f"{self.num_features}, ghost_batch={self.ghost_batch}"


class PatchWhitening(nn.Conv2d):
    """A frozen 3x3 convolution whose outputs are uncorrelated and of about the same scale over the training images.

    Its filters are the eigenvectors of the covariance of 3x3 patches, each divided by the root of its eigenvalue (post
    8, "Input patch whitening"). They are zero until `set_filters`; they are part of the state.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels * PATCH * PATCH, PATCH, padding=1, bias=False)
        nn.init.zeros_(self.weight)
        self.weight.requires_grad_(False)

    def set_filters(self, filters: Tensor) -> None:
        """filters: as `whitening_filters` returns them."""
        with torch.no_grad():
            self.weight.copy_(filters)


def whitening_filters(images: Tensor, epsilon: float = WHITENING_EPSILON) -> Tensor:
    """The filters (c*9, c, 3, 3) that whiten the 3x3 patches of these images, widest direction first; float32.

    images: (n, c, h, w), as the network is given them: normalised, not padded. On the patches filter i has the
    variance eigenvalue / (eigenvalue + epsilon). Its sign is such that its largest weight is positive.
    """
    size = images.shape[1] * PATCH * PATCH
    total = torch.zeros(size, dtype=torch.float64, device=images.device)
    products = torch.zeros(size, size, dtype=torch.float64, device=images.device)
    count = 0
    for some in torch.split(images, 100):  # patches take nine times the memory of the images
        patches = functional.unfold(some.float(), PATCH)  # (images, size, places)
        total += patches.sum((0, 2))
        products += (patches @ patches.mT).sum(0)
        count += patches.shape[0] * patches.shape[2]
    mean = total / count
    values, vectors = torch.linalg.eigh(products / count - torch.outer(mean, mean))  # ascending; vectors as columns
    values, vectors = values.flip(0).clamp(min=0), vectors.T.flip(0)
    vectors = vectors * vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()
    filters: Tensor = vectors / (values + epsilon).sqrt()[:, None]
    return filters.to(torch.float32).view(size, images.shape[1], PATCH, PATCH)
