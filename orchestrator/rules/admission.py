"""The ratchet: decides which candidates enter the leaderboard."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orchestrator.profile import Metric
from orchestrator.records import Entry


@dataclass(frozen=True, slots=True)
class Promote:
    """The candidate enters. evicted: the entry that it replaces; None: it fills a free slot."""

    evicted: Entry | None


@dataclass(frozen=True, slots=True)
class Discard:
    """The candidate does not enter."""

    reason: str


def worst(entries: Iterable[Entry], metric: Metric) -> Entry | None:
    """Return the entry to replace: the one with the worst score. If several have this score, return the one with the
    most finished chunks; among those, the newest."""
    return min(entries, key=lambda e: (metric.key(e.score), -e.worked_on, -e.entry_id), default=None)


def ratchet(score: float | None, entries: Sequence[Entry], num_models: int, metric: Metric) -> Promote | Discard:
    """Promote a finite score if a slot is free or the score is strictly better than the worst; else discard it."""
    if score is None or not math.isfinite(score):
        return Discard(f"{metric.name} is not finite")
    if len(entries) < num_models:
        return Promote(evicted=None)
    last = worst(entries, metric)
    assert last is not None, "num_models is at least 1"
    if metric.better(score, than=last.score):
        return Promote(evicted=last)
    return Discard(f"{metric.name} {score:.6g} is not better than the worst on the board, {last.score:.6g}")


def bar(entries: Sequence[Entry], num_models: int, metric: Metric) -> float | None:
    """Return the score that a candidate has to beat; None while a slot is free."""
    last = worst(entries, metric)
    return None if last is None or len(entries) < num_models else last.score
