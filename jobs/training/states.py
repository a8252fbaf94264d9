"""Read checkpoints, and extract the model's weights from them."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Collection, Mapping
from itertools import combinations
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from jobs.data.batches import map_tensors, size_bytes
from jobs.errors import JobError
from jobs.training import frozen_file

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
