"""What a worker trains next, and under which profile."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from orchestrator.records import Entry, Evidence, FoundAnew, Metric, Profile, WorkOn


def choose_claim(
    entries: Sequence[Entry], founders_in_progress: int, num_models: int, metric: Metric
) -> WorkOn | FoundAnew:
    """What to train next: a founder for a free slot that nobody is filling, else the entry that was least
    worked on (work in progress counts), then the better score, then the older.

    With no entry at all there is nothing to work on but another founder.
    """
    if not entries or len(entries) + founders_in_progress < num_models:
        return FoundAnew()
    chosen = min(entries, key=lambda e: (e.worked_on + e.in_progress, -metric.key(e.score), e.entry_id))
    return WorkOn(chosen)


def next_profile(start: int, consumed: Collection[int], leased: Collection[int]) -> int:
    """The smallest position from `start` that is neither consumed nor leased.

    Positions count on for ever; only what they mean wraps round (`profile_at`). A position whose claim
    expired is in neither set, and so is the next one taken.
    """
    position = start
    while position in consumed or position in leased:
        position += 1
    return position


def advance_floor(floor: int, consumed: Collection[int]) -> int:
    """The first position from `floor` that is not consumed."""
    return next_profile(floor, consumed, ())


def child_start(position: int) -> int:
    """A promoted child starts after the position that made it. A founder's line starts at 0, and the chunk
    that trains the founder itself is the first of it."""
    return position + 1


def profile_at(position: int, cycle: Sequence[Profile]) -> Profile:
    return cycle[position % len(cycle)]


def repeat_number(entry: Entry, position: int, cycle: Sequence[Profile]) -> int:
    """How many earlier positions that were tried from this entry had the same profile.

    0 goes on with the parent's random state, so that chunked training is the uninterrupted training. A
    repeat must draw anew: from the same parent with the same profile and the same random numbers it would
    train the same child again.
    """
    start = entry.start_position + (1 if entry.founder else 0)
    profile = profile_at(position, cycle)
    whole, rest = divmod(position - start, len(cycle))
    each_round = sum(p == profile for p in cycle)
    return whole * each_round + sum(profile_at(start + i, cycle) == profile for i in range(rest))


def expired(now: float, lease_until: float, evidence: Evidence) -> bool:
    """May a claim be taken from its worker? On evidence that its job is gone, or past the end of its lease,
    which is the hard end of its job. The generation keeps a worker that lives on from writing."""
    return evidence is Evidence.GONE or now > lease_until
