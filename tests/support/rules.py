"""Entries, cycles and workers for the tests of the rules."""

from __future__ import annotations

import math

from hypothesis import settings
from hypothesis import strategies as st

from orchestrator.profile import Metric, Profile
from orchestrator.records import Entry, Worker

ACCURACY = Metric("accuracy", "max")
LOSS = Metric("loss", "min")
NAN, INF = math.nan, math.inf

PROPERTY = settings(derandomize=True, deadline=None, max_examples=200)


def entry(entry_id: int, score: float = 0.5, **more: int) -> Entry:
    return Entry(
        entry_id, checkpoint_id=entry_id, score=score, **({"start_position": 0, "floor": 0, "worked_on": 0} | more)
    )


def cycle(names: str) -> list[Profile]:
    """Make a cycle with a letter for each position: "aab" has three positions and two profiles."""
    return [Profile(name, learning_rate=0.1, momentum=0.9, weight_decay=0.0) for name in names]


metrics = st.sampled_from([ACCURACY, LOSS])
# A few fixed values make ties common; arbitrary floats include NaN and infinities.
scores = st.sampled_from([0.1, 0.2, 0.3]) | st.floats()
finite_scores = st.sampled_from([0.1, 0.2, 0.3]) | st.floats(-1e9, 1e9)
positions = st.integers(0, 30)


@st.composite
def boards(draw: st.DrawFn, min_size: int = 0) -> list[Entry]:
    ids = draw(st.lists(st.integers(1, 50), min_size=min_size, max_size=6, unique=True))
    counts = st.integers(0, 3)
    return [entry(i, draw(finite_scores), worked_on=draw(counts), in_progress=draw(counts)) for i in ids]


def worker(worker_id: int = 0, failures: int = 0, stopped: str | None = None) -> Worker:
    return Worker(worker_id, device=None, failures=failures, stopped=stopped)
