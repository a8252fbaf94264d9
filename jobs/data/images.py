"""Images that fit into device memory, stored there as uint8. Each batch is gathered by index, then augmented."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs.data.augment import AlternatingFlip, Drawn, Step
from jobs.data.download import copy_into_place
from jobs.data.feeds import Bounds, Epoch, Feed, OwnFeed
from jobs.data.randomness import hash_seed
from jobs.errors import JobError

Examples = tuple[Tensor, Tensor]  # images, uint8 (n, channels, height, width); targets, int64 (n,)
Statistics = tuple[Sequence[float], Sequence[float]]  # mean and standard deviation of each channel

AT_ONCE = 1024  # number of images processed at a time when preparing the whole data set
DRAWS = 1  # hashed with an epoch's seed, so that augmentation does not reuse the seed of the order


class ImageTensors(OwnFeed):
    """Images of one size with targets, and the steps that turn the images into model inputs."""

    def __init__(self, images: Tensor, targets: Tensor, steps: Sequence[Step] = ()) -> None:
        """images: uint8 (n, channels, height, width), any strides. targets: (n, ...); int64 (n,) for classes.
        steps: from jobs.data.augment, in order. If images are still uint8 after the last step, they are scaled to
        float32 in [0, 1]. Raises JobError for a wrong dtype or shape, or if images and targets differ in number."""
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
        """Return one example as from a feed, augmented with torch's global random state. Meant for wrappers such as
        Subset; `feed` is many times faster."""
        return one_example(self.images[index], self.steps), self.targets[index]

    def feed(self, indices: Sequence[int], batch_size: int, device: torch.device, cores: int) -> Feed:
        return ImageFeed(self, indices, batch_size, device)


class ImageFeed(Feed):
    """Gathers batches on the device and applies the steps there: float32, channels_last. Leading steps without
    randomness (resizing, padding) are applied once to all images."""

    def __init__(self, data: ImageTensors, indices: Sequence[int], batch_size: int, device: torch.device) -> None:
        super().__init__(batch_size, len(indices))
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        once = list(takewhile(lambda step: step.once, data.steps))
        self._steps = data.steps[len(once) :]
        self.augmented = draws(self._steps)
        self._pixels = _prepared(data.images, chosen, once, device)
        self._targets = data.targets[chosen].to(device)
        self._device = device

    def _fetch(self, order: Tensor, epoch: Epoch, batches: Sequence[Bounds]) -> Iterator[Any]:
        drawn = moved(draw_epoch(self._steps, self.count, epoch), self._device)
        order = order.to(self._device)
        for _, first, end in batches:
            chosen = order[first:end]
            images = self._pixels.index_select(0, chosen).permute(0, 3, 1, 2)
            yield apply_steps(images, self._steps, drawn, chosen), self._targets[chosen]


def steps_of(steps: Sequence[Step]) -> list[Step]:
    """Expand each step into its parts."""
    return [part for step in steps for part in step.parts()]


def draws(steps: Sequence[Step]) -> bool:
    """Return whether any step is random."""
    return any(step.draw(1, torch.Generator()) for step in steps)


def draw_epoch(steps: Sequence[Step], count: int, epoch: Epoch) -> list[Drawn]:
    """Draw an epoch's random numbers on the CPU, one set per step; row i is for the example with index i."""
    generator = torch.Generator().manual_seed(hash_seed(epoch.seed, DRAWS))
    return [step.draw(count, generator, epoch.number) for step in steps]


def moved(drawn: Sequence[Drawn], device: torch.device) -> list[Drawn]:
    return [{name: values.to(device) for name, values in rows.items()} for rows in drawn]


def apply_steps(images: Tensor, steps: Sequence[Step], drawn: Sequence[Drawn], chosen: Tensor) -> Tensor:
    """Return the model's input. drawn: from draw_epoch; chosen: the rows of drawn for these images."""
    for step, rows in zip(steps, drawn, strict=True):
        images = step.apply(images, {name: values[chosen] for name, values in rows.items()})
    return as_floats(images)


def one_example(image: Tensor, steps: Sequence[Step]) -> Tensor:
    """Apply the steps with torch's global random state: uint8 (channels, height, width) to float32."""
    images = image[None].contiguous(memory_format=torch.channels_last)
    for step in steps:
        if isinstance(step, AlternatingFlip):
            raise JobError("AlternatingFlip needs the epoch's number, which a single example does not have; use Flip()")
        images = step.apply(images, step.draw(1, torch.default_generator))
    return as_floats(images)[0]


def as_floats(images: Tensor) -> Tensor:
    """Return images as float32 in channels_last; uint8 is scaled to [0, 1]."""
    if images.dtype == torch.uint8:
        images = images.mul(1 / 255)
    return images.contiguous(memory_format=torch.channels_last)


def _prepared(images: Tensor, chosen: Tensor, steps: Sequence[Step], device: torch.device) -> Tensor:
    """Return the selected images on the device, `steps` applied: uint8 (n, height, width, channels), contiguous."""
    if not steps and torch.equal(chosen, torch.arange(len(images))):
        return images.to(device).permute(0, 2, 3, 1).contiguous()  # no copy if the layout is already right

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
    """Return mean and standard deviation of each channel, for pixels scaled to [0, 1], from exact sums. images: uint8
    (n, channels, height, width), from the training set only: the test set must not influence the model."""
    if images.dtype != torch.uint8 or images.ndim != 4 or not images.numel():
        given = f"{images.dtype} of shape {tuple(images.shape)}"
        raise JobError(f"channel statistics of {given}: it must be torch.uint8 (n, channels, height, width), n above 0")
    counts = torch.zeros(images.shape[1], 256, dtype=torch.float64)
    for some in torch.split(images, AT_ONCE):
        for channel, values in enumerate(some.unbind(dim=1)):
            counts[channel] += torch.bincount(values.flatten(), minlength=256).cpu()
    return statistics_of(counts)


def statistics_of(counts: Tensor) -> Statistics:
    """Like `channel_statistics`, from counts (channels, 256): how often each pixel value occurs in each channel."""
    values = torch.arange(256, dtype=torch.float64) / 255
    share = counts / counts.sum(dim=1, keepdim=True)
    mean = share @ values
    variance = (share * (values - mean[:, None]) ** 2).sum(dim=1)
    if not (variance > 0).all():
        raise JobError("all pixels of a channel have the same value; remove the channel, which carries no information")
    return tuple(mean.tolist()), tuple(variance.sqrt().tolist())


# --- torchvision's data sets as tensors


PREPARE = "orch prepare SETTINGS"  # how the command is named in errors if the settings file is unknown
Archives = Mapping[str, tuple[Path, str]]  # by file name: where torchvision expects the file, and its MD5


def cifar10(root: str | Path, train: bool, download: bool = False, command: str = PREPARE) -> Examples:
    """Return 50,000 training or 10,000 test images (3, 32, 32). Raises JobError if missing or not downloadable."""
    from torchvision.datasets import CIFAR10

    opened = open_set(CIFAR10, "CIFAR-10", root, train, download, command, cifar10_archives(root))
    return torch.from_numpy(opened.data).permute(0, 3, 1, 2), torch.tensor(opened.targets)


def mnist(root: str | Path, train: bool, download: bool = False, command: str = PREPARE) -> Examples:
    """Return 60,000 training or 10,000 test images (1, 28, 28). Raises JobError if missing or not downloadable."""
    from torchvision.datasets import MNIST

    opened = open_set(MNIST, "MNIST", root, train, download, command, mnist_archives(root))
    return opened.data[:, None], opened.targets


def cifar10_archives(root: str | Path) -> Archives:
    from torchvision.datasets import CIFAR10

    return {CIFAR10.filename: (Path(root, CIFAR10.filename), CIFAR10.tgz_md5)}


def mnist_archives(root: str | Path) -> Archives:
    from torchvision.datasets import MNIST

    return {name: (Path(root, "MNIST", "raw", name), md5) for name, md5 in MNIST.resources}


def bring_archives(files: Sequence[Path], archives: Archives) -> list[str]:
    """Copy files that the user has carried here to where torchvision expects them. Returns messages. Raises JobError if
    a file has another name, is damaged, or can't be copied."""
    from torchvision.datasets.utils import check_integrity

    for file in files:
        if file.name not in archives:
            raise JobError(f"--from {file}: expected a file named {' or '.join(archives)}")
        target, md5 = archives[file.name]
        if not check_integrity(file, md5):
            raise JobError(f"--from {file}: it is incomplete or damaged: its MD5 is not {md5}. Copy it again")
        copy_into_place(file, target)
    return [f"copied {file}" for file in files]


def open_set(
    kind: Callable[..., Any],
    name: str,
    root: str | Path,
    train: bool,
    download: bool,
    command: str = PREPARE,
    archives: Archives | None = None,
) -> Any:
    """Open the torchvision data set of class `kind`. command: the `orch prepare` command, for errors. archives: the
    files that torchvision downloads. Raises JobError if the data set can't be opened or downloaded."""
    if download:
        with suppress(RuntimeError, OSError):
            return kind(str(root), train=train, download=False)
        _refuse_other_files(archives or {})
    try:
        return kind(str(root), train=train, download=download)
    except (RuntimeError, OSError) as error:  # torchvision raises RuntimeError for missing or damaged files
        if download:
            raise JobError(
                f"{name} can't be downloaded to training_source_dir {root}: {error}. Run `{command}` on a machine with "
                f"internet and copy the folder, or download the archives there and run `{command} --from FILE` here"
            ) from error
        raise JobError(
            f"{name} is not in training_source_dir {root}, or is damaged there. Run `{command}` where there is "
            "internet, or set training_source_dir to the folder that holds it"
        ) from error


def _refuse_other_files(archives: Archives) -> None:
    """Raise JobError if torchvision would replace a file: it downloads an archive again if its checksum is wrong."""
    from torchvision.datasets.utils import check_integrity

    for path, md5 in archives.values():
        if path.exists() and not check_integrity(path, md5):
            raise JobError(
                f"{path} is another file than the data set's archive, or is incomplete or damaged: its MD5 is not "
                f"{md5}. Delete it or move it away, and run the command again"
            )
