"""Measure a model on a split: means over its examples, or the job's own metrics of the whole split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from jobs.data import randomness
from jobs.data.batches import map_tensors
from jobs.data.feeds import Feed
from jobs.data.randomness import hash_seed
from jobs.errors import JobError
from jobs.job import Job
from jobs.training.checked import checked_metrics
from jobs.training.ranks import ALONE, Alone
from orchestrator.profile import Metric

Autocast = Callable[[], AbstractContextManager[Any]]
Arrange = Callable[[Any], Any]
RANDOM_NUMBERS = 2  # hashed with the run's seed: the random numbers that an evaluation may draw


class Means:
    """Means over the examples of several batches, from each batch's mean. A metric that a batch lacks is the mean over
    the examples of the other batches.

    Sums are in float64 on the device. A batch's mean of a count (such as accuracy) times its number of examples is a
    whole number up to rounding, and is rounded to it: so the mean does not depend on how examples fall into batches.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: Mapping[str, Any], size: int) -> None:
        for name, value in metrics.items():
            sum_ = total_of(value, size, self._device)
            self._sums[name] = self._sums[name] + sum_ if name in self._sums else sum_
            self._counts[name] = self._counts.get(name, 0) + size

    def means(self, group: Alone) -> dict[str, float]:
        """Return the means over the batches of all ranks."""
        sums = group.total({name: value.item() for name, value in self._sums.items()})
        counts = group.total({name: float(count) for name, count in self._counts.items()})
        return {name: value / counts[name] if counts[name] else math.nan for name, value in sums.items()}


def total_of(mean: Any, size: int, device: torch.device) -> Tensor:
    """Return a batch's sum of a metric, given its mean: a scalar, float64."""
    precise = not isinstance(mean, Tensor) or mean.dtype in (torch.float32, torch.float64)
    total = torch.as_tensor(mean, dtype=torch.float64, device=device).reshape(()) * size
    if not precise:  # the error of half precision is so large that any number could be a whole one
        return total
    error = total.abs() * torch.finfo(torch.float32).eps  # a Python float may have been a float32
    whole = total.round()
    return torch.where((total - whole).abs() <= error, whole, total)


class Evaluator:
    """Evaluates the models of one job."""

    def __init__(self, job: Job, metric: Metric, group: Alone = ALONE) -> None:
        self._job = job
        self._metric = metric
        self._group = group

    def evaluate(
        self, model: nn.Module, running: nn.Module, feed: Feed, autocast: Autocast, arranged: Arrange
    ) -> dict[str, float]:
        """Return a model's metrics on a feed. Changes neither the random state nor the model's mode.

        model, running: see Predictor.evaluated. autocast: makes the context in which to compute. arranged: converts a
        batch to the model's memory layout. Raises JobError if the metric chosen in the settings is not among them.
        """
        job, training = self._job, [part for part in model.modules() if part.training]
        running.eval()
        model.eval()
        self._group.align(model)
        gradients = job.evaluation_gradients
        with randomness.all_random_state_kept(), torch.enable_grad() if gradients else torch.inference_mode():
            randomness.seed_all(hash_seed(job.context.settings.seed, RANDOM_NUMBERS))
            if type(job).evaluate is not Job.evaluate:
                metrics = self._of_whole(running, feed, autocast, arranged)
            else:
                metrics = self._means(running, feed, autocast, arranged)
        if gradients:
            model.zero_grad(set_to_none=True)
        for part in training:
            part.training = True
        running.training = running.training or model.training
        if self._metric.name not in metrics:
            known = ", ".join(sorted(metrics)) or "none"
            raise JobError(f"metric.name: {self._metric.name!r} is not among the metrics of the job: {known}")
        return metrics

    def _means(self, running: nn.Module, feed: Feed, autocast: Autocast, arranged: Arrange) -> dict[str, float]:
        means = Means(self._job.context.device)
        for batch in feed.in_order(self._group.rank, self._group.count):
            with autocast():
                metrics = checked_metrics(self._job, self._job.evaluation_metrics(running, arranged(batch)))
            means.add(_detached(metrics), self._job.batch_size(batch))
        return means.means(self._group)

    def _of_whole(self, running: nn.Module, feed: Feed, autocast: Autocast, arranged: Arrange) -> dict[str, float]:
        def batches() -> Iterator[Any]:
            whole = feed.in_order()
            while True:
                with torch.autocast(self._job.context.device.type, enabled=False):  # augmentation stays precise
                    batch = next(whole, None)
                if batch is None:
                    return
                yield arranged(batch)

        with autocast():
            found = checked_metrics(self._job, self._job.evaluate(running, batches()), "evaluate")
        own = {name: float(value) for name, value in _detached(found).items()}
        return self._group.total(own if self._group.rank == 0 else {})


def _detached(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    detached: Mapping[str, Any] = map_tensors(dict(metrics), lambda tensor: tensor.detach())
    return detached


def undefined(metrics: Mapping[str, float]) -> list[str]:
    """Return the names of the metrics that are NaN."""
    return [name for name, value in metrics.items() if math.isnan(value)]
