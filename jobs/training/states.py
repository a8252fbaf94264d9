"""Read checkpoints, and extract the model's weights from them."""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from jobs.data.batches import map_tensors, size_bytes
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


def export(checkpoint: Path, target: IO[bytes]) -> None:
    """Write the weights of a checkpoint's model (as returned by `weights`) to a file. Load them on any machine with
    `model.load_state_dict(torch.load(file))`."""
    torch.save(weights(read(checkpoint)), target)
