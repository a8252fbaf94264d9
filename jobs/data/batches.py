"""Batches of any structure: tensors in dicts, lists, tuples, named tuples and dataclasses, nested."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor


def map_tensors(batch: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return the same structure with `change` applied to each tensor; other values stay the same."""
    return map_leaves(batch, lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf)


def map_leaves(batch: Any, change: Callable[[Any], Any]) -> Any:
    """Return the same structure with `change` applied to each non-container value. A list of strings is one value."""
    if isinstance(batch, Mapping):
        changed = {key: map_leaves(value, change) for key, value in batch.items()}
        if type(batch) is dict or not isinstance(batch, MutableMapping):
            return changed
        same = copy.copy(batch)  # preserves classes such as transformers' BatchEncoding
        same.update(changed)
        return same
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_leaves(value, change) for value in batch))
    if isinstance(batch, list | tuple) and not _all_strings(batch):
        return type(batch)(map_leaves(value, change) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        values = {f.name: map_leaves(getattr(batch, f.name), change) for f in dataclasses.fields(batch) if f.init}
        return dataclasses.replace(batch, **values)
    return change(batch)


def leaves(batch: Any) -> list[Any]:
    """Return all non-container values of a batch, in order."""
    listed: list[Any] = []

    def note(leaf: Any) -> Any:
        listed.append(leaf)
        return leaf

    map_leaves(batch, note)
    return listed


def tensors(batch: Any) -> list[Tensor]:
    return [leaf for leaf in leaves(batch) if isinstance(leaf, Tensor)]


def size_bytes(batch: Any) -> int:
    """Return the size of all tensors in the structure."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(batch))


def content(tensor: Tensor) -> memoryview:
    """Return a tensor's values as bytes, for a hash."""
    data: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


def contents_digest(listed: Iterable[Tensor]) -> str:
    """Return the SHA-256 (hex) of the values of some tensors, in order."""
    digest = hashlib.sha256()
    for tensor in listed:
        digest.update(content(tensor))
    return digest.hexdigest()


def part(batch: Any, whole: int, first: int, end: int) -> Any:
    """Return examples first:end of a batch of `whole` examples. Values without one element per example stay whole."""

    def cut(leaf: Any) -> Any:
        per_example = (isinstance(leaf, Tensor) and leaf.ndim > 0) or isinstance(leaf, list | tuple)
        return leaf[first:end] if per_example and len(leaf) == whole else leaf

    return map_leaves(batch, cut)


def _all_strings(values: list[Any] | tuple[Any, ...]) -> bool:
    return bool(values) and all(isinstance(value, str | bytes) for value in values)
