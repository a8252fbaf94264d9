"""Pictures of any size, decoded once (decode_cache); kept on the device if they fit, else read in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from jobs.data.augment import CenterCrop, Drawn, RandomCrop, Step, place
from jobs.data.decode_cache import Decoded
from jobs.data.feeds import Bounds, Epoch, Feed, OwnFeed, loader_processes, plan_loader, resident_bytes
from jobs.data.images import ImageFeed, ImageTensors, apply_steps, draw_epoch, draws, moved, one_example, steps_of
from jobs.errors import JobError


class DecodedImages(OwnFeed):
    """Decoded pictures with targets, and the steps that turn the pictures into model inputs.

    Pictures of equal size that fit into memory_bytes are kept on the device as ImageTensors. Otherwise loader processes
    read and crop them, and the later steps run on whole batches on the device. Both ways give the same batches.
    """

    def __init__(
        self, pictures: Decoded, targets: Sequence[int], steps: Sequence[Step] = (), memory_bytes: float | None = None
    ) -> None:
        """memory_bytes: None means `resident_bytes`. Raises JobError if the numbers of pictures and targets differ, or
        if the pictures have different sizes and the first step is not a RandomCrop or CenterCrop."""
        if len(pictures) != len(targets):
            raise JobError(f"DecodedImages: {len(pictures)} pictures and {len(targets)} targets")
        self.pictures = pictures
        self.targets = list(targets)
        self.steps = steps_of(steps)
        self._memory_bytes = memory_bytes
        if not pictures.equal and self.crop is None:
            raise JobError("pictures of different sizes: the first step must be RandomCrop or CenterCrop")

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one example as from a feed, augmented with torch's global random state."""
        image = torch.from_numpy(np.array(self.pictures[index])).permute(2, 0, 1)
        return one_example(image, self.steps), self.targets[index]

    @property
    def crop(self) -> RandomCrop | CenterCrop | None:
        """The first step, if it is a crop."""
        first = next(iter(self.steps), None)
        return first if isinstance(first, RandomCrop | CenterCrop) else None

    def feed(self, indices: Sequence[int], batch_size: int, device: torch.device, cores: int) -> Feed:
        allowed = resident_bytes(device) if self._memory_bytes is None else self._memory_bytes
        if self.pictures.equal and self.pictures.file is not None:
            height, width = self.pictures.shapes[0].tolist()
            if len(indices) * height * width * 3 <= allowed:
                pixels = torch.from_numpy(self.pictures.pixels.reshape(-1, height, width, 3)).permute(0, 3, 1, 2)
                images = ImageTensors(pixels, torch.tensor(self.targets), self.steps)
                return ImageFeed(images, indices, batch_size, device)
        return DecodedFeed(self, indices, batch_size, device, loader_processes(device, cores))


class DecodedFeed(Feed):
    """Persistent processes prefetch cropped batches into pinned memory; the other steps run on the device."""

    def __init__(
        self, data: DecodedImages, indices: Sequence[int], batch_size: int, device: torch.device, processes: int
    ) -> None:
        super().__init__(batch_size, len(indices))
        self._device = device
        height, width = data.pictures.shapes[0].tolist()
        self._crop = data.crop or CenterCrop((height, width))
        self._steps = data.steps if data.crop else [self._crop, *data.steps]
        self.augmented = draws(self._steps)
        chosen = np.asarray(indices, dtype=np.int64)
        self._shapes = torch.from_numpy(data.pictures.shapes[chosen])
        self._targets = torch.tensor(data.targets)[torch.from_numpy(chosen)].to(device)
        self._plan: list[Any] = []
        self._loader = plan_loader(_Windows(data.pictures, chosen, self._crop.size), self._plan, device, processes)

    def _fetch(self, order: Tensor, epoch: Epoch, batches: Sequence[Bounds]) -> Iterator[Any]:
        drawn = draw_epoch(self._steps, self.count, epoch)
        tops, lefts = self._places(drawn[0])
        steps, rows = self._steps[1:], moved(drawn[1:], self._device)
        chunks = [order[first:end] for _, first, end in batches]
        self._plan[:] = [(chosen.numpy(), tops[chosen].numpy(), lefts[chosen].numpy()) for chosen in chunks]
        for pixels, places in zip(self._loader, chunks, strict=False):  # the loader first, so that zip exhausts it
            chosen = places.to(self._device, non_blocking=True)
            images = pixels.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
            yield apply_steps(images, steps, rows, chosen), self._targets[chosen]

    def _places(self, drawn: Drawn) -> tuple[Tensor, Tensor]:
        """Return the first row and the first column of each crop window, (n,) int64."""
        height, width = self._crop.size
        room = self._shapes - torch.tensor(self._crop.size)
        if self.count and int(room.min()) < 0:
            smallest = self._shapes[int(room.amin(dim=1).argmin())].tolist()
            raise JobError(f"a crop of {height}x{width} pixels is larger than a picture, {smallest[0]}x{smallest[1]}")
        if isinstance(self._crop, RandomCrop):
            return place(drawn["y"], room[:, 0] + 1), place(drawn["x"], room[:, 1] + 1)
        middle = torch.round(room.double() / 2).long()  # rounds like torchvision's center_crop
        return middle[:, 0], middle[:, 1]


class _Windows(Dataset[Any]):
    """Returns batches of crop windows, (n, height, width, 3) uint8."""

    def __init__(self, pictures: Decoded, indices: NDArray[np.int64], size: tuple[int, int]) -> None:
        self._pictures, self._indices, self._size = pictures, indices, size

    def __getitem__(self, batch: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]) -> Tensor:
        height, width = self._size
        windows = np.empty((len(batch[0]), height, width, 3), np.uint8)
        for row, (position, top, left) in enumerate(zip(*batch, strict=True)):
            picture = self._pictures[self._indices[position]]
            windows[row] = picture[top : top + height, left : left + width]
        return torch.from_numpy(windows)
