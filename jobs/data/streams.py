"""Data that can only be read from the beginning: torch's IterableDataset, and loaders that make their own batches.

The order is the data's own, and must depend only on the global random generators, which are seeded for each epoch.
Resuming an epoch reads it again up to the batch where it was interrupted, without training; a method `seek(number)` of
the data, called before `iter()`, avoids this: iterating must then begin with the example (or the loader's batch) that
has this number, from 0. A method `set_epoch(epoch)` is called before each epoch, with its number in the lineage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate

from jobs.data import feeds
from jobs.data.feeds import Bounds, Collate, Epoch, Feed, on_device
from jobs.data.randomness import cpu_state, hash_seed, random_state_kept, seed_cpu, set_cpu_state
from jobs.errors import JobError


def is_stream(data: Any) -> bool:
    """Return whether the data can't be read by index."""
    return isinstance(data, IterableDataset) or not hasattr(data, "__getitem__")


def stream_feed(
    data: Any, batch_size: int, device: torch.device, processes: int, collate: Collate | None = None
) -> Feed:
    if isinstance(data, IterableDataset):
        return ExampleStreamFeed(data, batch_size, device, processes, collate or default_collate)
    return BatchStreamFeed(data, device)


class Reader:
    """Iterates over data, one epoch after the other, with random numbers of its own."""

    def __init__(self, data: Any) -> None:
        self._data = data
        self._iterator: Iterator[Any] = iter(())
        self._state: Any = None
        self._at: tuple[Epoch, int] | None = None  # the epoch, and the number of the next item

    def read(self, epoch: Epoch, first: int, count: int) -> list[Any]:
        """Return `count` items from number `first` of the epoch on; fewer if the data end before."""
        with random_state_kept():
            if self._at == (epoch, first):
                set_cpu_state(self._state)
            else:
                self._start(epoch, first)
            items = list(islice(self._iterator, count))
            self._at, self._state = (epoch, first + len(items)), cpu_state()
        return items

    def _start(self, epoch: Epoch, first: int) -> None:
        seed_cpu(hash_seed(epoch.seed, epoch.number))
        if hasattr(self._data, "set_epoch"):
            self._data.set_epoch(epoch.number)
        if hasattr(self._data, "seek"):
            self._data.seek(first)
            self._iterator = iter(self._data)
        else:
            self._iterator = iter(self._data)
            for _ in islice(self._iterator, first):
                pass


class ExampleStreamFeed(Feed):
    """Feed for an IterableDataset of a declared length. One process reads it ahead, so that the order is the same with
    any number of cores."""

    def __init__(
        self, data: IterableDataset[Any], batch_size: int, device: torch.device, processes: int, collate: Collate
    ) -> None:
        super().__init__(batch_size, len(data))  # type: ignore[arg-type]  # checked_data made sure of its length
        self._device = device
        self._plan: list[Any] = []
        source = _StreamBatches(data, collate, self.count)
        self._loader = feeds.plan_loader(source, self._plan, device, min(processes, 1))

    def _fetch(self, order: Tensor, epoch: Epoch, batches: Sequence[Bounds]) -> Iterator[Any]:
        self._plan[:] = [(epoch, batch) for batch in batches]
        for batch in self._loader:
            yield on_device(batch, self._device)


class _StreamBatches(Dataset[Any]):
    """Reads a stream's batches. They are requested in ascending order, so that nothing is read twice."""

    def __init__(self, data: Any, collate: Collate, declared: int) -> None:
        self._reader = Reader(data)
        self._collate = collate
        self._declared = declared

    def __getitem__(self, item: tuple[Epoch, Bounds]) -> Any:
        epoch, (_, first, end) = item
        examples = self._reader.read(Epoch(*epoch), first, end - first)
        if len(examples) < end - first:
            raise JobError(_too_short(self._declared, "examples", first + len(examples)))
        return self._collate(examples)


class BatchStreamFeed(Feed):
    """Feed for a loader that makes its own batches, such as a DataLoader. Its length is its number of batches."""

    def __init__(self, loader: Iterable[Any], device: torch.device) -> None:
        super().__init__(1, len(loader))  # type: ignore[arg-type]  # each of its batches counts as one item
        self._reader = Reader(loader)
        self._device = device

    def _bounds(self, last: feeds.LastBatch) -> list[Bounds]:
        return [Bounds(number, number, number + 1) for number in range(self.count)]

    def _fetch(self, order: Tensor, epoch: Epoch, batches: Sequence[Bounds]) -> Iterator[Any]:
        for number, _, _ in batches:
            for batch in self._reader.read(epoch, number, 1):
                yield on_device(batch, self._device)
                break
            else:
                raise JobError(_too_short(self.count, "batches", number))


def _too_short(declared: int, what: str, found: int) -> str:
    return f"the data declare {declared} {what} (__len__), but they ended after {found}; __len__ must not be too large"
