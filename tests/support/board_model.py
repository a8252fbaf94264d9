"""A model of the board, of plain sets and dicts, to compare the database with."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from orchestrator.records import ChainJob, Claim

LIVE, SUSPENDED = "live", "suspended"
EVENTS = {  # what must happen in some example
    *("link begun", "job requeued", "job ended", "running lost", "waiting lost", "both lost"),
    *("stale job refused", "claim taken", "suspended claim taken", "resumed by its worker"),
    *("resumed by another worker", "founder claimed", "child claimed", "position taken again"),
    *("position past the cycle", "child promoted", "promoted", "discarded", "entry evicted", "suspended"),
    *("given back", "failed", "position given up", "entry condemned", "zombie refused", "second result refused"),
    *("work on an entry that lost its place", "job back in the queue", "claimed again"),
}


@dataclass
class ModelEntry:
    """A model that was admitted, by the name of its file."""

    file: str
    score: float
    start: int
    founder: bool
    consumed: set[int] = field(default_factory=set)
    failures: Counter[int] = field(default_factory=Counter)
    on_board: bool = True


@dataclass
class ModelChunk:
    """A claim on a position of an entry (None: a founder), and what has become of it."""

    entry: ModelEntry | None
    position: int
    state: str
    claim: Claim  # the last one
    job_id: int
    lease_until: float
    suspended_file: str | None = None

    @property
    def held(self) -> bool:
        return self.state in (LIVE, SUSPENDED)


@dataclass
class ModelWorker:
    """A chain: the job that works, the one that waits, and all that ever were."""

    waiting: ChainJob | None
    running: ChainJob | None = None
    past: list[ChainJob] = field(default_factory=list)
