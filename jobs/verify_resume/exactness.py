"""Compare two training states bit for bit, and show where they differ and by how much.

A state is the content of a checkpoint: dicts, lists and tuples of tensors, NumPy arrays and plain values.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.data.batches import leaves


@dataclass(frozen=True)
class Difference:
    """One place where two states are not the same."""

    path: str  # "model.0.weight", "optimizer.state[3].momentum_buffer", "rng.torch"
    kind: str  # "value", "shape", "dtype", "type", "keys" or "length"
    expected: str  # for display
    found: str
    max_abs_difference: float | None = None  # for tensors, arrays and numbers; infinite between NaN and a number


def differences(expected: Any, found: Any, path: str = "") -> Iterator[Difference]:
    """Yield every place where two states differ, in the order of `expected`.

    Two values are equal if their types, dtypes, shapes and bytes are equal. So two NaNs with the same bits are equal,
    and 0.0 and -0.0 are not. Devices and the order of a dict's keys are ignored. A list never equals a tuple.
    """
    if type(expected) is not type(found) and not _alike(expected, found):
        yield Difference(path, "type", type(expected).__name__, type(found).__name__)
    elif isinstance(expected, Mapping):
        lost, new = [k for k in expected if k not in found], [k for k in found if k not in expected]
        if lost or new:
            yield Difference(path, "keys", f"also {_names(lost)}" if lost else "no more", f"also {_names(new)}")
        for key in expected:
            if key in found:
                yield from differences(expected[key], found[key], _join(path, key))
    elif isinstance(expected, list | tuple):
        if len(expected) != len(found):
            yield Difference(path, "length", str(len(expected)), str(len(found)))
        for index, (one, other) in enumerate(zip(expected, found, strict=False)):
            yield from differences(one, other, f"{path}[{index}]")
    elif isinstance(expected, Tensor | np.ndarray | np.generic):
        yield from _tensor_differences(expected, found, path)
    elif isinstance(expected, float | complex):
        yield from _tensor_differences(np.array(expected), np.array(found), path)
    elif expected != found:
        numbers = isinstance(expected, int) and not isinstance(expected, bool)
        distance = float(abs(expected - found)) if numbers else None
        yield Difference(path, "value", _short(expected), _short(found), distance)


def count_tensors(state: Any) -> int:
    """Count the tensors and arrays in a state."""
    return sum(isinstance(leaf, Tensor | np.ndarray) for leaf in leaves(state))


def digest(value: Any) -> str:
    """Return the SHA-256 (hex) of the dtypes, shapes and bytes of a nested batch. If two batches have no
    `differences`, their digests are equal, on any device."""
    sha256 = hashlib.sha256()
    _digest(value, sha256)
    return sha256.hexdigest()


def _digest(value: Any, into: Any) -> None:
    if isinstance(value, Tensor):
        into.update(f"{value.dtype} {tuple(value.shape)}".encode())
        if value.numel():
            into.update(_bytes(_dense(value)).numpy().data)
    elif isinstance(value, np.ndarray | np.generic):
        into.update(f"{value.dtype} {value.shape}".encode())
        into.update(value.tobytes())
    elif isinstance(value, Mapping):
        for key in value:
            into.update(f"key {key!r}".encode())
            _digest(value[key], into)
    elif isinstance(value, list | tuple):
        into.update(f"{len(value)} values".encode())
        for part in value:
            _digest(part, into)
    else:
        into.update(repr(value).encode())


# --- tensors and arrays


def _tensor_differences(expected: Any, found: Any, path: str) -> Iterator[Difference]:
    """Yield the differences between two tensors, or between two NumPy arrays or scalars."""
    for kind, name in (("dtype", "dtype"), ("shape", "shape"), ("type", "layout")):
        values = [str(tuple(v.shape) if kind == "shape" else getattr(v, name, "")) for v in (expected, found)]
        if values[0] != values[1]:
            yield Difference(path, kind, values[0], values[1])
            return
    if isinstance(expected, np.ndarray | np.generic):
        if expected.dtype.kind not in "biufc":
            if expected.tobytes() != found.tobytes():
                yield Difference(path, "value", _short(expected.tolist()), _short(found.tolist()))
            return
        expected, found = torch.from_numpy(np.array(expected)), torch.from_numpy(np.array(found))
    one, other = _dense(expected), _dense(found)
    if not torch.equal(_bytes(one), _bytes(other)):
        yield _largest_difference(one, other, _bytes(one).ne(_bytes(other)).any(dim=1), path)


def _largest_difference(expected: Tensor, found: Tensor, differs: Tensor, path: str) -> Difference:
    """Return the largest difference between two tensors of n values. differs: (n,), where their bits differ."""
    wide = torch.complex128 if expected.is_complex() else torch.float64
    one, other = expected.reshape(-1).to(wide), found.reshape(-1).to(wide)
    distance = (one - other).abs()
    distance[one == other] = 0.0  # for equal infinities, whose subtraction gives NaN
    distance = distance.nan_to_num(nan=math.inf, posinf=math.inf).masked_fill(~differs, -1.0)
    worst = int(distance.argmax())
    where = f" (value {worst} of {len(one)})" if expected.ndim else ""
    return Difference(
        path, "value", f"{one[worst].item()!r}{where}", repr(other[worst].item()), float(distance[worst].item())
    )


def _bytes(tensor: Tensor) -> Tensor:
    """Return a dense tensor's values as bytes: uint8 of shape (values, bytes per value)."""
    return tensor.reshape(-1).view(torch.uint8).view(tensor.numel(), tensor.element_size())


def _dense(tensor: Tensor) -> Tensor:
    """Return a strided, contiguous copy on the CPU, with every value in memory."""
    tensor = tensor.detach().cpu()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    return tensor.resolve_conj().resolve_neg().contiguous()


# --- plain values


def _alike(one: Any, other: Any) -> bool:
    """Return whether both are tensors (including Parameters) or both are mappings (including OrderedDicts)."""
    return any(isinstance(one, kind) and isinstance(other, kind) for kind in (Tensor, Mapping))


def _join(path: str, key: Any) -> str:
    if isinstance(key, str):
        return f"{path}.{key}" if path else key
    return f"{path}[{key!r}]"


def _names(keys: list[Any]) -> str:
    shown = ", ".join(repr(key) for key in keys[:3])
    return f"{shown} and {len(keys) - 3} more" if len(keys) > 3 else shown or "nothing"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
