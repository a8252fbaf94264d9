"""Read checkpoints, and extract the model's weights from them."""

from __future__ import annotations

import datetime
import errno
import io
import re
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from enum import Enum
from importlib import import_module
from itertools import combinations
from pathlib import Path, PosixPath, PurePosixPath
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.serialization import safe_globals

from jobs.data.batches import map_leaves, map_tensors, size_bytes
from jobs.errors import JobError
from jobs.training import frozen_file, memory
from orchestrator.rules import failing

FORMAT = 2


def read(path: Path | IO[bytes]) -> dict[str, Any]:
    """Load a checkpoint's state, without executing any code in the file. All tensors are loaded to the CPU; those that
    belong on another device are copied there when the state is restored. Raises JobError if the file is not a
    checkpoint of this format, OSError if it can't be opened."""
    name = path if isinstance(path, Path | str) else "the checkpoint that rank 0 sent"
    try:
        with plain_globals():
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # arbitrary bytes can make the unpickler raise almost anything
        # On a truncated file, torch.load seeks to a negative offset.
        truncated = isinstance(error, OSError) and error.errno == errno.EINVAL
        if isinstance(error, OSError | MemoryError) and not truncated:
            raise
        raise JobError(f"{name}: not a checkpoint of format {FORMAT}: {why_unreadable(error)}") from error
    if not isinstance(state, dict) or "format" not in state:
        raise JobError(f"{name}: not a checkpoint of format {FORMAT}: it names no format")
    if state["format"] != FORMAT:
        raise JobError(f"{name}: not a checkpoint of format {FORMAT}: its format is {state['format']!r:.40}")
    return frozen_file.put_back(state, path.parent) if isinstance(path, Path) else state


# --- what a file may hold


def plain_globals() -> AbstractContextManager[Any]:
    """Let torch.load(weights_only=True) also read values of NumPy and of Python's standard library that are only data.
    Schedules and optimizers hold such values: a warm-up with np.cos makes the learning rate a NumPy number."""
    multiarray = import_module("numpy._core.multiarray" if int(np.__version__[0]) > 1 else "numpy.core.multiarray")
    named: list[Any] = [np.ndarray, np.dtype, *vars(np.dtypes).values()]
    for function in (multiarray.scalar, multiarray._reconstruct):  # NumPy 1 and 2 name them differently
        named += [(function, f"{home}.multiarray.{function.__name__}") for home in ("numpy.core", "numpy._core")]
    named += [bytes, frozenset, range, slice, PosixPath, PurePosixPath]
    named += [datetime.date, datetime.time, datetime.datetime, datetime.timedelta, datetime.timezone]
    return safe_globals([one for one in named if isinstance(one, tuple) or callable(one)])


def plain(value: Any) -> Any:
    """Return a state in which an enum's member is its value, a named tuple a tuple, and a dict or a list of a special
    class an ordinary one. All other values stay as they are."""
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, Mapping):
        changed = {plain(key): plain(item) for key, item in value.items()}
        return OrderedDict(changed) if isinstance(value, OrderedDict) else changed
    if isinstance(value, list | deque):
        return [plain(item) for item in value]
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        return tuple(plain(item) for item in value)
    return value


def check_readable(state: Mapping[str, Any], what: str) -> None:
    """Raise JobError if a file with this state could not be read back. what: prefix of the message."""
    found = _unreadable(state, "")
    if found is not None:
        key, error = found
        raise JobError(
            f"{what} can't be kept: {key} {why_unreadable(error)}; allowed: dicts, lists, tensors and plain values, "
            "such as a state_dict()"
        ) from error


def _unreadable(value: Any, key: str) -> tuple[str, Exception] | None:
    """Return the innermost key whose value can't be read back, and torch's error; None if all can."""
    try:
        written = io.BytesIO()
        torch.save(_emptied(value), written)
        written.seek(0)
        with plain_globals():
            torch.load(written, weights_only=True)
        return None
    except Exception as error:  # pickle can raise anything that the pickled objects raise
        inner: Iterable[tuple[Any, Any]] = ()
        if isinstance(value, Mapping):
            inner = [(f"{key}.{name}" if key else str(name), item) for name, item in value.items()]
        elif isinstance(value, list | tuple):
            inner = [(f"{key}[{index}]", item) for index, item in enumerate(value)]
        found = next((place for name, item in inner if (place := _unreadable(item, name))), None)
        return found or (f"{key} ({type(value).__name__}):", error)


def _emptied(value: Any) -> Any:
    """Return the structure with empty tensors and arrays, which is written quickly."""

    def empty(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.detach().new_empty(0)
        return leaf.ravel()[:0] if isinstance(leaf, np.ndarray) and leaf.dtype != object else leaf

    return map_leaves(value, empty)


class Copies:
    """Copies states to host memory. Each copy reuses the memory of the previous one, which is then no longer valid:
    allocating half a gigabyte anew takes longer than copying it."""

    def __init__(self) -> None:
        self._memory: list[Tensor] = []

    def needed_bytes(self, state: Mapping[str, Any]) -> int:
        """Return how much more memory a copy of the state takes."""
        return size_bytes(state) - size_bytes(self._memory)

    def copy(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state with all tensors copied; tensors that are one in the state are one in the copy."""
        free, self._memory = self._memory, []
        made: dict[tuple[Any, ...], Tensor] = {}

        def copied(tensor: Tensor) -> Tensor:
            key = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
            if not tensor.numel() or key not in made:
                made[key] = _copy(tensor, free[len(self._memory)] if len(self._memory) < len(free) else None)
                self._memory.append(made[key])
            return made[key]

        result: dict[str, Any] = map_tensors(state, copied)
        return result


class EpochCopy:
    """A copy of the state at the end of an epoch, in host memory. Copies are made so rarely that they cost little."""

    def __init__(self) -> None:
        self.state: dict[str, Any] | None = None
        self._copies = Copies()
        self._took_s: float | None = None  # how long the last copy took
        self._trained_s = 0.0  # since the last copy

    def copy(self, state: Callable[[], dict[str, Any]], trained_s: float) -> None:
        """Copy the state, unless the last copy is too recent or the memory does not suffice. state: returns it.
        trained_s: how long the epoch took."""
        self._trained_s += trained_s
        if not failing.worth_copying(self._trained_s, self._took_s):
            return
        started, now = time.monotonic(), state()
        if self._copies.needed_bytes(now) > memory.free_bytes() / 2:
            return
        self.state = None  # the last copy's memory is used again
        with suppress(MemoryError, RuntimeError):  # the copy is not worth a failure
            self.state = self._copies.copy(now)
        self._took_s, self._trained_s = time.monotonic() - started, 0.0

    def forget(self) -> None:
        self.state = None


def _copy(tensor: Tensor, memory: Tensor | None) -> Tensor:
    tensor = tensor.detach()
    layout = (tensor.dtype, tensor.shape, tensor.stride())
    if memory is not None and layout == (memory.dtype, memory.shape, memory.stride()):
        return memory.copy_(tensor)
    return tensor.to("cpu", copy=True)


def last_step(path: Path) -> int:
    """Return a checkpoint's position on the x axis of its lineage's curves: optimizer steps, or epochs if the job has
    its own loop. The tensors' data are not read, so this is fast."""
    with plain_globals():
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return int(state.get("steps", state["epochs"]))


def why_unreadable(error: Exception) -> str:
    """Return a short description of an error raised by torch.load."""
    code = re.search(r"Unsupported (?:global|class)\S* \S+( \S+)?", str(error))
    if code:
        return f"it contains more than tensors and plain values, and orch executes no code from files ({code[0]})"
    return f"it is damaged, or torch.save did not write it ({type(error).__name__})"


def weights(state: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Return the weights (a state_dict) with which a checkpoint's metrics were measured: the averaged weights if the
    checkpoint has any, otherwise the trained weights. Raises JobError if a job's own loop saved no model."""
    if "own" in state:
        model = state["own"].get("model")
        if not isinstance(model, Mapping):
            raise JobError(
                'the state returned by train_chunk has no "model"; set it to the model\'s state_dict(), so that the '
                "model can be evaluated and exported"
            )
        return model
    average = state["average"]
    kept: Mapping[str, Tensor] = average["model"] if average and average["updates"] else state["model"]
    return kept


def read_start(file: Path) -> Mapping[str, Any]:
    """Read the file of the setting start_from: a checkpoint, or weights by name, perhaps under "model", "state_dict" or
    "model_state_dict". Returns a state that `weights` accepts. Raises JobError."""
    try:
        with plain_globals():
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # arbitrary bytes can make the unpickler raise almost anything
        if isinstance(error, MemoryError):
            raise
        raise JobError(f"start_from: {file} can't be read: {why_unreadable(error)}") from error
    if isinstance(state, dict) and "format" in state:
        return read(file)
    inner = [state, *(state.get(key) for key in ("model", "state_dict", "model_state_dict") if isinstance(state, dict))]
    for found in inner:
        if isinstance(found, Mapping) and found and all(isinstance(value, Tensor) for value in found.values()):
            return {"model": found, "average": None}
    raise JobError(f"start_from: {file} holds no weights by name; allowed: a checkpoint, or a model's state_dict()")


def export(checkpoint: Path, target: IO[bytes], wanted: Callable[[], Collection[str] | None] = lambda: None) -> None:
    """Write the weights of a checkpoint's model (as returned by `weights`) to a file. Load them on any machine with
    `model.load_state_dict(torch.load(file))`. wanted: returns the names in the state_dict of the job's model, or None
    if they are not known; called only if the weights may be those of a wrapped model."""
    state = weights(read(checkpoint))
    torch.save(unwrapped(state, wanted() if any(map(_wrappers, state)) else None), target)


WRAPPERS = ("_orig_mod", "module")  # where the wrappers of torch.compile, DataParallel and DDP keep the model
MANY_WRAPPERS = 8  # in one name; beyond, not every way of leaving some out is tried


def unwrapped(state: Mapping[str, Any], wanted: Collection[str] | None = None) -> Mapping[str, Any]:
    """Return a state_dict without the prefixes of wrappers, at any depth: "module.fc._orig_mod.bias" becomes "fc.bias".

    wanted: the names in the state_dict of the job's model, in which a layer may itself be called "module"; None: not
    known. If the state fits the model as it is, or if two names would become one, it is returned as it is.
    """
    if (wanted is not None and state.keys() == set(wanted)) or not any(map(_wrappers, state)):
        return state
    names = [_without_wrappers(name, wanted) if _wrappers(name) else name for name in state]
    return dict(zip(names, state.values(), strict=True)) if len({*names}) == len(names) else state


def _wrappers(name: str) -> list[int]:
    """Return the places of wrappers in a name such as module.fc.bias."""
    parts = str(name).split(".")  # a job's own loop may use other keys than text
    return [place for place, part in enumerate(parts[:-1]) if part in WRAPPERS]


def _without_wrappers(name: str, wanted: Collection[str] | None) -> str:
    """Return the name without its wrappers; or a wanted name, if one remains when only some of them are left out."""
    parts, places = name.split("."), _wrappers(name)

    def without(dropped: Collection[int]) -> str:
        return ".".join(part for place, part in enumerate(parts) if place not in dropped)

    if wanted is not None and len(places) <= MANY_WRAPPERS:
        for count in range(len(places) + 1):
            for other in map(without, combinations(places, count)):
                if other in wanted:
                    return other
    return without(places)
