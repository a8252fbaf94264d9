"""Keep the frozen layers' weights once for a run, in a file beside the checkpoints, instead of in every checkpoint.

The file's name contains the hash of its content, so equal layers share a file, and a damaged one is noticed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jobs.data.batches import content, size_bytes
from jobs.errors import JobError
from orchestrator.files.atomic import publish

LEAST_BYTES = 1_000_000  # smaller layers stay in the checkpoints
KEY = "frozen"  # in a checkpoint: the file's name


def frozen_names(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


def leave_out(state: dict[str, Any], frozen: Collection[str], folder: Path) -> dict[str, Any]:
    """Return the state without the frozen parameters, after writing these to the folder if they are not there. Small
    ones stay in the state. Raises OSError."""
    kept = {name: value for name, value in state["model"].items() if name in frozen}
    if size_bytes(kept) < LEAST_BYTES:
        return state
    file = folder / f"frozen-{_hash(kept)}.weights"
    try:
        os.utime(file)  # purge policies delete files that have not been written for long
    except FileNotFoundError:
        publish(file, lambda target: torch.save(kept, target))
    return state | {"model": {name: None if name in kept else v for name, v in state["model"].items()}, KEY: file.name}


def put_back(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the state with its frozen parameters, which are read from the folder if they were left out.

    Raises JobError if their file is missing or damaged."""
    name = state.pop(KEY, None)
    if name is None:
        return state
    file = folder / Path(str(name)).name
    try:
        kept = torch.load(file, map_location="cpu", weights_only=True)
        intact = file.name == f"frozen-{_hash(kept)}.weights"
    except Exception as error:  # arbitrary bytes can make the unpickler raise almost anything
        if isinstance(error, MemoryError):
            raise
        raise JobError(f"{file}: the frozen layers of the run's checkpoints can't be read: {error}") from error
    if not intact:
        raise JobError(f"{file}: the frozen layers of the run's checkpoints are damaged; copy the file from a backup")
    return state | {"model": {key: kept.get(key, value) for key, value in state["model"].items()}}


def _hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(content(tensor))
    return digest.hexdigest()[:32]
