"""The long form of a job: a user's own loop, what it is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from orchestrator.records import Profile

if TYPE_CHECKING:
    from jobs.data import Feed
    from jobs.job import Split


@dataclass(frozen=True)
class ChunkContext:
    """One chunk to train. Random states (python's, numpy's, torch's, the GPUs') are set before and kept after it."""

    profile: Profile
    epochs: int  # to train now; of a chunk that was interrupted, those that had not been reported
    seed: int  # of a founder's initial weights; torch is seeded with it already
    repeat: int  # how many children the parent has had under this profile; torch is seeded anew for each
    device: torch.device
    settings: Mapping[str, Any]
    state: Mapping[str, Any] | None  # what the parent's chunk, or the interrupted one, returned; None: a founder
    resumed: bool  # the state is that of this very chunk, which was interrupted
    should_stop: Callable[[], bool]  # ask before each step; True: return ChunkInterrupted soon (in seconds)
    report: Callable[[Mapping[str, float]], None]  # after each epoch: its metrics, the settings' metric among them
    feed: Callable[[Split], Feed]  # batches of the job's data on the device: .shuffled(seed) to train, else .in_order()
    rank: int = 0  # of this process, where a worker has several (gpus_per_worker); torch.distributed is set up
    ranks: int = 1


@dataclass(frozen=True)
class ChunkResult:
    """All epochs of the chunk were trained and reported.

    state: everything that is needed to go on, in what torch.load(weights_only=True) takes: tensors, numbers, strings,
    dicts, lists, tuples. `orch evaluate` and `orch export` look for the model's state_dict under "model".
    """

    state: Mapping[str, Any]


@dataclass(frozen=True)
class ChunkInterrupted:
    """The loop was told to stop; from this state it goes on, in another process."""

    state: Mapping[str, Any]
    steps: int = 0  # of the epoch that was cut
