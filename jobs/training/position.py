"""Where a chunk is: the position in its current epoch, the sum of the epoch's losses, and the random state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from jobs.data.randomness import hash_seed, seed_all, set_random_state
from orchestrator.records import Work


class LossMean:
    """The mean loss of an epoch's examples, summed on the device in float64."""

    def __init__(self, total: float, count: float, skips: bool, device: torch.device) -> None:
        """skips: leave out steps whose loss is not finite, because the optimizer skipped them too (fp16)."""
        self._total = torch.tensor(total, dtype=torch.float64, device=device)
        self._count = torch.tensor(count, dtype=torch.float64, device=device) if skips else count
        self._skips = skips

    def add(self, loss: Tensor, size: int) -> None:
        if not self._skips:
            self._total.add_(loss, alpha=size)
            self._count += size
            return
        finite = torch.isfinite(loss)
        self._total.add_(torch.where(finite, loss, 0), alpha=size)
        self._count += finite * size

    def totals(self) -> tuple[float, float]:
        return self._total.item(), float(self._count)

    def mean(self) -> float:
        """Return the mean; NaN if no step had a finite loss."""
        total, count = self.totals()
        return total / count if count else math.nan


def order_seed(epoch: int) -> int:
    """Draw the seed of an epoch's order. epoch: its number in the lineage, so that epochs differ in their order even if
    the job's code seeds the generators."""
    return hash_seed(int(torch.randint(2**62, ()).item()), epoch)


def resume_random_state(state: Mapping[str, Any], work: Work) -> dict[str, Any]:
    """Set the random state with which the chunk starts or continues. If work.repeat is not 0, a chunk that starts gets
    new random numbers instead of the parent's. Returns the position in the current epoch."""
    if work.suspended:
        set_random_state(state["cut"]["rng"])
        cut: dict[str, Any] = fresh_cut() | state["cut"]
        return cut
    set_random_state(state["rng"])
    if work.repeat:
        seed_all(hash_seed(int(torch.randint(2**62, ()).item()), work.repeat))
    return fresh_cut()


def fresh_cut() -> dict[str, Any]:
    """Return the position of a chunk that has not started."""
    return {"seed": None, "step": 0, "loss_sum": 0.0, "loss_count": 0.0, "seconds": 0.0, "results": [], "rng": None}
