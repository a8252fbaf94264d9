"""The interface through which a session reports its training. `Recorder` forwards the reports to loggers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from orchestrator.records import EpochResult, Work


class Observer:
    """Ignores all reports. The methods are called in this order, on rank 0 only. They must not affect the training."""

    def chunk(self, work: Work) -> None:
        """A chunk starts, or (work.suspended) continues where it was interrupted."""

    def step(self, step: int, loss: Tensor, learning_rate: float) -> None:
        """An optimizer step is done.

        step: counted from 1 over the whole lineage. loss: mean over the batch, a scalar on the device; reading its
        value here would make the training wait for the GPU. learning_rate: the first parameter group's, in this step.
        """

    def metrics(self, metrics: Mapping[str, float]) -> None:
        """The model was validated within an epoch, after the last step."""

    def show(self, kind: str, name: str, values: Tensor) -> None:
        """The job shows something. kind: "image" or "histogram". values: on the CPU."""

    def epoch(self, result: EpochResult) -> None:
        """An epoch was trained and, if one was due, validated."""

    def judged(self, promoted: bool) -> None:
        """The chunk is finished. promoted: whether its model was admitted to the board."""

    def close(self) -> None:
        """Write all remaining data: the process is about to end."""


class Held(Observer):
    """Keeps the reports of a chunk that may be thrown away."""

    def __init__(self) -> None:
        self._reports: list[Callable[[Observer], None]] = []

    def step(self, step: int, loss: Tensor, learning_rate: float) -> None:
        self._reports.append(lambda observer: observer.step(step, loss, learning_rate))

    def metrics(self, metrics: Mapping[str, float]) -> None:
        self._reports.append(lambda observer: observer.metrics(metrics))

    def show(self, kind: str, name: str, values: Tensor) -> None:
        self._reports.append(lambda observer: observer.show(kind, name, values))

    def epoch(self, result: EpochResult) -> None:
        self._reports.append(lambda observer: observer.epoch(result))

    def release(self, observer: Observer, work: Work) -> None:
        """Pass the reports on. work: the chunk as it was claimed."""
        observer.chunk(work)
        for report in self._reports:
            report(observer)
