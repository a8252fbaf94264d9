"""Decide what a worker trains next, and under which profile."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from orchestrator.profile import Metric, Profile
from orchestrator.records import Claim, Entry


def choose_claim(entries: Sequence[Entry], founders_in_progress: int, num_models: int, metric: Metric) -> Entry | None:
    """Return the entry to train next, or None to train a founder from initial weights.

    A founder is trained while the board is empty, or while there are more free slots than founders in progress.
    Otherwise return the entry with the fewest chunks (finished or in progress). A tie goes to the entry with the best
    score, then to the oldest.
    """
    if not entries or len(entries) + founders_in_progress < num_models:
        return None
    return min(entries, key=lambda e: (e.worked_on + e.in_progress, -metric.key(e.score), e.entry_id))


def next_profile(start: int, consumed: Collection[int], leased: Collection[int]) -> int:
    """Return the smallest position >= start that is neither consumed nor leased.

    Positions count up without end; `profile_at` maps them to the cycle. The position of an expired claim is in neither
    set, so the next claim takes that position.
    """
    position = start
    while position in consumed or position in leased:
        position += 1
    return position


def advance_floor(floor: int, consumed: Collection[int]) -> int:
    """Return the smallest position >= floor that is not consumed."""
    return next_profile(floor, consumed, ())


def child_start(position: int) -> int:
    """Return the first position of a new entry promoted from a chunk at `position`. (A founder's entry starts at 0.)"""
    return position + 1


def profile_at(position: int, cycle: Sequence[Profile]) -> Profile:
    return cycle[position % len(cycle)]


def repeat_number(entry: Entry, position: int, cycle: Sequence[Profile]) -> int:
    """Return how many earlier positions of this entry had the same profile.

    The first use (0) continues the parent's random state, so that chunked training equals uninterrupted training. A
    repeat needs new random numbers: with the parent's random state it would train the same child again.
    """
    start = entry.start_position + (1 if entry.founder else 0)
    profile = profile_at(position, cycle)
    rounds, remaining = divmod(position - start, len(cycle))
    per_round = sum(p == profile for p in cycle)
    return rounds * per_round + sum(profile_at(start + i, cycle) == profile for i in range(remaining))


def same_work(foreseen: Claim, claimed: Claim) -> bool:
    """Whether a chunk that was begun for the foreseen claim is exactly the chunk that was claimed later.

    The claims may differ in what training does not depend on: generation, the score to beat, the parent's checksum. The
    seed of a founder depends on its chunk_id.
    """
    unseeded = claimed.parent_file is not None or foreseen.chunk_id == claimed.chunk_id
    names = ("position", "profile", "repeat", "parent_file", "parent_epochs", "settings_version", "suspended_file")
    return unseeded and all(getattr(foreseen, name) == getattr(claimed, name) for name in names)


def expired(now: float, lease_until: float) -> bool:
    """Has the lease ended? It ends at the hard time limit of the claim's job. If the worker is still alive, its writes
    are refused, because its generation is stale."""
    return now > lease_until
