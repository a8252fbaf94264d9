"""The ratchet: first tables of inputs and results, then properties that hold for any input."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.records import Entry
from orchestrator.rules import admission
from orchestrator.rules.admission import Discard, Promote
from tests.support.rules import (
    ACCURACY,
    INF,
    LOSS,
    NAN,
    PROPERTY,
    boards,
    entry,
    metrics,
    scores,
)


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
    lowest = admission.worst(entries, metric)
    assert (lowest and lowest.entry_id) == expected


@PROPERTY
@given(boards(min_size=1), metrics, st.randoms(use_true_random=False))
def test_no_entry_is_worse_than_the_worst_in_any_order(entries, metric, random):
    lowest = admission.worst(entries, metric)
    assert lowest in entries
    assert not any(metric.better(lowest.score, than=other.score) for other in entries)
    shuffled = random.sample(entries, len(entries))
    assert admission.worst(shuffled, metric) == lowest


FULL = [entry(1, 0.70), entry(2, 0.60), entry(3, 0.65)]


@pytest.mark.parametrize(
    ("score", "entries", "num_models", "metric", "evicted"),
    [
        pytest.param(0.01, [], 3, ACCURACY, None, id="an empty board admits anything finite"),
        pytest.param(0.01, FULL[:2], 3, ACCURACY, None, id="a free slot admits what is worse than all"),
        pytest.param(0.60, FULL[:2], 3, ACCURACY, None, id="a free slot admits a tie"),
        pytest.param(0.61, FULL, 3, ACCURACY, 2, id="strictly better than the worst replaces the worst"),
        pytest.param(0.99, FULL, 3, ACCURACY, 2, id="better than the best still replaces the worst"),
        pytest.param(0.60 + 1e-12, FULL, 3, ACCURACY, 2, id="a very little better is better"),
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
        pytest.param(-INF, FULL, 3, LOSS, "loss is not finite", id="minus infinity is not a loss"),
        pytest.param(NAN, FULL, 3, LOSS, "not finite", id="NaN is not a loss"),
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
