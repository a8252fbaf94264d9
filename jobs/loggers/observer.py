"""What is told about the training of a chunk while it runs: loggers derive from it."""

from __future__ import annotations

from torch import Tensor

from orchestrator.records import EpochResult, Work


class Observer:
    """Ignores everything. Its methods are called in this order, in the process of rank 0; none changes the training."""

    def chunk(self, work: Work) -> None:
        """A chunk begins, or (work.suspended) continues where it was interrupted."""

    def step(self, step: int, loss: Tensor, learning_rate: float) -> None:
        """An optimizer step is done.

        step: counted from 1 over the whole lineage. loss: the batch's mean, a scalar on the device; reading its value
        here would make the training wait for the GPU. learning_rate: of the first parameter group, as used.
        """

    def epoch(self, result: EpochResult) -> None:
        """An epoch was trained and validated."""

    def judged(self, promoted: bool) -> None:
        """The chunk was finished, and its model was admitted to the board or not."""

    def close(self) -> None:
        """The process ends: write what is left."""
