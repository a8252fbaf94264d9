"""A model of the board made of plain sets and dicts, for comparison with the database."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from orchestrator.records import ChainJob, Claim

LIVE, SUSPENDED = "live", "suspended"
EVENTS = {  # each of these must happen in at least one example
    *("link begun", "job requeued", "job ended", "running lost", "waiting lost", "both lost"),
    *("stale job refused", "claim taken", "suspended claim taken", "resumed by its worker"),
    *("resumed by another worker", "founder claimed", "child claimed", "position taken again"),
    *("position past the cycle", "child promoted", "promoted", "discarded", "entry evicted", "suspended"),
    *("given back", "suspended chunk given back", "failed", "failed with a kept state", "failed after it was resumed"),
    *("position given up", "founder given up", "entry condemned", "zombie refused", "second result refused"),
    *("work on an entry that lost its place", "job back in the queue", "claimed again"),
}


@dataclass
class ModelEntry:
    """A model that was admitted to the board, identified by its file name."""

    file: str
    score: float
    start: int
    founder: bool
    consumed: set[int] = field(default_factory=set)
    failures: Counter[int] = field(default_factory=Counter)
    on_board: bool = True


@dataclass
class ModelChunk:
    """A chunk: a position claimed on an entry (None: a founder), and its state."""

    entry: ModelEntry | None
    position: int
    state: str
    claim: Claim  # the latest claim on this chunk
    job_id: int
    lease_until: float
    suspended_file: str | None = None
    failures: int = 0

    @property
    def held(self) -> bool:
        return self.state in (LIVE, SUSPENDED)


@dataclass
class ModelWorker:
    """A chain: its running job, its waiting job, and all its earlier jobs."""

    waiting: ChainJob | None
    running: ChainJob | None = None
    past: list[ChainJob] = field(default_factory=list)
