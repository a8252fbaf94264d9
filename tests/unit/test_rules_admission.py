"""Every decision of orch: as a table of what is meant, then as properties that hold whatever comes in."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from orchestrator.messages import counted
from orchestrator.records import (
    ChainJob,
    Claim,
    Discard,
    Entry,
    Evidence,
    FoundAnew,
    JobState,
    Metric,
    Profile,
    Progress,
    Promote,
    RunState,
    StopRules,
    Worker,
    WorkOn,
)
from orchestrator.rules import admission, claiming, collecting, stopping, succession

ACCURACY = Metric("accuracy", "max")
LOSS = Metric("loss", "min")
NAN, INF = math.nan, math.inf

PROPERTY = settings(derandomize=True, deadline=None, max_examples=200)


def entry(entry_id: int, score: float = 0.5, **more: int) -> Entry:
    return Entry(
        entry_id, checkpoint_id=entry_id, score=score, **({"start_position": 0, "floor": 0, "worked_on": 0} | more)
    )


def cycle(names: str) -> list[Profile]:
    """ "aab": three positions, two profiles."""
    return [Profile(name, learning_rate=0.1, momentum=0.9, weight_decay=0.0) for name in names]


metrics = st.sampled_from([ACCURACY, LOSS])
# Few values, so that ties are common; any float at all, so that NaN and infinities are too.
scores = st.sampled_from([0.1, 0.2, 0.3]) | st.floats()
finite_scores = st.sampled_from([0.1, 0.2, 0.3]) | st.floats(-1e9, 1e9)
positions = st.integers(0, 30)


@st.composite
def boards(draw: st.DrawFn, min_size: int = 0) -> list[Entry]:
    ids = draw(st.lists(st.integers(1, 50), min_size=min_size, max_size=6, unique=True))
    counts = st.integers(0, 3)
    return [entry(i, draw(finite_scores), worked_on=draw(counts), in_progress=draw(counts)) for i in ids]


# --- worst -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "metric", "expected"),
    [
        pytest.param([], ACCURACY, None, id="an empty board has none"),
        pytest.param([entry(1, 0.5)], ACCURACY, 1, id="a single entry is the worst"),
        pytest.param([entry(1, 0.5), entry(2, 0.4), entry(3, 0.6)], ACCURACY, 2, id="the lowest accuracy"),
        pytest.param([entry(1, 0.5), entry(2, 0.4), entry(3, 0.6)], LOSS, 3, id="the highest loss"),
        pytest.param(
            [entry(1, 0.5, worked_on=1), entry(2, 0.5, worked_on=3), entry(3, 0.5, worked_on=2)],
            ACCURACY,
            2,
            id="among equals the most worked on",
        ),
        pytest.param(
            [entry(1, 0.5, worked_on=1), entry(7, 0.5, worked_on=1), entry(3, 0.5, worked_on=1)],
            ACCURACY,
            7,
            id="among equals that were worked on equally the newest",
        ),
        pytest.param([entry(1, 0.4), entry(2, 0.5, worked_on=9)], ACCURACY, 1, id="the score comes before the work"),
    ],
)
def test_worst_is_the_entry_that_a_better_candidate_replaces(entries, metric, expected):
    found = admission.worst(entries, metric)
    assert (found and found.entry_id) == expected


@PROPERTY
@given(boards(min_size=1), metrics, st.randoms(use_true_random=False))
def test_no_entry_is_worse_than_the_worst_in_whatever_order_they_come(entries, metric, random):
    found = admission.worst(entries, metric)
    assert found in entries
    assert not any(metric.better(found.score, than=other.score) for other in entries)
    shuffled = random.sample(entries, len(entries))
    assert admission.worst(shuffled, metric) == found


# --- ratchet -----------------------------------------------------------------------------------------

FULL = [entry(1, 0.70), entry(2, 0.60), entry(3, 0.65)]


@pytest.mark.parametrize(
    ("score", "entries", "num_models", "metric", "evicted"),
    [
        pytest.param(0.01, [], 3, ACCURACY, None, id="an empty board admits anything finite"),
        pytest.param(0.01, FULL[:2], 3, ACCURACY, None, id="a free slot admits what is worse than all"),
        pytest.param(0.60, FULL[:2], 3, ACCURACY, None, id="a free slot admits a tie"),
        pytest.param(0.61, FULL, 3, ACCURACY, 2, id="strictly better than the worst replaces the worst"),
        pytest.param(0.99, FULL, 3, ACCURACY, 2, id="better than the best still replaces the worst"),
        pytest.param(0.60 + 1e-12, FULL, 3, ACCURACY, 2, id="a hair better is better"),
        pytest.param(0.69, FULL, 3, LOSS, 1, id="a lower loss replaces the highest"),
        pytest.param(-5.0, FULL, 3, LOSS, 1, id="a loss may be negative"),
        pytest.param(0.61, FULL, 2, ACCURACY, 2, id="a board that is over its size replaces and does not grow"),
    ],
)
def test_the_ratchet_admits(score, entries, num_models, metric, evicted):
    decision = admission.ratchet(score, entries, num_models, metric)
    assert isinstance(decision, Promote)
    assert (decision.evicted and decision.evicted.entry_id) == evicted


@pytest.mark.parametrize(
    ("score", "entries", "num_models", "metric", "reason"),
    [
        pytest.param(0.60, FULL, 3, ACCURACY, "not better than the worst on the board, 0.6", id="a tie loses"),
        pytest.param(0.70, FULL, 3, LOSS, "not better than the worst on the board, 0.7", id="a tie of losses loses"),
        pytest.param(0.59, FULL, 3, ACCURACY, "accuracy 0.59 is not better", id="worse loses"),
        pytest.param(0.71, FULL, 3, LOSS, "loss 0.71 is not better", id="a higher loss loses"),
        pytest.param(NAN, [], 3, ACCURACY, "accuracy is not finite", id="NaN never enters, not even a free slot"),
        pytest.param(INF, [], 3, ACCURACY, "not finite", id="infinity never enters a free slot"),
        pytest.param(INF, FULL, 3, ACCURACY, "not finite", id="infinity never beats the worst"),
        pytest.param(-INF, FULL, 3, LOSS, "loss is not finite", id="minus infinity is no loss"),
        pytest.param(NAN, FULL, 3, LOSS, "not finite", id="NaN is no loss"),
        pytest.param(None, [], 3, ACCURACY, "not finite", id="no score at all never enters"),
    ],
)
def test_the_ratchet_refuses(score, entries, num_models, metric, reason):
    decision = admission.ratchet(score, entries, num_models, metric)
    assert isinstance(decision, Discard)
    assert reason in decision.reason


@PROPERTY
@given(st.lists(scores, max_size=30), st.integers(1, 4), metrics)
def test_a_board_never_shrinks_or_overflows_and_its_worst_never_falls(offered, num_models, metric):
    board: list[Entry] = []
    for number, score in enumerate(offered, start=1):
        size, bar = len(board), admission.bar(board, num_models, metric)
        best = max((metric.key(e.score) for e in board), default=-INF)
        decision = admission.ratchet(score, board, num_models, metric)
        if isinstance(decision, Promote):
            assert math.isfinite(score)
            assert (decision.evicted is None) == (size < num_models)
            board = [e for e in board if e != decision.evicted] + [entry(number, score)]
        assert size <= len(board) <= num_models
        assert max((metric.key(e.score) for e in board), default=-INF) >= best
        if bar is not None:
            assert metric.key(admission.bar(board, num_models, metric)) >= metric.key(bar)
            assert isinstance(decision, Promote) == metric.better(score, than=bar)


@PROPERTY
@given(boards(min_size=1), metrics)
def test_a_copy_of_an_entry_never_replaces_the_worst(entries, metric):
    lowest = admission.worst(entries, metric)
    assert isinstance(admission.ratchet(lowest.score, entries, len(entries), metric), Discard)


@pytest.mark.parametrize(
    ("entries", "num_models", "metric", "expected"),
    [
        pytest.param([], 3, ACCURACY, None, id="empty"),
        pytest.param(FULL[:2], 3, ACCURACY, None, id="a slot is free"),
        pytest.param(FULL, 3, ACCURACY, 0.60, id="full"),
        pytest.param(FULL, 3, LOSS, 0.70, id="full of losses"),
    ],
)
def test_the_bar_is_the_worst_score_of_a_full_board(entries, num_models, metric, expected):
    assert admission.bar(entries, num_models, metric) == expected


# --- choose_claim ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "founders", "num_models", "expected"),
    [
        pytest.param([], 0, 3, "founder", id="an empty board needs a founder"),
        pytest.param([], 3, 3, "founder", id="with no entry yet there is nothing else to do"),
        pytest.param([entry(1)], 1, 3, "founder", id="a slot that nobody fills needs a founder"),
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
    assert ("founder" if isinstance(choice, FoundAnew) else choice.entry.entry_id) == expected


def test_of_equally_worked_entries_the_one_with_the_lower_loss_is_next():
    assert claiming.choose_claim([entry(1, 0.5), entry(2, 0.6)], 0, 2, LOSS) == WorkOn(entry(1, 0.5))


@PROPERTY
@given(boards(), st.integers(0, 4), st.integers(1, 6), metrics, st.randoms(use_true_random=False))
def test_no_entry_is_left_behind_and_no_slot_is_filled_twice(entries, founders, num_models, metric, random):
    choice = claiming.choose_claim(entries, founders, num_models, metric)
    if isinstance(choice, FoundAnew):
        assert not entries or len(entries) + founders < num_models
        return
    assert len(entries) + founders >= num_models
    work = {e.entry_id: e.worked_on + e.in_progress for e in entries}
    assert work[choice.entry.entry_id] == min(work.values())
    shuffled = random.sample(entries, len(entries))
    assert claiming.choose_claim(shuffled, founders, num_models, metric) == choice


# --- positions of the cycle --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "consumed", "leased", "expected"),
    [
        pytest.param(0, (), (), 0, id="a fresh entry begins at its start"),
        pytest.param(7, (), (), 7, id="which need not be 0"),
        pytest.param(0, {0, 1}, (), 2, id="consumed positions are passed over"),
        pytest.param(0, (), {0, 1}, 2, id="and so are leased ones"),
        pytest.param(0, {0, 2}, {1, 3}, 4, id="consumed and leased between each other"),
        pytest.param(0, {0, 2}, {3}, 1, id="a position that was given back is next"),
        pytest.param(5, {0, 1, 2, 3}, (), 5, id="what lies before the start says nothing"),
        pytest.param(38, {38, 39}, {40}, 41, id="positions count on past the end of the cycle"),
    ],
)
def test_the_next_position_is(start, consumed, leased, expected):
    assert claiming.next_profile(start, consumed, leased) == expected


@PROPERTY
@given(positions, st.frozensets(positions), st.frozensets(positions))
def test_the_next_position_is_the_smallest_free_one(start, consumed, leased):
    taken = consumed | leased
    found = claiming.next_profile(start, consumed, leased)
    assert found >= start
    assert found not in taken
    assert taken.issuperset(range(start, found))


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
def test_positions_wrap_only_in_what_they_mean(position, expected):
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


# --- time --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("durations_s", "expected"),
    [
        pytest.param([], None, id="nothing was measured yet"),
        pytest.param([10.0], 12.5, id="the mean with a margin"),
        pytest.param([10.0, 10.0, 10.0], 12.5, id="of all that were measured"),
        pytest.param([1.0, 1.0, 1.0, 1.0, 10.0], 10.0, id="or the longest, if that is more"),
        pytest.param([100.0, 4.0, 4.0, 4.0, 4.0, 4.0], 5.0, id="of the last five"),
    ],
)
def test_a_chunk_is_expected_to_take(durations_s, expected):
    assert stopping.expected_chunk_s(durations_s) == (None if expected is None else pytest.approx(expected))


@PROPERTY
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=12))
def test_no_recent_chunk_took_longer_than_is_expected(durations_s):
    expected_s = stopping.expected_chunk_s(durations_s)
    assert expected_s >= max(durations_s[-5:])
    if len(durations_s) >= 5:
        assert stopping.expected_chunk_s([1e9, *durations_s]) == expected_s, "only the last five count"


@pytest.mark.parametrize(
    ("now", "durations_s", "chunks", "expected"),
    [
        pytest.param(0.0, [], 0, True, id="a fresh job starts"),
        pytest.param(99.0, [50.0], 0, True, id="the first chunk starts though it is too long for the job"),
        pytest.param(100.0, [], 0, False, id="not even the first starts when time is up"),
        pytest.param(101.0, [], 0, False, id="nor after that"),
        pytest.param(99.0, [], 3, True, id="nothing was measured, so it is tried"),
        pytest.param(50.0, [40.0], 1, True, id="it fits exactly"),
        pytest.param(50.1, [40.0], 1, False, id="it does not fit any more"),
        pytest.param(50.0, [10.0, 60.0], 1, False, id="the longest of the last chunks would not fit"),
    ],
)
def test_another_chunk_starts_in_a_job_that_ends_at_100(now, durations_s, chunks, expected):
    assert stopping.should_start_chunk(now, 100.0, durations_s, chunks) is expected


@PROPERTY
@given(
    st.floats(0, 1e4), st.floats(0, 1e4), st.floats(0, 1e4), st.lists(st.floats(0, 1e4), max_size=6), st.integers(0, 3)
)
def test_what_starts_late_would_have_started_earlier_and_nothing_starts_after_the_end(
    now, earlier_by, job_end, durations_s, chunks
):
    if stopping.should_start_chunk(now, job_end, durations_s, chunks):
        assert now < job_end
        assert stopping.should_start_chunk(now - earlier_by, job_end, durations_s, chunks)


@pytest.mark.parametrize(
    ("now", "evidence", "expected"),
    [
        pytest.param(99.0, Evidence.RUNNING, False, id="it runs"),
        pytest.param(99.0, Evidence.QUEUED, False, id="it is in the queue again"),
        pytest.param(99.0, Evidence.UNKNOWN, False, id="UNKNOWN is never gone"),
        pytest.param(99.0, Evidence.GONE, True, id="its job is gone"),
        pytest.param(100.0, Evidence.UNKNOWN, False, id="the last moment of the lease"),
        pytest.param(100.1, Evidence.UNKNOWN, True, id="past the lease, which is the hard end of the job"),
        pytest.param(100.1, Evidence.RUNNING, True, id="past the lease whatever the cluster says"),
    ],
)
def test_a_lease_until_100_is_expired(now, evidence, expected):
    assert claiming.expired(now, 100.0, evidence) is expected


@PROPERTY
@given(st.floats(0, 1e4), st.floats(0, 1e4))
def test_only_time_expires_a_claim_of_which_nothing_is_known(now, lease_until):
    by_evidence = {e: claiming.expired(now, lease_until, e) for e in Evidence}
    assert by_evidence == dict.fromkeys(Evidence, now > lease_until) | {Evidence.GONE: True}


# --- the end -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stale_cycles", "cycle_length", "num_models", "expected"),
    [
        pytest.param(1, 40, 5, 200, id="every profile once on every entry"),
        pytest.param(3, 13, 2, 78, id="three times that"),
        pytest.param(None, 40, 5, None, id="never"),
    ],
)
def test_stale_chunks_are(stale_cycles, cycle_length, num_models, expected):
    assert stopping.stale_chunks(stale_cycles, cycle_length, num_models) == expected


@PROPERTY
@given(st.none() | st.integers(1, 9), st.integers(1, 99), st.integers(1, 99))
def test_stale_chunks_let_every_entry_try_every_profile(stale_cycles, cycle_length, num_models):
    found = stopping.stale_chunks(stale_cycles, cycle_length, num_models)
    assert (found is None) == (stale_cycles is None)
    assert found is None or (found // num_models >= cycle_length and found % (cycle_length * num_models) == 0)


@pytest.mark.parametrize(
    ("promoted", "discarded", "told"),
    [
        (0, 0, None),
        (0, 1, "the only chunk so far ended with a score (accuracy) that is no finite number"),
        (0, 7, "all 7 chunks so far ended with a score (accuracy) that is no finite number"),
        (1, 7, None),
    ],
    ids=["none has finished", "one, which is no number", "seven, all no numbers", "one has entered the board"],
)
def test_a_run_whose_scores_are_all_no_numbers_is_warned_of(promoted, discarded, told):
    lines = stopping.warnings({"promoted": promoted, "discarded": discarded, "failed": 3}, "accuracy")
    assert len(lines) == (told is not None)
    assert all(line.startswith(told) and "learning rate" in line and "precision" in line for line in lines)


@pytest.mark.parametrize(("count", "said"), [(0, "0 entries"), (1, "1 entry"), (2, "2 entries")])
def test_one_is_no_plural(count, said):
    assert counted(count, "entry", "entries") == said
    assert counted(count, "epoch") == f"{count} epoch" + "s" * (count != 1)


NEVER = StopRules(stale_chunks=None, score=None, epochs=None)


@pytest.mark.parametrize(
    ("progress", "stop", "metric", "state", "reason"),
    [
        pytest.param(Progress(9, 0.5, 9), StopRules(10, 0.6, 10), ACCURACY, None, None, id="not yet"),
        pytest.param(Progress(10**6, 0.99, 10**6), NEVER, ACCURACY, None, None, id="nothing ends it"),
        pytest.param(Progress(0, None, 0), StopRules(10, 0.6, 10), ACCURACY, None, None, id="not before it began"),
        pytest.param(
            Progress(0, 0.6, 0), StopRules(10, 0.6, 10), ACCURACY, "converged", "0.6 has reached 0.6", id="the score"
        ),
        pytest.param(
            Progress(0, 0.5, 0), StopRules(10, 0.6, 10), LOSS, "converged", "0.5 has reached 0.6", id="the loss"
        ),
        pytest.param(Progress(0, 0.7, 0), StopRules(10, 0.6, 10), LOSS, None, None, id="the loss is still too high"),
        pytest.param(
            Progress(0, 0.5, 10),
            StopRules(10, 0.6, 10),
            ACCURACY,
            "finished",
            "10 epochs were trained",
            id="the epochs",
        ),
        pytest.param(Progress(0, 0.5, 1), StopRules(10, 0.6, 1), ACCURACY, "finished", "1 epoch was trained", id="one"),
        pytest.param(Progress(1, None, 1), StopRules(1, 0.6, 9), ACCURACY, "failed", "1 chunk and no", id="one chunk"),
        pytest.param(
            Progress(10, 0.5, 9),
            StopRules(10, 0.6, 10),
            ACCURACY,
            "converged",
            "no promotion in the last 10",
            id="stale",
        ),
        pytest.param(
            Progress(10, None, 9),
            StopRules(10, 0.6, 10),
            ACCURACY,
            "failed",
            "no finite accuracy",
            id="nothing but NaN",
        ),
        pytest.param(
            Progress(99, 0.9, 99),
            StopRules(10, 0.6, 10),
            ACCURACY,
            "converged",
            "has reached",
            id="the score comes first",
        ),
    ],
)
def test_the_run_is_over(progress, stop, metric, state, reason):
    found = stopping.converged(progress, stop, metric)
    if state is None:
        assert found is None
    else:
        assert found is not None
        assert found[0] == state
        assert reason in found[1]


@PROPERTY
@given(
    st.builds(Progress, st.integers(0, 20), st.none() | finite_scores, st.integers(0, 20)),
    st.builds(StopRules, st.none() | st.integers(1, 20), st.none() | finite_scores, st.none() | st.integers(1, 20)),
    metrics,
)
def test_a_run_that_is_over_stays_over_and_says_why(progress, stop, metric):
    found = stopping.converged(progress, stop, metric)
    assert (found is None) or (found[0] in (RunState.CONVERGED, RunState.FINISHED, RunState.FAILED) and found[1])
    assert stopping.converged(progress, NEVER, metric) is None
    if found is not None:
        more = Progress(progress.chunks_since_promotion + 1, progress.best_score, progress.epochs + 1)
        assert stopping.converged(more, stop, metric) is not None


@pytest.mark.parametrize(
    ("state", "now", "expected"),
    [
        *(pytest.param(state, 0.0, state is RunState.ACTIVE, id=f"{state}") for state in RunState),
        pytest.param(RunState.ACTIVE, 99.9, True, id="before the deadline"),
        pytest.param(RunState.ACTIVE, 100.0, False, id="at the deadline"),
    ],
)
def test_a_chunk_may_be_claimed_in_a_run_until_100(state, now, expected):
    assert stopping.may_claim(state, now, 100.0) is expected
    assert stopping.lifetime_over(now, 100.0) is (now >= 100.0)


def worker(worker_id: int = 0, failures: int = 0, stopped: str | None = None) -> Worker:
    return Worker(worker_id, device=None, failures=failures, stopped=stopped)


@pytest.mark.parametrize(
    ("state", "now", "who", "why_not"),
    [
        pytest.param(RunState.ACTIVE, 0.0, worker(), None, id="an active run goes on"),
        pytest.param(RunState.ACTIVE, 0.0, worker(failures=4), None, id="some failures are allowed"),
        pytest.param(RunState.ACTIVE, 0.0, worker(failures=5), "5 failures in a row, 5 allowed", id="not too many"),
        pytest.param(RunState.ACTIVE, 99.9, worker(), None, id="just before the deadline"),
        pytest.param(RunState.ACTIVE, 100.0, worker(), "the run's total lifetime is over", id="at the deadline"),
        pytest.param(RunState.ACTIVE, 0.0, worker(stopped="out of memory"), "out of memory", id="a stopped chain"),
        *(
            pytest.param(state, 0.0, worker(), f"the run is {state}", id=f"a {state} run does not")
            for state in RunState
            if state is not RunState.ACTIVE
        ),
    ],
)
def test_a_chain_gets_a_successor(state, now, who, why_not):
    assert succession.should_resubmit(state, now, 100.0, who, max_failures=5) == why_not


@PROPERTY
@given(
    st.sampled_from(RunState), st.floats(0, 200), st.integers(0, 8), st.none() | st.just("stopped"), st.integers(1, 8)
)
def test_a_successor_is_queued_only_where_a_chunk_may_be_claimed(state, now, failures, stopped, max_failures):
    why_not = succession.should_resubmit(state, now, 100.0, worker(0, failures, stopped), max_failures)
    wanted = stopping.may_claim(state, now, 100.0) and stopped is None and failures < max_failures
    assert (why_not is None) == wanted
    assert why_not is None or why_not


@pytest.mark.parametrize(
    ("total_s", "eon_s", "expected"),
    [
        pytest.param(259200, 2400, 108, id="the report's lifetimes"),
        pytest.param(100, 30, 4, id="the last link may be short"),
        pytest.param(10, 10, 1, id="one is enough"),
        pytest.param(5, 10, 1, id="one is enough for less"),
        pytest.param(0.5, 0.2, 3, id="fractions of a second"),
    ],
)
def test_a_chain_has_at_most_so_many_links(total_s, eon_s, expected):
    assert succession.jobs_at_most(total_s, eon_s) == expected


@PROPERTY
@given(st.integers(1, 10**7), st.integers(1, 10**5))
def test_the_links_fill_the_lifetime_and_one_less_does_not(total_s, eon_s):
    links = succession.jobs_at_most(total_s, eon_s)
    assert (links - 1) * eon_s < total_s <= links * eon_s


# --- chains ------------------------------------------------------------------------------------------

SUBMITTED_AT, NOW = 1000.0, 2000.0


def job(
    job_id: int, worker_id: int, state: JobState, submitted_at: float | None = SUBMITTED_AT, after: int | None = None
) -> ChainJob:
    cluster_id = None if state is JobState.SUBMITTING else str(100 + job_id)
    token = f"t{job_id}"
    return ChainJob(
        job_id, worker_id, job_id, token, state, cluster_id=cluster_id, submitted_at=submitted_at, after_job_id=after
    )


SUBMITTING, QUEUED, RUNNING = JobState.SUBMITTING, JobState.QUEUED, JobState.RUNNING


@pytest.mark.parametrize(
    ("jobs", "evidence", "found", "lost", "adopted", "resubmitted"),
    [
        pytest.param([], {}, {}, [], {}, [0], id="a chain without any job gets one"),
        pytest.param([job(1, 0, RUNNING)], {1: "running"}, {}, [], {}, [], id="a chain that works is left alone"),
        pytest.param([job(1, 0, QUEUED)], {1: "queued"}, {}, [], {}, [], id="and so is one in the queue"),
        pytest.param([job(1, 0, RUNNING)], {1: "unknown"}, {}, [], {}, [], id="UNKNOWN is never gone"),
        pytest.param([job(1, 0, RUNNING)], {}, {}, [], {}, [], id="no evidence is never gone"),
        pytest.param([job(1, 0, RUNNING)], {1: "gone"}, {}, [1], {}, [0], id="a job that is gone is followed"),
        pytest.param([job(1, 0, QUEUED)], {1: "gone"}, {}, [1], {}, [0], id="also one that never began"),
        pytest.param(
            [job(1, 0, RUNNING), job(2, 0, QUEUED)],
            {1: "gone", 2: "queued"},
            {},
            [1],
            {},
            [],
            id="its successor is queued already",
        ),
        pytest.param(
            [job(1, 0, RUNNING), job(2, 0, QUEUED)],
            {1: "gone", 2: "unknown"},
            {},
            [1],
            {},
            [],
            id="its successor may be queued",
        ),
        pytest.param(
            [job(1, 0, RUNNING), job(2, 0, QUEUED)],
            {1: "gone", 2: "gone"},
            {},
            [1, 2],
            {},
            [0],
            id="both are gone",
        ),
        pytest.param(
            [job(1, 0, SUBMITTING)],
            {1: "gone"},
            {"t1": "77"},
            [],
            {1: "77"},
            [],
            id="its submitter died between the cluster and the database",
        ),
        pytest.param(
            [job(1, 0, SUBMITTING)], {1: "gone"}, {}, [1], {}, [0], id="its submitter died before the cluster"
        ),
        pytest.param([job(1, 0, SUBMITTING)], {1: "unknown"}, {}, [], {}, [], id="perhaps the cluster has it"),
        pytest.param(
            [job(1, 0, SUBMITTING, NOW - succession.SUBMITTING_GRACE_S)],
            {1: "gone"},
            {},
            [],
            {},
            [],
            id="it is being submitted just now",
        ),
        pytest.param(
            [job(1, 0, RUNNING), job(2, 0, SUBMITTING, NOW - succession.SUBMITTING_GRACE_S, after=1)],
            {1: "running", 2: "gone"},
            {},
            [],
            {},
            [],
            id="the job before it is submitting it just now",
        ),
        pytest.param(
            [job(1, 0, RUNNING), job(2, 0, SUBMITTING, NOW - succession.ORPHANED_GRACE_S - 1, after=1)],
            {1: "gone", 2: "gone"},
            {},
            [1, 2],
            {},
            [0],
            id="the job that was to submit it is gone",
        ),
        pytest.param(
            [job(2, 0, SUBMITTING, NOW - succession.ORPHANED_GRACE_S - 1, after=1)],
            {2: "gone"},
            {},
            [2],
            {},
            [0],
            id="the job that was to submit it has ended before",
        ),
        pytest.param(
            [job(1, 0, RUNNING), job(2, 0, SUBMITTING, NOW - succession.ORPHANED_GRACE_S, after=1)],
            {1: "gone", 2: "gone"},
            {},
            [1],
            {},
            [],
            id="its submitter is gone, and the cluster may have it all the same",
        ),
        pytest.param(
            [job(1, 0, RUNNING), job(2, 0, SUBMITTING, NOW - succession.ORPHANED_GRACE_S - 1, after=1)],
            {1: "unknown", 2: "gone"},
            {},
            [],
            {},
            [],
            id="the job that was to submit it may be there",
        ),
    ],
)
def test_a_chain_is_mended(jobs, evidence, found, lost, adopted, resubmitted):
    todo = succession.mend([worker(0)], jobs, {k: Evidence(v) for k, v in evidence.items()}, found, NOW)
    assert [j.job_id for j in todo.lost] == lost
    assert {j.job_id: cluster_id for j, cluster_id in todo.adopt} == adopted
    assert list(todo.resubmit) == resubmitted


@pytest.mark.parametrize("state", list(RunState))
def test_only_a_run_that_goes_on_keeps_jobs_in_the_queue(state):
    jobs = [job(1, 0, RUNNING), job(2, 1, RUNNING), job(3, 2, QUEUED), job(4, 3, SUBMITTING), job(5, 4, QUEUED)]
    evidence = dict(zip(range(1, 6), map(Evidence, ("queued", "running", "queued", "queued", "unknown")), strict=True))
    found = [j.job_id for j in succession.unwanted(state, jobs, evidence)]
    assert found == ([] if state is RunState.ACTIVE else [1, 3])


def test_every_chain_is_mended_by_itself():
    jobs = [job(1, 0, RUNNING), job(2, 1, RUNNING), job(3, 2, QUEUED)]
    evidence = {1: Evidence.GONE, 2: Evidence.UNKNOWN, 3: Evidence.QUEUED}
    todo = succession.mend([worker(i) for i in range(4)], jobs, evidence, {}, NOW)
    assert [j.job_id for j in todo.lost] == [1]
    assert todo.resubmit == (0, 3)


@st.composite
def chains(draw: st.DrawFn) -> dict[str, object]:
    jobs = [
        job(
            job_id,
            draw(st.integers(0, 3)),
            draw(st.sampled_from([SUBMITTING, QUEUED, RUNNING])),
            draw(times),
            draw(st.none() | st.integers(0, job_id)),
        )
        for job_id in range(draw(st.integers(0, 8)))
    ]
    known = [j for j in jobs if draw(st.booleans())]
    return {
        "workers": [worker(i) for i in range(4)],
        "open_jobs": jobs,
        "evidence": {j.job_id: draw(st.sampled_from(Evidence)) for j in known},
        "found_ids": {j.token: f"c{j.job_id}" for j in jobs if j.cluster_id is None and draw(st.booleans())},
        "now": NOW,
        "grace_s": draw(st.sampled_from([0.0, 120.0])),
    }


times = st.none() | st.floats(0.0, NOW)


@PROPERTY
@given(chains())
def test_only_a_job_that_is_proved_gone_is_lost(asked):
    todo = succession.mend(**asked)
    for gone in todo.lost:
        assert gone in asked["open_jobs"]
        assert asked["evidence"].get(gone.job_id) is Evidence.GONE
        assert gone.token not in asked["found_ids"]


@PROPERTY
@given(chains())
def test_a_chain_is_linked_anew_exactly_if_no_job_of_it_is_left(asked):
    todo = succession.mend(**asked)
    left = {j.worker_id for j in asked["open_jobs"] if j not in todo.lost}
    assert list(todo.resubmit) == [w.worker_id for w in asked["workers"] if w.worker_id not in left]


@PROPERTY
@given(chains())
def test_a_job_is_adopted_under_the_id_that_the_cluster_gave_it(asked):
    todo = succession.mend(**asked)
    assert not {j.job_id for j, _ in todo.adopt} & {j.job_id for j in todo.lost}
    assert dict(asked["found_ids"]) == {j.token: cluster_id for j, cluster_id in todo.adopt}


@PROPERTY
@given(chains())
def test_a_cluster_that_does_not_answer_changes_nothing_about_open_jobs(asked):
    silent = asked | {"evidence": {j.job_id: Evidence.UNKNOWN for j in asked["open_jobs"]}, "found_ids": {}}
    todo = succession.mend(**silent)
    assert todo.lost == ()
    assert todo.adopt == ()
    assert not {j.worker_id for j in asked["open_jobs"]} & set(todo.resubmit)


# --- files -------------------------------------------------------------------------------------------

OURS = "g00000007-c00000003"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param(f"{OURS}.pt", 7, id="a checkpoint"),
        pytest.param(f"{OURS}.json", 7, id="its record"),
        pytest.param(f".tmp-{OURS}.pt-4711", 7, id="a checkpoint that is being written"),
        pytest.param(f".tmp-{OURS}.json-4711", 7, id="a record that is being written"),
        pytest.param("g123456789-c00000003.pt", 123456789, id="more claims than eight digits hold"),
        pytest.param("README", None, id="a file of the user"),
        pytest.param("gpu-notes.txt", None, id="that begins with g"),
        pytest.param("g1-notes.txt", None, id="that begins with g and a digit"),
        pytest.param("backup-g00000007-c00000003.pt", None, id="a copy that the user made"),
        pytest.param(".nfs000000000123", None, id="what NFS leaves behind"),
        pytest.param("g-c.pt", None, id="no number"),
        pytest.param("g²-c1.pt", None, id="a digit that is no decimal"),
        pytest.param("", None, id="no name"),
    ],
)
def test_the_generation_in_the_name_of(name, expected):
    assert collecting.generation_of(name) == expected


@PROPERTY
@given(
    st.integers(1, 10**12), st.integers(1, 10**12), st.sampled_from(["", ".tmp-"]), st.sampled_from([".pt", ".json"])
)
def test_every_file_of_a_claim_tells_its_generation(generation, chunk_id, prefix, suffix):
    claim = Claim(chunk_id, generation, 0, 0, cycle("a")[0], 0, None, None, 0, None)
    assert collecting.generation_of(f"{prefix}{claim.file_stem}{suffix}{'-99' if prefix else ''}") == generation


STEM = re.compile(r"(\.tmp-)?g[0-9]{8,}-c[0-9]{8,}[.-].*", re.DOTALL)


@PROPERTY
@given(st.text(max_size=20) | st.from_regex(r"\A(\.tmp-)?[gG]\d*-?c?\d*(\.pt|\.json|-x)?\Z"))
@example("g²-c1.pt")
def test_a_file_that_is_not_ours_has_no_generation(name):
    assume(not STEM.fullmatch(name))
    assert collecting.generation_of(name) is None


REFERENCED, LIVE = f"{OURS}.pt", 9


@pytest.mark.parametrize(
    ("name", "collected"),
    [
        pytest.param(REFERENCED, False, id="what an entry or a claim refers to stays"),
        pytest.param("g00000009-c00000004.pt", False, id="what a live claim has just written stays"),
        pytest.param(".tmp-g00000009-c00000004.pt-12", False, id="and what it is writing"),
        pytest.param("g00000008-c00000004.pt", True, id="a candidate that nothing refers to goes"),
        pytest.param("g00000008-c00000004.json", True, id="and its record"),
        pytest.param(".tmp-g00000008-c00000004.pt-12", True, id="and what its writer left when it was killed"),
        pytest.param("g00000010-c00000004.pt", True, id="a claim that is newer and not live any more"),
        pytest.param("notes.txt", False, id="a foreign file stays"),
    ],
)
def test_of_the_files_in_the_folder(name, collected):
    assert collecting.collectable([name], {REFERENCED}, {LIVE}) == ([name] if collected else [])


names = st.builds(
    "{}g{:08d}-c{:08d}{}".format,
    st.sampled_from(["", ".tmp-"]),
    st.integers(1, 12),
    st.integers(1, 12),
    st.sampled_from([".pt", ".json"]),
)


@PROPERTY
@given(
    st.lists(names | st.text(max_size=8), unique=True),
    st.frozensets(names),
    st.frozensets(st.integers(1, 12)),
    st.integers(0, 12),
)
def test_nothing_that_is_needed_or_foreign_is_collected_and_all_else_is(listed, others, live, referenced_too):
    referenced = others | set(listed[:referenced_too])
    doomed = collecting.collectable(listed, referenced, live)
    for name in listed:
        generation = re.fullmatch(r"(?:\.tmp-)?g(\d{8})-c\d{8}\.(pt|json)", name)
        unneeded = generation is not None and int(generation[1]) not in live and name not in referenced
        assert (name in doomed) == unneeded
    assert doomed == [name for name in listed if name in doomed], "in their order, each once"
