"""Split the examples into training and validation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from jobs.errors import JobError

Split = Literal["train", "validation", "test"]


def split(data: Any, validation_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Return indices for training and for validation, split by the classes that the data set lists."""
    return split_labels(labels_of(data), len(data), validation_fraction, seed)


def split_labels(
    labels: Sequence[int] | NDArray[np.int64] | None, count: int, validation_fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Return indices for training and for validation, fixed by the seed. labels: the class of each example, each class
    is split by itself; None: unknown, one class. Raises JobError if a class is too small to be in both."""
    groups = np.zeros(count, dtype=np.int64) if labels is None else np.asarray(labels)
    kept = stratified(groups, validation_fraction, seed)
    alone = np.setdiff1d(groups, np.intersect1d(groups[kept], groups[~kept]))
    if len(alone) or not count:
        which = f" of the classes {alone[:10].tolist()}" if labels is not None else ""
        raise JobError(
            f"{count} examples can't be split into training and validation: one side would have none{which}. "
            'A class needs at least 2 examples; add some, leave these classes out, or set "stratify": false'
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


def labels_of(data: Any) -> NDArray[np.int64] | None:
    """Return the class of each example (n,), if the data set lists classes, else None. Loads no examples.

    Looked for: the attributes `targets`, `labels` and `_labels`, and the last tensor of a TensorDataset; for a Subset,
    those of the data set that it selects from. They count as classes if they have one whole number for each example,
    and if each number occurs at least twice: numbers that occur once are rather identifiers or values to predict.
    """
    if isinstance(data, Subset):
        of_all = _listed(data.dataset)
        chosen = np.asarray(data.indices, dtype=np.int64)
        listed = None if of_all is None else of_all[chosen]
    else:
        listed = _listed(data)
    if listed is None or not len(listed) or np.unique(listed, return_counts=True)[1].min() < 2:
        return None
    return listed


def _listed(data: Any) -> NDArray[np.int64] | None:
    """Return the numbers that a data set lists for its examples, whatever they mean."""
    candidates = [getattr(data, name, None) for name in ("targets", "labels", "_labels")]
    if isinstance(data, TensorDataset) and len(data.tensors) > 1:
        candidates.append(data.tensors[-1])
    for candidate in candidates:
        if candidate is None or callable(candidate):
            continue
        try:
            values = np.asarray(candidate.cpu() if isinstance(candidate, Tensor) else candidate)
        except (ValueError, TypeError, RuntimeError):  # a ragged list, for example boxes of different numbers
            continue
        if values.shape == (len(data),) and values.dtype.kind in "biu":
            return values.astype(np.int64)
    return None
