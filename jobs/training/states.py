"""Checkpoints as they are read: whole states, and what of them is the model."""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from jobs.errors import JobError

FORMAT = 2


def read(path: Path | IO[bytes]) -> dict[str, Any]:
    """A checkpoint's state, its tensors on the CPU: from there each goes where it belongs, and some belong there
    (random states, the step counts of optimizers). Nothing in the file is executed.

    Raises JobError if it is no checkpoint of this format, OSError if it can't be opened.
    """
    name = path if isinstance(path, Path | str) else "what was received as a checkpoint"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # arbitrary bytes can make the unpickler raise almost anything
        truncated = isinstance(error, OSError) and error.errno == errno.EINVAL  # it seeks to before the start
        if isinstance(error, OSError | MemoryError) and not truncated:
            raise
        raise JobError(f"{name}: not a checkpoint of format {FORMAT}: {why_unreadable(error)}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        named = isinstance(state, dict) and "format" in state
        found = f"it says {state['format']!r:.40}" if named else "it names no format"
        raise JobError(f"{name}: not a checkpoint of format {FORMAT}: {found}")
    return state


def last_step(path: Path) -> int:
    """Where on the x axis of the curves of its lineage a checkpoint stands: optimizer steps, or epochs where
    the job has a loop of its own. Tensors are not read."""
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return int(state.get("steps", state["epochs"]))


def why_unreadable(error: Exception) -> str:
    """What torch.load found, in short."""
    code = re.search(r"Unsupported (?:global|class)\S* \S+( \S+)?", str(error))
    if code:
        return f"it holds more than tensors and plain values, and nothing of that is executed ({code[0]})"
    return f"it is damaged, or no file of torch.save's ({type(error).__name__})"


def weights(state: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """Of a checkpoint, the model's state_dict that its metrics were measured with: the average where there is one.

    Raises JobError if the job has a loop of its own, whose state has none."""
    if "own" in state:
        found = state["own"].get("model")
        if not isinstance(found, Mapping):
            raise JobError(
                'the state that train_chunk returned has no "model"; put the state_dict() of the model there, so that '
                "it can be evaluated and exported"
            )
        return found
    average = state["average"]
    kept: Mapping[str, Tensor] = average["model"] if average and average["updates"] else state["model"]
    return kept


def export(checkpoint: Path, target: IO[bytes]) -> None:
    """Only the model's weights, on the CPU, as `model.load_state_dict(torch.load(file))` takes them; their average,
    if the job keeps one."""
    torch.save(weights(read(checkpoint)), target)
