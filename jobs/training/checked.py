"""What a job's own methods have returned, looked at before torch meets it. No value is read: a GPU would have to be
waited for."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset

from jobs.errors import JobError
from jobs.job import Job


def checked_data(job: Job, data: Any, split: str) -> Dataset[Any]:
    """What `data` gave for a split. Raises JobError for what examples can't be chosen from by their index."""
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        allowed = "a torch Dataset with a length, whose examples have an index"
        raise JobError(f"{type(job).__name__}.data({split!r}) returned {_said(data)}; allowed is {allowed}")
    return data  # type: ignore[no-any-return]


def checked_model(job: Job, model: Any) -> nn.Module:
    """What `model` gave. Raises JobError."""
    if not isinstance(model, nn.Module):
        raise JobError(f"{type(job).__name__}.model() returned {_said(model)}; allowed is a torch.nn.Module")
    return model


def checked_loss(job: Job, loss: Any) -> Tensor:
    """The loss of a batch of training, as a scalar. Raises JobError for what can't be trained by."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        allowed = "a tensor of one number, the mean over the batch"
        raise JobError(f"{_named(job, 'training_loss', 'loss')} returned {_said(loss)}; allowed is {allowed}")
    if not loss.requires_grad:
        raise JobError(
            f"{_named(job, 'training_loss', 'loss')} returned {_said(loss)} that no gradient flows from; it must be "
            "computed from the outputs of the model, without detach(), no_grad() or item() on the way"
        )
    return loss if loss.ndim == 0 else loss.reshape(())


def checked_metrics(job: Job, metrics: Any) -> Mapping[str, Any]:
    """The metrics of a batch of evaluation. Raises JobError unless they are numbers by name."""
    method, allowed = _named(job, "evaluation_metrics", "metrics"), 'one number for each name, such as {"mse": 0.1}'
    if not isinstance(metrics, Mapping):
        raise JobError(f"{method} returned {_said(metrics)}; allowed is a dict with {allowed}")
    for name, value in metrics.items():
        if not isinstance(name, str):
            raise JobError(f"{method} returned a dict with the key {name!r:.60}; allowed are names, which are strings")
        if not _is_number(value):
            raise JobError(f"{method} returned {_said(value)} for {name!r}; allowed is {allowed}")
    return metrics


def _named(job: Job, method: str, part: str) -> str:
    """The method that is the user's own: the part, if they left the method as it is, which calls it."""
    theirs = part if getattr(type(job), method) is getattr(Job, method) else method
    return f"{type(job).__name__}.{theirs}()"


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    if isinstance(value, np.ndarray | np.generic):
        return value.size == 1 and value.dtype.kind in "biuf"
    return isinstance(value, Real)


def _said(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} ({value.dtype})"
    kind = type(value).__name__
    shown = f", {value!r:.60}" if isinstance(value, Real | str) else ""
    return "None" if value is None else f"a value of type {kind}{shown}"
