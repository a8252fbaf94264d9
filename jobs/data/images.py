"""Images that fit into the device's memory: they all lie there as uint8; a batch is an index and its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs.data.augment import AlternatingFlip, Drawn, Step
from jobs.data.feeds import Epoch, Feed, OwnFeed
from jobs.data.randomness import hash_seed
from jobs.errors import JobError

Examples = tuple[Tensor, Tensor]  # images, uint8 (n, channels, height, width); targets, int64 (n,)
Statistics = tuple[Sequence[float], Sequence[float]]  # mean and standard deviation of each channel

AT_ONCE = 1024  # images that a step copies at a time
DRAWS = 1  # tells the seed of an epoch's augmentation from other uses of the epoch's seed


class ImageTensors(OwnFeed):
    """Images of one size and a target for each, with the steps that make them the model's input."""

    def __init__(self, images: Tensor, targets: Tensor, steps: Sequence[Step] = ()) -> None:
        """images: uint8 (n, channels, height, width), any strides; targets: (n, ...), for classes int64 (n,).
        steps: from jobs.data.augment, in order; images that are uint8 after the last one become float32 in [0, 1].
        Raises JobError for other images, or for another number of targets."""
        if images.dtype != torch.uint8 or images.ndim != 4:
            given = f"{images.dtype} of shape {tuple(images.shape)}"
            raise JobError(f"ImageTensors: images are {given}; they must be torch.uint8 (n, channels, height, width)")
        if len(images) != len(targets):
            raise JobError(f"ImageTensors: {len(images)} images and {len(targets)} targets")
        self.images = images
        self.targets = targets
        self.steps = steps_of(steps)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One example as a feed would give it, drawn from torch's global random state. For data sets built on this one,
        such as a Subset; `feed` is many times faster."""
        return one_example(self.images[index], self.steps), self.targets[index]

    def feed(self, indices: Sequence[int], batch_size: int, device: torch.device, cores: int) -> Feed:
        return ImageFeed(self, indices, batch_size, device)


class ImageFeed(Feed):
    """A batch is gathered on the device and goes through the steps there: float32, channels_last. Leading steps that
    draw nothing (resizing, padding) are done once, to all images."""

    def __init__(self, data: ImageTensors, indices: Sequence[int], batch_size: int, device: torch.device) -> None:
        super().__init__(batch_size, len(indices))
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        once = list(takewhile(lambda step: step.once, data.steps))
        self._steps = data.steps[len(once) :]
        self.augmented = draws(self._steps)
        self._pixels = _prepared(data.images, chosen, once, device)
        self._targets = data.targets[chosen].to(device)
        self._device = device

    def _fetch(self, order: Tensor, epoch: Epoch, first_batch: int, every: int) -> Iterator[Any]:
        drawn = moved(draw_epoch(self._steps, self.count, epoch), self._device)
        for chosen in self._chunks(order.to(self._device), first_batch, every):
            images = self._pixels.index_select(0, chosen).permute(0, 3, 1, 2)
            yield apply_steps(images, self._steps, drawn, chosen), self._targets[chosen]


def steps_of(steps: Sequence[Step]) -> list[Step]:
    """Each in its parts."""
    return [part for step in steps for part in step.parts()]


def draws(steps: Sequence[Step]) -> bool:
    """Whether any of them does something else to an example each time."""
    return any(step.draw(1, torch.Generator()) for step in steps)


def draw_epoch(steps: Sequence[Step], count: int, epoch: Epoch) -> list[Drawn]:
    """All random numbers of an epoch, for each step, on the CPU; row i is for example i, wherever it comes."""
    generator = torch.Generator().manual_seed(hash_seed(epoch.seed, DRAWS))
    return [step.draw(count, generator, epoch.number) for step in steps]


def moved(drawn: Sequence[Drawn], device: torch.device) -> list[Drawn]:
    return [{name: values.to(device) for name, values in rows.items()} for rows in drawn]


def apply_steps(images: Tensor, steps: Sequence[Step], drawn: Sequence[Drawn], chosen: Tensor) -> Tensor:
    """The model's input. drawn: of the whole epoch, for each step; chosen: which rows of it belong to these images."""
    for step, rows in zip(steps, drawn, strict=True):
        images = step.apply(images, {name: values[chosen] for name, values in rows.items()})
    return as_floats(images)


def one_example(image: Tensor, steps: Sequence[Step]) -> Tensor:
    """uint8 (channels, height, width) as float32 after the steps, drawn from torch's global random state."""
    images = image[None].contiguous(memory_format=torch.channels_last)
    for step in steps:
        if isinstance(step, AlternatingFlip):
            raise JobError("AlternatingFlip needs the epoch's number, which a single example does not have; use Flip()")
        images = step.apply(images, step.draw(1, torch.default_generator))
    return as_floats(images)[0]


def as_floats(images: Tensor) -> Tensor:
    """float32 in channels_last; uint8 is scaled to [0, 1]."""
    if images.dtype == torch.uint8:
        images = images.mul(1 / 255)
    return images.contiguous(memory_format=torch.channels_last)


def _prepared(images: Tensor, chosen: Tensor, steps: Sequence[Step], device: torch.device) -> Tensor:
    """The chosen images after these steps, on the device: uint8 (n, height, width, channels), contiguous."""
    if not steps and torch.equal(chosen, torch.arange(len(images))):
        return images.to(device).permute(0, 2, 3, 1).contiguous()  # does not copy images that lie like this already

    def prepared(rows: Tensor) -> Tensor:
        some = images[rows.to(images.device)].to(device)
        for step in steps:
            some = step.apply(some, {})
        return some.permute(0, 2, 3, 1)

    whole = torch.empty(len(chosen), *prepared(chosen[:1]).shape[1:], dtype=torch.uint8, device=device)
    for target, rows in zip(torch.split(whole, AT_ONCE), torch.split(chosen, AT_ONCE), strict=True):
        target.copy_(prepared(rows))
    return whole


# --- statistics


def channel_statistics(images: Tensor) -> Statistics:
    """Mean and standard deviation of each channel, of values in [0, 1], from exact sums. images: uint8 (n,
    channels, height, width), of the training set only: the test set must not influence the model."""
    if images.dtype != torch.uint8 or images.ndim != 4 or not images.numel():
        given = f"{images.dtype} of shape {tuple(images.shape)}"
        raise JobError(f"channel statistics of {given}: it must be torch.uint8 (n, channels, height, width), n above 0")
    counts = torch.zeros(images.shape[1], 256, dtype=torch.float64)
    for some in torch.split(images, AT_ONCE):
        for channel, values in enumerate(some.unbind(dim=1)):
            counts[channel] += torch.bincount(values.flatten(), minlength=256).cpu()
    return statistics_of(counts)


def statistics_of(counts: Tensor) -> Statistics:
    """The same from how often each value occurs in each channel, (channels, 256)."""
    values = torch.arange(256, dtype=torch.float64) / 255
    share = counts / counts.sum(dim=1, keepdim=True)
    mean = share @ values
    variance = (share * (values - mean[:, None]) ** 2).sum(dim=1)
    if not (variance > 0).all():
        raise JobError("all pixels of a channel have the same value; nothing can be learned from it, leave it out")
    return tuple(mean.tolist()), tuple(variance.sqrt().tolist())


# --- torchvision's data sets as tensors


def cifar10(root: str | Path, train: bool, download: bool = False) -> Examples:
    """50,000 or 10,000 images (3, 32, 32). Raises JobError if they are not in the root and can't be fetched."""
    from torchvision.datasets import CIFAR10

    opened = open_set(CIFAR10, "CIFAR-10", root, train, download)
    return torch.from_numpy(opened.data).permute(0, 3, 1, 2), torch.tensor(opened.targets)


def mnist(root: str | Path, train: bool, download: bool = False) -> Examples:
    """60,000 or 10,000 images (1, 28, 28). Raises JobError if they are not in the root and can't be fetched."""
    from torchvision.datasets import MNIST

    opened = open_set(MNIST, "MNIST", root, train, download)
    return opened.data[:, None], opened.targets


def open_set(kind: Callable[..., Any], name: str, root: str | Path, train: bool, download: bool) -> Any:
    """kind(root, train=..., download=...), a class of torchvision's. Raises JobError, which names the data set."""
    try:
        return kind(str(root), train=train, download=download)
    except (RuntimeError, OSError) as error:  # RuntimeError: torchvision's for missing or damaged files
        if download:
            raise JobError(
                f"{name} can't be downloaded to training_source_dir {root}: {error}. Run `orch prepare SETTINGS` on a "
                "machine with internet and copy the folder"
            ) from error
        raise JobError(
            f"{name} is not in training_source_dir {root}, or is damaged there. Run `orch prepare SETTINGS` where "
            "there is internet, or name the folder that torchvision has downloaded it to"
        ) from error
