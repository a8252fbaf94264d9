"""Batches of a data set in an order that depends only on a seed, not on loader processes or interruptions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from jobs.data.batches import map_tensors
from jobs.data.randomness import hash_seed, random_state_kept, seed_cpu
from jobs.errors import JobError
from orchestrator.messages import described


class Epoch(NamedTuple):
    """Determines the order and the augmentation of an epoch."""

    seed: int
    number: int  # position in the lineage; 0 is the founder's first epoch


class Bounds(NamedTuple):
    """One batch: its number in the epoch, and where its examples are in the epoch's order."""

    number: int
    first: int
    end: int


LastBatch = Literal["keep", "merge", "drop"]


def bounds_of(count: int, batch_size: int, last: LastBatch) -> list[Bounds]:
    """Cut an epoch of `count` examples into batches. last: what becomes of a smaller last batch: it is kept; or, if it
    has a single example, it is merged into the one before; or it is dropped. An epoch of one batch keeps it."""
    ends = list(range(batch_size, count, batch_size)) + ([count] if count else [])
    rest = count - ends[-2] if len(ends) > 1 else batch_size
    if rest < batch_size and (last == "drop" or (last == "merge" and rest == 1)):
        ends.pop()
        if last == "merge":
            ends[-1] = count
    return [Bounds(number, first, end) for number, (first, end) in enumerate(pairwise([0, *ends]))]


class Feed:
    """Provides selected examples of a data set in batches on a device."""

    augmented = False  # True: random augmentation makes an example differ from epoch to epoch
    # For training, the session sets how to treat a smaller last batch. Batch norm can't train on a single example.
    last_batch: LastBatch = "keep"

    def __init__(self, batch_size: int, count: int) -> None:
        self.batch_size = batch_size
        self.count = count  # number of examples

    @property
    def batches(self) -> int:
        """Number of batches of a training epoch."""
        return len(self._bounds(self.last_batch))

    def shuffled(self, seed: int, first_batch: int = 0, epoch: int = 0) -> Iterator[Any]:
        """Yield an epoch's batches from first_batch on, in the seed's order. epoch: number in the lineage, from 0."""
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(seed))
        return self._fetch(order, Epoch(seed, epoch), self._bounds(self.last_batch)[first_batch:])

    def in_order(self, first_batch: int = 0, every: int = 1) -> Iterator[Any]:
        """Yield batches of all examples in the data set's order: every `every`-th batch from first_batch on."""
        return self._fetch(torch.arange(self.count), Epoch(0, 0), self._bounds("keep")[first_batch::every])

    def instead(self, other: Feed) -> Feed:
        """Called before `other`, a feed of the same examples, replaces this feed. Returns the feed to use."""
        return other

    def like(self, other: Feed) -> None:
        """Cut batches as another feed does."""
        self.batch_size, self.last_batch = other.batch_size, other.last_batch

    def _fetch(self, order: Tensor, epoch: Epoch, batches: Sequence[Bounds]) -> Iterator[Any]:
        """Yield these batches of the examples in this order."""
        raise JobError(f"{type(self).__name__} has no _fetch(order, epoch, batches)")

    def _bounds(self, last: LastBatch) -> list[Bounds]:
        return bounds_of(self.count, self.batch_size, last)


class TensorFeed(Feed):
    """Feed for a TensorDataset, which is kept on the device; a batch is selected by index."""

    def __init__(self, data: TensorDataset, indices: Sequence[int], batch_size: int, device: torch.device) -> None:
        super().__init__(batch_size, len(indices))
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        self._tensors = [t[chosen].to(device) for t in data.tensors]
        self._device = device

    def _fetch(self, order: Tensor, epoch: Epoch, batches: Sequence[Bounds]) -> Iterator[Any]:
        order = order.to(self._device)
        for _, first, end in batches:  # index_select is 5 times as fast on a CPU as indexing
            yield tuple(t.index_select(0, order[first:end]) for t in self._tensors)


Collate = Callable[[list[Any]], Any]


class LoaderFeed(Feed):
    """Feed for any other data set: a DataLoader with persistent processes that seeds each batch separately."""

    def __init__(
        self,
        data: Dataset[Any],
        indices: Sequence[int],
        batch_size: int,
        device: torch.device,
        processes: int,
        collate: Collate = default_collate,
    ) -> None:
        super().__init__(batch_size, len(indices))
        self._device = device
        self._plan: list[Any] = []
        self._loader = plan_loader(_SeededBatches(data, indices, collate), self._plan, device, processes)

    def _fetch(self, order: Tensor, epoch: Epoch, batches: Sequence[Bounds]) -> Iterator[Any]:
        self._plan[:] = [(hash_seed(epoch.seed, number), order[first:end].tolist()) for number, first, end in batches]
        for batch in self._loader:
            yield on_device(batch, self._device)


def on_device(batch: Any, device: torch.device) -> Any:
    return map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))


def plan_loader(batches: Dataset[Any], plan: list[Any], device: torch.device, processes: int) -> DataLoader[Any]:
    """Return a loader that prefetches whole batches in the plan's order, with persistent processes. plan: one index of
    the data set per batch; the loader rereads the plan at each epoch."""
    return _PlanLoader(
        _Reported(batches),
        batch_size=None,  # each index in the plan is a whole batch
        sampler=plan,
        num_workers=processes,
        persistent_workers=processes > 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # the default would draw from the global random state
    )


class _PlanLoader(DataLoader[Any]):
    """Starts new processes if one has died, so that an epoch after that failure works again."""

    def __iter__(self) -> Any:
        if any(not process.is_alive() for process in getattr(self._iterator, "_workers", ())):
            self._iterator = None
        return super().__iter__()


class _Reported(Dataset[Any]):
    """Raises errors such as SystemExit as a JobError: a loader process would end, and their text would be lost."""

    def __init__(self, batches: Dataset[Any]) -> None:
        self._batches = batches

    def __getitem__(self, batch: Any) -> Any:
        try:
            return self._batches[batch]
        except Exception:
            raise
        except BaseException as error:
            raise JobError(described(error)) from error


class _SeededBatches(Dataset[Any]):
    """Reads each batch under its own seed, so that the result does not depend on the process."""

    def __init__(self, data: Dataset[Any], indices: Sequence[int], collate: Collate) -> None:
        self._data = data
        self._indices = list(indices)
        self._collate = collate

    def __getitem__(self, batch: tuple[int, list[int]]) -> Any:
        seed, positions = batch
        with random_state_kept():
            seed_cpu(seed)
            return self._collate([self._data[self._indices[p]] for p in positions])


class OwnFeed(Dataset[Any]):
    """A data set that provides its own feed, faster than a loader."""

    def feed(self, indices: Sequence[int], batch_size: int, device: torch.device, cores: int) -> Feed:
        raise JobError(f"{type(self).__name__} has no feed(indices, batch_size, device, cores)")


def make_feed(
    data: Any,
    indices: Sequence[int],
    batch_size: int,
    device: torch.device,
    cores: int,
    collate: Collate | None = None,
) -> Feed:
    """Return the feed of a data set. indices: the examples to use. collate: the job's own; None: torch's
    default_collate. With a collate of its own, a data set is always read by a loader."""
    if isinstance(data, OwnFeed) and collate is None:
        return data.feed(indices, batch_size, device, cores)
    if isinstance(data, TensorDataset) and collate is None:
        return TensorFeed(data, indices, batch_size, device)
    return LoaderFeed(data, indices, batch_size, device, loader_processes(device, cores), collate or default_collate)


def resident_bytes(device: torch.device) -> float:
    """Return how many bytes a data set or its cached features may use: a quarter of a GPU's memory; 2 GB on a CPU."""
    return torch.cuda.get_device_properties(device).total_memory / 4 if device.type == "cuda" else 2e9


def loader_processes(device: torch.device, cores: int) -> int:
    """Return the number of loader processes; when training on a CPU, half of the cores are left for the training."""
    return cores // 2 if device.type == "cpu" else cores - 1
