"""What a worker trains next, and under which profile."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from orchestrator.records import Entry, Evidence, Metric, Profile


def choose_claim(entries: Sequence[Entry], founders_in_progress: int, num_models: int, metric: Metric) -> Entry | None:
    """The entry to train a child of; None: a founder, with initial weights.

    A founder comes first while a slot is free that no other founder is about to fill, or while the board is empty.
    Then comes the entry that was least worked on (work in progress counts), then the better score, then the older.
    """
    if not entries or len(entries) + founders_in_progress < num_models:
        return None
    return min(entries, key=lambda e: (e.worked_on + e.in_progress, -metric.key(e.score), e.entry_id))


def next_profile(start: int, consumed: Collection[int], leased: Collection[int]) -> int:
    """The smallest position from `start` that is neither consumed nor leased.

    Positions never wrap; `profile_at` maps them to the cycle. The position of an expired claim is in neither set, so
    the next claim takes it.
    """
    position = start
    while position in consumed or position in leased:
        position += 1
    return position


def advance_floor(floor: int, consumed: Collection[int]) -> int:
    """The first position from `floor` that is not consumed."""
    return next_profile(floor, consumed, ())


def child_start(position: int) -> int:
    """A promoted child starts after the position that made it. A founder starts at 0, which its own chunk consumes."""
    return position + 1


def profile_at(position: int, cycle: Sequence[Profile]) -> Profile:
    return cycle[position % len(cycle)]


def repeat_number(entry: Entry, position: int, cycle: Sequence[Profile]) -> int:
    """How many earlier positions of this entry had the same profile.

    0 goes on with the parent's random state, so that chunked training equals uninterrupted training. A repeat needs
    new random numbers: with the same ones it would train the same child again.
    """
    start = entry.start_position + (1 if entry.founder else 0)
    profile = profile_at(position, cycle)
    rounds, remaining = divmod(position - start, len(cycle))
    per_round = sum(p == profile for p in cycle)
    return rounds * per_round + sum(profile_at(start + i, cycle) == profile for i in range(remaining))


def expired(now: float, lease_until: float, evidence: Evidence) -> bool:
    """May a claim be taken from its worker? If its job is proved gone, or after its lease, which ends with the hard
    time limit of its job. A worker that is alive after all can't write: its generation is stale."""
    return evidence is Evidence.GONE or now > lease_until
