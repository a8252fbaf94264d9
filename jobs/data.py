"""Batches of a data set, in an order that depends on nothing but a seed: not on the number of loader
processes, nor on where the epoch was interrupted."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset, default_collate

from jobs.batches import map_tensors
from jobs.job import JobError


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
        self._plan = Plan()
        self._loader = plan_loader(_SeededBatches(data, indices), self._plan, device, processes)

    def _fetch(self, order: Tensor, epoch: Epoch, first_batch: int, every: int) -> Iterator[Any]:
        chunks = torch.split(order, self.batch_size)
        chosen = range(first_batch, len(chunks), every)
        self._plan.batches = [(hash_seed(epoch.seed, i), chunks[i].tolist()) for i in chosen]
        for batch in self._loader:
            yield to_device(batch, self._device)


class Plan(Sampler[Any]):
    """Which batches come next; the loader asks again at the start of each epoch."""

    def __init__(self) -> None:
        self.batches: list[Any] = []  # each what the data set takes as an index

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def plan_loader(batches: Dataset[Any], plan: Plan, device: torch.device, processes: int) -> DataLoader[Any]:
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


def split(data: Dataset[Any], validation_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices for training and for validation: a share of each class, fixed by the seed.

    A data set that has no labels to read is split without regard to classes. Raises JobError if a class has
    too few examples for both sides.
    """
    count = len(data)  # type: ignore[arg-type]  # a Dataset that we can index has a length
    labels = labels_of(data)
    groups = np.zeros(count, dtype=np.int64) if labels is None else np.asarray(labels)
    kept = stratified(groups, validation_fraction, seed)
    alone = np.setdiff1d(groups, np.intersect1d(groups[kept], groups[~kept]))
    if len(alone) or not count:
        which = f" of the classes {alone[:10].tolist()}" if labels is not None else ""
        raise JobError(
            f"{count} examples can't be split into training and validation: one side would have none{which}. "
            "A class needs 2 examples at least; add some, or leave these classes out"
        )
    return np.flatnonzero(~kept).tolist(), np.flatnonzero(kept).tolist()


def stratified(groups: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which examples are in the sample: of each group this fraction, to the nearest whole number, but at least
    one, and at least one left over (of a group of one: none).

    NumPy's and not scikit-learn's, whose import takes longer (0.8 s) than all else that orch does between two
    jobs of a chain. groups: (n,), any order; returns (n,) bool. The same for the same arguments, always.
    """
    chosen = np.zeros(len(groups), dtype=np.bool_)
    generator = np.random.Generator(np.random.PCG64(seed))  # named: default_rng may change with NumPy
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        size = min(max(round(fraction * len(members)), 1), len(members) - 1)
        chosen[generator.permutation(members)[:size]] = True
    return chosen


def labels_of(data: Dataset[Any]) -> Sequence[int] | None:
    """The classes of a data set without loading its examples, where it tells."""
    for name in ("targets", "labels", "_labels"):
        found = getattr(data, name, None)
        if found is not None:
            return _whole_numbers(found)
    if isinstance(data, TensorDataset) and len(data.tensors) > 1:
        return _whole_numbers(data.tensors[-1])
    return None


def _whole_numbers(labels: Any) -> Sequence[int] | None:
    values = np.asarray(labels)
    return values.tolist() if values.ndim == 1 and np.issubdtype(values.dtype, np.integer) else None


# --- random state


def hash_seed(*parts: int) -> int:
    """A seed from numbers that say what it is for (numpy's SeedSequence, O'Neill 2015), below 2**63."""
    return int(np.random.SeedSequence([p & (2**63 - 1) for p in parts]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_all(seed: int) -> None:
    seed_cpu(seed)
    torch.manual_seed(seed)


def seed_cpu(seed: int) -> None:
    """All but the GPUs' generators: what is drawn for the data must not change what the model draws."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """Python's, numpy's, torch's and every GPU's, in types that load with weights_only=True."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": (version, list(words), gauss),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """GPUs beyond those that were there when it was saved keep their state."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    for index, gpu in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(gpu.cpu(), index)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """What is drawn inside leaves no trace; GPUs are not touched, for loader processes must not."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
