"""Who looks on while a chunk is trained: loggers."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from orchestrator.records import EpochResult, Work


class Observer(Protocol):
    """Told what happens, in this order, in the process that leads (rank 0). It changes nothing of the training."""

    def chunk(self, work: Work) -> None:
        """A chunk begins, or (work.suspended) goes on where it was interrupted."""

    def step(self, step: int, loss: Tensor, learning_rate: float) -> None:
        """An optimizer step is done. step: of the lineage, counted from 1. loss: the batch's mean, a scalar on the
        device: to read its value now would make the GPU wait. learning_rate: of the first parameter group, as used."""

    def epoch(self, result: EpochResult) -> None:
        """An epoch was trained and validated."""

    def judged(self, promoted: bool) -> None:
        """The chunk was finished, and its model enters the board or is dropped."""

    def close(self) -> None:
        """The process ends: write what is left."""


class Unobserved:
    """Nobody looks on."""

    def chunk(self, work: Work) -> None: ...

    def step(self, step: int, loss: Tensor, learning_rate: float) -> None: ...

    def epoch(self, result: EpochResult) -> None: ...

    def judged(self, promoted: bool) -> None: ...

    def close(self) -> None: ...
