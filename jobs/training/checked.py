"""Check what a job's own methods return before it is passed to torch. Tensor values are not read, because reading them
would wait for the GPU."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from jobs.errors import JobError
from jobs.job import Job


def checked_data(job: Job, data: Any, split: str) -> Any:
    """Return `data`, a split's data set or stream. Raises JobError unless it has a length and can be read."""
    readable = hasattr(data, "__getitem__") or hasattr(data, "__iter__")
    allowed = "a torch Dataset with __len__ and __getitem__, or an IterableDataset or a loader with __len__"
    called = f"{type(job).__name__}.data({split!r}) returned"
    if not readable or isinstance(data, Mapping | str | bytes):
        raise JobError(f"{called} {_described(data)}; allowed: {allowed}")
    try:
        length = len(data)
    except TypeError as error:
        raise JobError(f"{called} {_described(data)} without a length; allowed: {allowed}") from error
    if not length:
        raise JobError(f"{called} no examples; allowed: {allowed}, of one example or more")
    return data


def checked_model(job: Job, model: Any) -> nn.Module:
    """Return `model`. Raises JobError unless it is a module."""
    if not isinstance(model, nn.Module):
        raise JobError(f"{type(job).__name__}.model() returned {_described(model)}; allowed: a torch.nn.Module")
    return model


def checked_loss(job: Job, loss: Any) -> Tensor:
    """Return the loss of a training batch as a scalar. Raises JobError unless it is one number with a gradient."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        allowed = "a tensor of one number, the mean over the batch"
        raise JobError(f"{_named(job, 'training_loss', 'loss')} returned {_described(loss)}; allowed: {allowed}")
    if not loss.requires_grad:
        raise JobError(
            f"{_named(job, 'training_loss', 'loss')} returned {_described(loss)} without a gradient; it must be "
            "computed from the outputs of the model, without detach(), no_grad() or item()"
        )
    return loss if loss.ndim == 0 else loss.reshape(())


def checked_metrics(job: Job, metrics: Any, of: str = "evaluation_metrics") -> Mapping[str, Any]:
    """Return `metrics`, which the method `of` returned. Raises JobError unless it maps names to numbers."""
    method = _named(job, of, "metrics" if of == "evaluation_metrics" else of)
    allowed = 'one number for each name, such as {"mse": 0.1}'
    if not isinstance(metrics, Mapping):
        raise JobError(f"{method} returned {_described(metrics)}; allowed: a dict with {allowed}")
    for name, value in metrics.items():
        if not isinstance(name, str):
            raise JobError(f"{method} returned a dict with the key {name!r:.60}; allowed: names (strings)")
        if not _is_number(value):
            raise JobError(f"{method} returned {_described(value)} for {name!r}; allowed: {allowed}")
    return metrics


def checked_values(kind: str, name: str, values: Any) -> Tensor:
    """Return what the job logs as a tensor on the CPU. kind: "image" or "histogram". Raises JobError if it has a shape
    that can't be shown."""
    try:
        tensor = torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise JobError(f"log_{kind}({name!r}): {_described(values)} can't be converted to a tensor") from error
    shape = tuple(tensor.shape)
    if kind == "image" and (tensor.ndim != 3 or shape[0] not in (1, 3)):
        raise JobError(f"log_image({name!r}): the shape is {shape}; allowed: (1 or 3, height, width)")
    if not tensor.numel() or tensor.is_complex():
        raise JobError(f"log_{kind}({name!r}): {_described(tensor)}; allowed: one real number or more")
    return tensor


def _named(job: Job, method: str, part: str) -> str:
    """Return the name of the user's method: `method` if the job overrides it, else `part`, which `method` calls."""
    written = part if getattr(type(job), method) is getattr(Job, method) else method
    return f"{type(job).__name__}.{written}()"


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    if isinstance(value, np.ndarray | np.generic):
        return value.size == 1 and value.dtype.kind in "biuf"
    return isinstance(value, Real)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} ({value.dtype})"
    kind = type(value).__name__
    shown = f", {value!r:.60}" if isinstance(value, Real | str) else ""
    return "None" if value is None else f"a value of type {kind}{shown}"
