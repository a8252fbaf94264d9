"""Batches of a data set, in an order that depends on nothing but a seed: not on the number of loader
processes, nor on where the epoch was interrupted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset, default_collate

from jobs.data.batches import map_tensors
from jobs.data.randomness import hash_seed, random_state_kept, seed_cpu
from jobs.errors import JobError


class Epoch(NamedTuple):
    """What an epoch's order and augmentation follow from."""

    seed: int
    number: int  # of the lineage: 0 is the founder's first


class Feed:
    """The examples `indices` of a data set, in batches, on a device."""

    augmented = False  # known to give an example in another form each time

    def __init__(self, batch_size: int, count: int) -> None:
        self.batch_size = batch_size
        self.count = count

    @property
    def batches(self) -> int:
        return -(-self.count // self.batch_size)

    def shuffled(self, seed: int, first_batch: int = 0, epoch: int = 0) -> Iterator[Any]:
        """One epoch in the order that the seed gives, from this batch on. epoch: how many the lineage had before."""
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(seed))
        return self._fetch(order, Epoch(seed, epoch), first_batch, 1)

    def in_order(self, first_batch: int = 0, every: int = 1) -> Iterator[Any]:
        """As they are listed, every so many batches from this one on."""
        return self._fetch(torch.arange(self.count), Epoch(0, 0), first_batch, every)

    def instead(self, other: Feed) -> Feed:
        """Another feed of the same examples, to be used in place of this one."""
        return other

    def _fetch(self, order: Tensor, epoch: Epoch, first_batch: int, every: int) -> Iterator[Any]:
        raise JobError(f"{type(self).__name__} does not say how to fetch a batch")


class TensorFeed(Feed):
    """A TensorDataset: it lives on the device as a whole, and a batch is an index."""

    def __init__(self, data: TensorDataset, indices: Sequence[int], batch_size: int, device: torch.device) -> None:
        super().__init__(batch_size, len(indices))
        chosen = torch.as_tensor(indices)
        self._tensors = [t[chosen].to(device) for t in data.tensors]
        self._device = device

    def _fetch(self, order: Tensor, epoch: Epoch, first_batch: int, every: int) -> Iterator[Any]:
        order = order.to(self._device)
        for start in range(first_batch * self.batch_size, self.count, every * self.batch_size):
            chosen = order[start : start + self.batch_size]
            yield tuple(t.index_select(0, chosen) for t in self._tensors)  # on a CPU 5 times as fast as t[chosen]


class LoaderFeed(Feed):
    """Any other data set: a DataLoader whose processes stay, with a seed of its own for each batch."""

    def __init__(
        self,
        data: Dataset[Any],
        indices: Sequence[int],
        batch_size: int,
        device: torch.device,
        processes: int,
    ) -> None:
        super().__init__(batch_size, len(indices))
        self._device = device
        self._plan = BatchPlan()
        self._loader = plan_loader(_SeededBatches(data, indices), self._plan, device, processes)

    def _fetch(self, order: Tensor, epoch: Epoch, first_batch: int, every: int) -> Iterator[Any]:
        chunks = torch.split(order, self.batch_size)
        chosen = range(first_batch, len(chunks), every)
        self._plan.batches = [(hash_seed(epoch.seed, i), chunks[i].tolist()) for i in chosen]
        for batch in self._loader:
            yield to_device(batch, self._device)


class BatchPlan(Sampler[Any]):
    """Which batches come next; the loader asks again at the start of each epoch."""

    def __init__(self) -> None:
        self.batches: list[Any] = []  # each what the data set takes as an index

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def plan_loader(batches: Dataset[Any], plan: BatchPlan, device: torch.device, processes: int) -> DataLoader[Any]:
    """Whole batches in the plan's order, some of them ahead; its processes stay."""
    return DataLoader(
        batches,
        batch_size=None,  # the plan names whole batches
        sampler=plan,
        num_workers=processes,
        persistent_workers=processes > 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else each epoch would draw from the global random state
    )


class _SeededBatches(Dataset[Any]):
    """A whole batch under a seed of its own, wherever it is fetched."""

    def __init__(self, data: Dataset[Any], indices: Sequence[int]) -> None:
        self._data = data
        self._indices = list(indices)

    def __getitem__(self, batch: tuple[int, list[int]]) -> Any:
        seed, positions = batch
        with random_state_kept():
            seed_cpu(seed)
            return default_collate([self._data[self._indices[p]] for p in positions])


class OwnFeed(Dataset[Any]):
    """A data set that knows better than a loader how its batches come to the device."""

    def feed(self, indices: Sequence[int], batch_size: int, device: torch.device, cores: int) -> Feed:
        raise JobError(f"{type(self).__name__} does not say how it is fed")


def make_feed(data: Dataset[Any], indices: Sequence[int], batch_size: int, device: torch.device, cores: int) -> Feed:
    if isinstance(data, OwnFeed):
        return data.feed(indices, batch_size, device, cores)
    if isinstance(data, TensorDataset):
        return TensorFeed(data, indices, batch_size, device)
    return LoaderFeed(data, indices, batch_size, device, loader_processes(device, cores))


def resident_bytes(device: torch.device) -> float:
    """How much of the device's memory a data set, or what is kept of it, may take: of a GPU's a quarter, else 2 GB."""
    return torch.cuda.get_device_properties(device).total_memory / 4 if device.type == "cuda" else 2e9


def loader_processes(device: torch.device, cores: int) -> int:
    """How many of a worker's cores fetch data; on a CPU the training itself wants the other half of them."""
    return cores // 2 if device.type == "cpu" else cores - 1


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor of a nested batch."""
    return map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))
