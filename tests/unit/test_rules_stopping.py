"""When a chunk starts and when a run is over: first tables of inputs and results, then properties of any input."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.messages import counted
from orchestrator.records import Over, Progress, RunState, StopRules
from orchestrator.rules import stopping
from tests.support.rules import (
    ACCURACY,
    LOSS,
    PROPERTY,
    finite_scores,
    metrics,
)


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
    ("stale_cycles", "cycle_length", "num_models", "expected"),
    [
        pytest.param(1, 40, 5, 200, id="every profile once on every entry"),
        pytest.param(3, 13, 2, 78, id="three times that"),
        pytest.param(None, 40, 5, None, id="never"),
        pytest.param("auto", 1, 1, 20, id="by default, ordinary training may stand still for a while"),
        pytest.param("auto", 40, 5, 200, id="by default, every profile once on every entry"),
    ],
)
def test_stale_chunks_are(stale_cycles, cycle_length, num_models, expected):
    assert stopping.stale_chunks(stale_cycles, cycle_length, num_models) == expected


@PROPERTY
@given(st.none() | st.integers(1, 9), st.integers(1, 99), st.integers(1, 99))
def test_stale_chunks_let_every_entry_try_every_profile(stale_cycles, cycle_length, num_models):
    chunks = stopping.stale_chunks(stale_cycles, cycle_length, num_models)
    assert (chunks is None) == (stale_cycles is None)
    assert chunks is None or (chunks // num_models >= cycle_length and chunks % (cycle_length * num_models) == 0)


@pytest.mark.parametrize(
    ("promoted", "discarded", "told"),
    [
        (0, 0, None),
        (0, 1, "the only chunk so far ended with a score (accuracy) that is not a finite number"),
        (0, 7, "all 7 chunks so far ended with a score (accuracy) that is not a finite number"),
        (1, 7, None),
    ],
    ids=["none has finished", "one, not a number", "seven, none a number", "one has entered the board"],
)
def test_the_user_is_warned_if_no_score_is_a_finite_number(promoted, discarded, told):
    lines = stopping.warnings({"promoted": promoted, "discarded": discarded, "failed": 3}, "accuracy")
    assert len(lines) == (told is not None)
    assert all(line.startswith(told) and "learning rate" in line and "precision" in line for line in lines)


@pytest.mark.parametrize(("count", "text"), [(0, "0 entries"), (1, "1 entry"), (2, "2 entries")])
def test_only_one_has_the_singular(count, text):
    assert counted(count, "entry", "entries") == text
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
    over = stopping.converged(progress, stop, metric)
    assert (over and over.state) == state
    assert over is None or reason in over.reason


@PROPERTY
@given(
    st.builds(Progress, st.integers(0, 20), st.none() | finite_scores, st.integers(0, 20)),
    st.builds(StopRules, st.none() | st.integers(1, 20), st.none() | finite_scores, st.none() | st.integers(1, 20)),
    metrics,
)
def test_a_run_that_is_over_stays_over_and_says_why(progress, stop, metric):
    over = stopping.converged(progress, stop, metric)
    assert (over is None) or (over.state in (RunState.CONVERGED, RunState.FINISHED, RunState.FAILED) and over.reason)
    assert stopping.converged(progress, NEVER, metric) is None
    if over is not None:
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


HELD_OR_OVER = [state for state in RunState if state not in (RunState.ACTIVE, RunState.DRAINING)]
CONVERGED = Over(RunState.CONVERGED, "the best accuracy has reached 0.6")


@pytest.mark.parametrize(
    ("now", "stopped", "state", "reason"),
    [
        pytest.param(99.9, None, None, None, id="before the deadline"),
        pytest.param(100.0, None, "finished", "its total_lifetime ended at 1970-01-01T00:01:40+00:00", id="at it"),
        pytest.param(0.0, CONVERGED, "converged", CONVERGED.reason, id="a stop rule holds"),
        pytest.param(100.0, CONVERGED, "converged", CONVERGED.reason, id="a stop rule holds and the lifetime is over"),
    ],
)
def test_an_active_run_until_100_is_over(now, stopped, state, reason):
    over = stopping.run_over(now, 100.0, stopped)
    assert (over and (over.state, over.reason)) == (state and (state, reason))


@pytest.mark.parametrize(
    ("state", "now", "open_jobs", "running_jobs", "ends_as"),
    [
        pytest.param("active", 0.0, 0, 0, None, id="an active run without jobs goes on, since it can be mended"),
        pytest.param("active", 100.0, 1, 0, None, id="a job in the queue will end it"),
        pytest.param("active", 100.0, 0, 0, "finished", id="the lifetime is over and no job is left"),
        pytest.param("draining", 0.0, 2, 1, None, id="a job still works"),
        pytest.param("draining", 0.0, 2, 0, "finished", id="no job works any more"),
        *(
            pytest.param(state, 100.0, 0, 0, None, id=f"a {state} run stays")
            for state in RunState
            if state not in ("active", "draining")
        ),
    ],
)
def test_a_run_until_100_whose_jobs_end_is_finished(state, now, open_jobs, running_jobs, ends_as):
    over = stopping.settled(RunState(state), now, 100.0, open_jobs, running_jobs)
    assert (over and over.state) == ends_as
