"""What must stay the same in a split's data during a run: their number, labels, class names, the indices that are used,
and a sample of the examples. Scores of different data can't be compared, and a shifted split validates on examples that
were trained on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from jobs.data.batches import leaves
from jobs.data.streams import is_stream
from jobs.errors import JobError

Fingerprint = Mapping[str, Any]  # JSON values
SAMPLE, VALUES = 8, 4  # examples in the sample; numbers that are compared of each array
SAMPLE_IN_MEMORY = 64  # of data that can be read at no cost
# Processors and versions of libraries may decode and round differently, but not by as much as other examples differ.
TOLERANCE = 0.02


def fingerprint_of(data: Any, labels: NDArray[np.int64] | None, indices: Sequence[int] | None) -> dict[str, Any]:
    """Return the fingerprint of a split. indices: of the examples that are used; None: all of a stream.

    Reads a few examples, so seed the random generators before the call."""
    return {
        "examples": len(data),
        "classes": class_names(data),
        "labels": None if labels is None else _hash(labels),
        "indices": None if indices is None else _hash(np.asarray(indices, dtype=np.int64)),
        "sample": None if is_stream(data) else sample_of(data),
    }


def class_names(data: Any) -> list[str] | None:
    """Return the names of the classes, in the order of their numbers, as torchvision's data sets list them."""
    classes = getattr(data.dataset if isinstance(data, Subset) else data, "classes", None)
    return [str(name) for name in classes] if isinstance(classes, list | tuple) else None


def changes(kept: Fingerprint, now: Fingerprint) -> list[str]:
    """Return what differs between two fingerprints of the same split, most telling first."""
    found = []
    if kept["examples"] != now["examples"]:
        found.append(f"it had {kept['examples']:,} examples, and now has {now['examples']:,}")
    if kept["classes"] != now["classes"]:
        found.append(class_change(kept["classes"], now["classes"]))
    if kept["labels"] != now["labels"] and not found:
        found.append("its labels differ, or are in another order")
    if kept["indices"] != now["indices"] and not found:
        found.append("other examples are selected for it")
    if not found and not same_sample(kept, now):
        found.append("its examples differ, or are in another order")
    return found


def class_change(kept: Sequence[str] | None, now: Sequence[str] | None) -> str:
    """Describe how two lists of class names differ."""
    kept, now = kept or [], now or []
    lost, new = [name for name in kept if name not in now], [name for name in now if name not in kept]
    if not lost and not new:
        moved = next((name for one, name in zip(kept, now, strict=False) if one != name), "?")
        return f"its classes are numbered in another order: {moved!r} was {kept.index(moved)}, now {now.index(moved)}"
    parts = [f"lacks {', '.join(map(repr, lost[:5]))}"] if lost else []
    parts += [f"also has {', '.join(map(repr, new[:5]))}"] if new else []
    return f"its classes are different: it {' and '.join(parts)}"


def same_sample(kept: Fingerprint, now: Fingerprint) -> bool:
    """Return whether the samples are the same, up to rounding."""
    one, other = kept["sample"], now["sample"]
    if one is None or other is None:
        return one is other
    return len(one) == len(other) and all(map(_same, one, other))


def unlike(sample: Sequence[Any], again: Sequence[Any], other: Sequence[Any]) -> tuple[bool, bool]:
    """Compare two samples of what should be the same examples: sample, again (the same data, read with other random
    numbers) and other. Return whether the last value of an example (its target), if it is a single number, differs; and
    whether another value does. Values that are random are not compared."""
    targets = inputs = False
    for one, repeated, candidate in zip(sample, again, other, strict=False):
        for place, (value, same, found) in enumerate(zip(one, repeated, candidate, strict=False)):
            if not _same(value, same) or _same(value, found):
                continue
            single = isinstance(value, list) and value[:1] == [[]] and isinstance(found, list) and found[:1] == [[]]
            if place == len(one) - 1 and single and len(one) > 1:
                targets = True
            else:
                inputs = True
    return targets, inputs


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE) or one == other
    return bool(one == other)


def sample_of(data: Any) -> list[Any] | None:
    """Describe examples spread over the data: for each value, its shape and some numbers, or a hash. None if the data
    have no single examples, only a feed."""
    count = min(SAMPLE_IN_MEMORY if isinstance(data, TensorDataset) else SAMPLE, len(data))
    chosen = [number * (len(data) - 1) // max(count - 1, 1) for number in range(count)]
    try:
        return [[_described(leaf) for leaf in leaves(data[index])] for index in chosen]
    except JobError:
        return None


def _described(leaf: Any) -> Any:
    if isinstance(leaf, str | bytes):
        return hashlib.sha256(leaf.encode(errors="surrogatepass") if isinstance(leaf, str) else leaf).hexdigest()[:16]
    if isinstance(leaf, list | tuple):  # of strings
        return [_described(part) for part in leaf]
    try:
        values = np.asarray(leaf.detach().cpu().float() if isinstance(leaf, Tensor) else leaf, dtype=np.float64)
    except (ValueError, TypeError, RuntimeError):
        return type(leaf).__name__
    flat = values.ravel()
    if not flat.size:
        return [list(values.shape)]
    scale = float(np.abs(flat).max()) or 1.0
    spread = flat[np.linspace(0, flat.size - 1, min(VALUES, flat.size)).astype(np.int64)]
    numbers = [scale, float(flat.mean() / scale), *(float(value / scale) for value in spread)]
    return [list(values.shape), *(number if math.isfinite(number) else str(number) for number in numbers)]


def _hash(values: NDArray[np.int64]) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()[:32]
