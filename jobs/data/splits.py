"""Which examples are trained on, and which are kept for validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset, TensorDataset

from jobs.errors import JobError

Split = Literal["train", "validation", "test"]


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
