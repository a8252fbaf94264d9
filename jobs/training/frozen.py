"""Frozen layers at the start of a model: compute their outputs once for each example, not again in every epoch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from jobs.data import randomness
from jobs.data.batches import contents_digest
from jobs.data.feeds import Bounds, Epoch, Feed, resident_bytes
from jobs.data.splits import Split
from jobs.errors import JobError
from jobs.job import Job
from jobs.training.precision import Speed

log = logging.getLogger("orch")


class FrozenParts:
    """Computes the outputs of a job's `frozen_part` for all examples of a split, and keeps them on the device. They are
    recomputed when the part's weights change, for example because a founder has different frozen weights."""

    def __init__(self, job: Job, speed: Speed) -> None:
        self._job, self._speed = job, speed
        self._outputs: dict[str, tuple[str, _Outputs]] = {}  # by split: the weights' hash, the outputs
        self._hashed: tuple[Any, str] = (None, "")  # the weights hashed last (their identity and versions); their hash

    def feed(self, model: nn.Module, split: Split, feed: Feed, arranged: Callable[[Any], Any]) -> Feed:
        """Return the batches to call this model with until the next call of this method: either the feed's own batches,
        or pairs (outputs of the frozen part, targets). For such pairs, the part is changed to return its input.
        arranged: converts a batch to the model's memory layout. Raises JobError if the part is trained, is random, uses
        batch statistics or is not the first thing that the model does, or if the training examples are augmented."""
        part = self._job.frozen_part(model)
        if part is None:
            return feed
        _bypass(part, False)
        if not self._allows(split):
            return feed
        _check(part, model)
        if split == "train" and feed.augmented:
            raise JobError("frozen_part: the training images are augmented, so its outputs differ from epoch to epoch")
        key = self._hash(part)
        if split not in self._outputs or self._outputs[split][0] != key:
            self._outputs.pop(split, None)  # free the memory before computing the new outputs
            outputs = self._compute(model, part, feed, arranged)
            if outputs is None:
                return feed
            self._outputs[split] = (key, outputs)
        _bypass(part, True)
        kept = self._outputs[split][1]
        kept.like(feed)
        return feed.instead(kept)

    def undo(self, model: nn.Module) -> None:
        """Make the frozen part of a model compute its output again."""
        part = self._job.frozen_part(model)
        if part is not None:
            _bypass(part, False)

    def _allows(self, split: Split) -> bool:
        """Return whether inputs reach the model unchanged. A method overridden by the job might change them first."""
        names = ["training_loss"] if split == "train" else ["predict", "evaluation_metrics"]
        return all(getattr(type(self._job), name) is getattr(Job, name) for name in names)

    def _hash(self, part: nn.Module) -> str:
        tensors = [*part.parameters(), *part.buffers()]
        state = (part, [(id(t), t._version) for t in tensors])  # _version counts in-place changes
        if self._hashed[0] != state:
            self._hashed = (state, contents_digest(tensors))
        return self._hashed[1]

    @torch.no_grad()
    def _compute(
        self, model: nn.Module, part: nn.Module, feed: Feed, arranged: Callable[[Any], Any]
    ) -> _Outputs | None:
        """Compute the part's outputs for all examples. If they would need too much memory, logs it and returns None."""
        kept: _Outputs | None = None
        for batch in feed.in_order():
            inputs, targets = arranged(_pair(batch))
            with self._speed.autocast():
                outputs = part(inputs)
                if kept is None:
                    _compare(model, part, inputs, outputs)
            if kept is None:
                size = outputs[0].numel() * outputs.element_size() * feed.count
                if size > resident_bytes(self._speed.device):
                    log.info("the frozen layers' outputs are not kept: they would take %.1f GB", size / 1e9)
                    return None
                kept = _Outputs(outputs, targets, feed, self._speed.device)
            kept.add(outputs, targets)
        return kept


class _Outputs(Feed):
    """A feed of a frozen part's outputs and their targets, kept on the device. The outputs keep their memory layout,
    because a later dropout layer generates its random mask in memory order."""

    def __init__(self, outputs: Tensor, targets: Tensor, feed: Feed, device: torch.device) -> None:
        """Allocate memory for all examples of `feed`. outputs, targets: those of its first batch, for their shapes."""
        super().__init__(feed.batch_size, feed.count)
        self._device = device
        self._order = [0, *sorted(range(1, outputs.ndim), key=outputs.stride, reverse=True)]  # in memory order
        self._outputs = outputs.new_empty(feed.count, *outputs.permute(self._order).shape[1:])
        self._targets = targets.new_empty(feed.count, *targets.shape[1:])
        self._filled = 0

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        end = self._filled + len(targets)
        self._outputs[self._filled : end] = outputs.permute(self._order)
        self._targets[self._filled : end] = targets
        self._filled = end

    def _fetch(self, order: Tensor, epoch: Epoch, batches: Sequence[Bounds]) -> Iterator[Any]:
        back = [self._order.index(dimension) for dimension in range(len(self._order))]
        order = order.to(self._device)
        for _, first, end in batches:
            chosen = order[first:end]
            yield self._outputs.index_select(0, chosen).permute(back), self._targets[chosen]


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, list | tuple) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
        return batch[0], batch[1]
    raise JobError("frozen_part: batches must be (inputs, targets), two tensors")


def _check(part: nn.Module, model: nn.Module) -> None:
    """Raise JobError if the part might return different outputs for the same example."""
    trained = [name for name, parameter in part.named_parameters() if parameter.requires_grad]
    if trained:
        raise JobError(f"frozen_part: {', '.join(trained[:5])} are trained; call requires_grad_(False) on the part")
    was = model.training
    model.train()
    for name, layer in part.named_modules():
        if layer.training and isinstance(layer, _DropoutNd) and layer.p > 0:
            raise JobError(f"frozen_part: {name} is a dropout layer, whose output is random; leave it out of the part")
        if layer.training and isinstance(layer, _NormBase):
            raise JobError(f"frozen_part: {name} uses batch statistics in training; keep it in eval mode")
    model.train(was)


def _compare(model: nn.Module, part: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
    """Check on one batch that the model returns the same result if the part is bypassed. Raises JobError if not."""
    was = model.training
    model.eval()
    with randomness.random_state_kept():
        expected = model(inputs)
        _bypass(part, True)
        bypassed = model(outputs)
        _bypass(part, False)
    model.train(was)
    if not isinstance(expected, Tensor) or not torch.allclose(bypassed, expected, rtol=1e-2, atol=1e-3):
        raise JobError("frozen_part: bypassing it changes the result; the part must be the first thing the model does")


def _bypass(part: nn.Module, on: bool) -> None:
    """Make a part return its input, or undo this. If the part is a Sequential, change its layers instead: the part may
    be a slice, which is a new Sequential that shares its layers with the model."""
    for layer in part if isinstance(part, nn.Sequential) else [part]:
        if on:
            layer.forward = lambda inputs: inputs  # hides the class's forward
        else:
            layer.__dict__.pop("forward", None)
