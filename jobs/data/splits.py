"""Split the examples into training and validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset, TensorDataset

from jobs.errors import JobError

Split = Literal["train", "validation", "test"]


def split(data: Dataset[Any], validation_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Return indices for training and for validation, stratified by class and fixed by the seed. A data set without
    readable labels counts as one class. Raises JobError if a class is too small to be in both."""
    count = len(data)  # type: ignore[arg-type]  # map-style data sets have a length
    return split_labels(labels_of(data), count, validation_fraction, seed)


def split_labels(
    labels: Sequence[int] | None, count: int, validation_fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Like `split`, but for `count` examples with these labels (None: unknown)."""
    groups = np.zeros(count, dtype=np.int64) if labels is None else np.asarray(labels)
    kept = stratified(groups, validation_fraction, seed)
    alone = np.setdiff1d(groups, np.intersect1d(groups[kept], groups[~kept]))
    if len(alone) or not count:
        which = f" of the classes {alone[:10].tolist()}" if labels is not None else ""
        raise JobError(
            f"{count} examples can't be split into training and validation: one side would have none{which}. "
            "A class needs at least 2 examples; add some, or leave these classes out"
        )
    return np.flatnonzero(~kept).tolist(), np.flatnonzero(kept).tolist()


def stratified(groups: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Sample this fraction of each group, rounded, but at least one example and never the whole group. A group of one
    example is not sampled.

    groups: (n,), in any order. Returns (n,) bool: whether each example is sampled. Equal arguments always give equal
    results. (scikit-learn is not used: its import takes 0.8 s, longer than all other work between two chained jobs.)
    """
    chosen = np.zeros(len(groups), dtype=np.bool_)
    generator = np.random.Generator(np.random.PCG64(seed))  # default_rng's algorithm may change in a later NumPy
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        size = min(max(round(fraction * len(members)), 1), len(members) - 1)
        chosen[generator.permutation(members)[:size]] = True
    return chosen


def labels_of(data: Dataset[Any]) -> Sequence[int] | None:
    """Return the class of each example if an attribute of the data set lists them, else None. Loads no examples."""
    listed = [getattr(data, name, None) for name in ("targets", "labels", "_labels")]
    if isinstance(data, TensorDataset) and len(data.tensors) > 1:
        listed.append(data.tensors[-1])
    values = np.asarray(next((labels for labels in listed if labels is not None), None))
    return values.tolist() if values.ndim == 1 and np.issubdtype(values.dtype, np.integer) else None
