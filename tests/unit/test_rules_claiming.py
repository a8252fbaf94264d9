"""What a worker trains next: first tables of inputs and results, then properties that hold for any input."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.records import Entry
from orchestrator.rules import claiming
from tests.support.rules import (
    ACCURACY,
    LOSS,
    PROPERTY,
    boards,
    cycle,
    entry,
    metrics,
    positions,
)


@pytest.mark.parametrize(
    ("entries", "founders", "num_models", "expected"),
    [
        pytest.param([], 0, 3, "founder", id="an empty board needs a founder"),
        pytest.param([], 3, 3, "founder", id="with no entry yet there is nothing else to do"),
        pytest.param([entry(1)], 1, 3, "founder", id="a slot that no founder fills needs one"),
        pytest.param([entry(1)], 2, 3, 1, id="every free slot is being filled, so an entry is worked on"),
        pytest.param([entry(1, worked_on=2), entry(2, worked_on=1)], 0, 2, 2, id="the least worked on"),
        pytest.param(
            [entry(1, worked_on=0, in_progress=2), entry(2, worked_on=1)], 0, 2, 2, id="work in progress counts"
        ),
        pytest.param([entry(1, 0.5), entry(2, 0.6)], 0, 2, 2, id="then the better score"),
        pytest.param([entry(1, 0.5), entry(2, 0.4, worked_on=1)], 0, 2, 1, id="the work comes before the score"),
        pytest.param([entry(9, 0.5), entry(2, 0.5)], 0, 2, 2, id="then the older"),
        pytest.param([entry(1), entry(2), entry(3)], 0, 2, 1, id="a board that is over its size founds nothing"),
    ],
)
def test_the_next_claim_is(entries, founders, num_models, expected):
    choice = claiming.choose_claim(entries, founders, num_models, ACCURACY)
    assert ("founder" if choice is None else choice.entry_id) == expected


def test_the_lower_loss_is_next_among_entries_that_were_worked_on_equally():
    assert claiming.choose_claim([entry(1, 0.5), entry(2, 0.6)], 0, 2, LOSS) == entry(1, 0.5)


@PROPERTY
@given(boards(), st.integers(0, 4), st.integers(1, 6), metrics, st.randoms(use_true_random=False))
def test_no_entry_is_left_behind_and_no_slot_is_filled_twice(entries, founders, num_models, metric, random):
    choice = claiming.choose_claim(entries, founders, num_models, metric)
    if choice is None:
        assert not entries or len(entries) + founders < num_models
        return
    assert len(entries) + founders >= num_models
    work = {e.entry_id: e.worked_on + e.in_progress for e in entries}
    assert work[choice.entry_id] == min(work.values())
    shuffled = random.sample(entries, len(entries))
    assert claiming.choose_claim(shuffled, founders, num_models, metric) == choice


@pytest.mark.parametrize(
    ("start", "consumed", "leased", "expected"),
    [
        pytest.param(0, (), (), 0, id="a fresh entry begins at its start"),
        pytest.param(7, (), (), 7, id="which need not be 0"),
        pytest.param(0, {0, 1}, (), 2, id="consumed positions are passed over"),
        pytest.param(0, (), {0, 1}, 2, id="and so are leased ones"),
        pytest.param(0, {0, 2}, {1, 3}, 4, id="consumed and leased ones mixed"),
        pytest.param(0, {0, 2}, {3}, 1, id="a position that was given back is next"),
        pytest.param(5, {0, 1, 2, 3}, (), 5, id="positions before the start do not matter"),
        pytest.param(38, {38, 39}, {40}, 41, id="positions count on past the end of the cycle"),
    ],
)
def test_the_next_position_is(start, consumed, leased, expected):
    assert claiming.next_profile(start, consumed, leased) == expected


@PROPERTY
@given(positions, st.frozensets(positions), st.frozensets(positions))
def test_the_next_position_is_the_smallest_free_one(start, consumed, leased):
    taken = consumed | leased
    position = claiming.next_profile(start, consumed, leased)
    assert position >= start
    assert position not in taken
    assert taken.issuperset(range(start, position))


@pytest.mark.parametrize(
    ("floor", "consumed", "expected"),
    [
        pytest.param(0, set(), 0, id="nothing is consumed"),
        pytest.param(0, {0}, 1, id="one step"),
        pytest.param(3, {3, 4, 5}, 6, id="over all that are consumed without a gap"),
        pytest.param(3, {3, 5}, 4, id="not over a gap"),
        pytest.param(3, {4, 5}, 3, id="not while the first is open"),
    ],
)
def test_the_floor_moves(floor, consumed, expected):
    assert claiming.advance_floor(floor, consumed) == expected


@PROPERTY
@given(positions, st.frozensets(positions), st.frozensets(positions))
def test_the_floor_changes_no_answer(start, consumed, leased):
    floor = claiming.advance_floor(start, consumed)
    assert consumed.issuperset(range(start, floor))
    assert floor not in consumed
    assert claiming.next_profile(floor, consumed, leased) == claiming.next_profile(start, consumed, leased)


@pytest.mark.parametrize(("position", "expected"), [(0, 1), (1, 2), (39, 40), (40, 41)])
def test_a_promoted_child_starts_after_the_position_that_made_it(position, expected):
    assert claiming.child_start(position) == expected


@PROPERTY
@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), positions)
def test_a_line_that_is_promoted_each_time_walks_the_cycle_in_order(names, first):
    profiles = cycle("".join(map(str, names)))
    position, walked = first, []
    for _ in range(2 * len(profiles)):
        walked.append(claiming.profile_at(claiming.next_profile(position, (), ()), profiles))
        position = claiming.child_start(position)
    assert walked == [profiles[(first + i) % len(profiles)] for i in range(2 * len(profiles))]


@pytest.mark.parametrize(
    ("position", "expected"),
    [(0, "a"), (1, "b"), (2, "b"), (3, "c"), (4, "a"), (6, "b"), (7, "c"), (403, "c")],
)
def test_positions_wrap_only_where_they_are_mapped_to_the_cycle(position, expected):
    assert claiming.profile_at(position, cycle("abbc")).name == expected


@PROPERTY
@given(st.text("abc", min_size=1, max_size=8), positions, st.integers(0, 5))
def test_whole_rounds_change_no_profile(names, position, rounds):
    profiles = cycle(names)
    assert claiming.profile_at(position + rounds * len(profiles), profiles) == claiming.profile_at(position, profiles)
    assert claiming.profile_at(position % len(profiles), profiles) is profiles[position % len(profiles)]


@pytest.mark.parametrize(
    ("names", "start", "founder", "position", "expected"),
    [
        pytest.param("abc", 0, False, 0, 0, id="the first position is never a repeat"),
        pytest.param("abc", 0, False, 2, 0, id="a profile that comes for the first time"),
        pytest.param("aba", 0, False, 2, 1, id="a profile that is in the cycle twice"),
        pytest.param("abc", 0, False, 3, 1, id="the second round repeats the first"),
        pytest.param("abc", 0, False, 6, 2, id="the third repeats it twice"),
        pytest.param("aba", 0, False, 5, 3, id="repeats within rounds and over rounds add up"),
        pytest.param("aba", 2, False, 2, 0, id="what came before the start was tried from another parent"),
        pytest.param("aba", 2, False, 3, 1, id="the start itself counts"),
        pytest.param("aba", 0, True, 2, 0, id="a founder's own chunk was not trained from the founder"),
        pytest.param("aba", 0, True, 3, 1, id="but what came after it was"),
    ],
)
def test_a_repeat_is_numbered(names, start, founder, position, expected):
    parent = Entry(1, 1, 0.5, start_position=start, floor=start, worked_on=0, founder=founder)
    assert claiming.repeat_number(parent, position, cycle(names)) == expected


@PROPERTY
@given(st.text("abc", min_size=1, max_size=6), st.integers(0, 10), st.booleans(), st.integers(0, 25))
def test_the_repeat_number_counts_the_earlier_tries_of_the_same_profile(names, start, founder, steps):
    profiles = cycle(names)
    first = start + founder
    position = first + steps
    parent = Entry(1, 1, 0.5, start_position=start, floor=start, worked_on=0, founder=founder)
    tried = [claiming.profile_at(p, profiles) for p in range(first, position)]
    assert claiming.repeat_number(parent, position, profiles) == tried.count(claiming.profile_at(position, profiles))


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        pytest.param(99.0, False, id="within the lease"),
        pytest.param(100.0, False, id="the last moment of the lease"),
        pytest.param(100.1, True, id="past the lease, which is the hard end of the job"),
    ],
)
def test_a_lease_until_100_is_expired(now, expected):
    assert claiming.expired(now, 100.0) is expected
