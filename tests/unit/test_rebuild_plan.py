"""The board that follows from records, as tables: the ratchet, the positions and the generations."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.errors import CheckpointError
from orchestrator.files.checkpoint_record import CheckpointRecord, parse
from orchestrator.leaderboard.rebuild_plan import GENERATION_GAP, RebuildPlan, plan
from orchestrator.profile import Metric, Profile

CYCLE = [Profile(name, 0.1, 0.9, 0.0) for name in ("a", "b", "c")]
MAX = Metric("accuracy", "max")


def file(generation: int, chunk: int | None = None) -> str:
    return f"g{generation:08d}-c{chunk or generation:08d}.pt"


def raw(generation: int, score: float | None, parent: int | None = None, position: int = 0, **more: Any) -> dict:
    chunk = more.pop("chunk", generation)
    return {
        "kind": "candidate", "file": file(generation, chunk), "sha256": "0" * 64, "size_bytes": 1, "chunk": chunk,
        "generation": generation, "worker": 0, "position": position, "profile": CYCLE[position % 3].name,
        "parent_file": file(parent) if parent else None, "created_at": float(generation), "score": score, "epochs": 1,
    } | more  # fmt: skip


def record(generation: int, score: float | None = 0.5, parent: int | None = None, position: int = 0, **more: Any):
    return parse(raw(generation, score, parent, position, **more))


def suspended(generation: int, parent: int | None = None, position: int = 0, **more: Any) -> CheckpointRecord:
    return record(generation, None, parent, position, kind="suspended", **more)


def planned(
    *records: CheckpointRecord, num_models: int = 2, metric: Metric = MAX, names: tuple[str, ...] = ()
) -> RebuildPlan:
    return plan(records, names, num_models, metric, CYCLE)


def board(result: RebuildPlan) -> list[int]:
    return [c.record.generation for c in result.board]


# --- who is on the board


@pytest.mark.parametrize(
    ("scores", "on_board"),
    [
        pytest.param([], [], id="none"),
        pytest.param([0.1], [1], id="one, while slots are free"),
        pytest.param([0.1, 0.2, 0.3], [2, 3], id="the best"),
        pytest.param([0.3, 0.2, 0.1], [1, 2], id="the best, in any order"),
        pytest.param([0.1, 0.1, 0.1], [1, 2], id="among equals those that came first"),
        pytest.param([0.1, 0.2, 0.2], [2, 3], id="equals of the best"),
    ],
)
def test_the_ratchet_decides_again(scores: list[float], on_board: list[int]) -> None:
    assert board(planned(*(record(n, s) for n, s in enumerate(scores, start=1)))) == on_board


def test_where_less_is_better_the_least_are_on_the_board() -> None:
    records = [record(n, s) for n, s in enumerate([0.3, 0.2, 0.1], start=1)]
    assert board(planned(*records, metric=Metric("loss", "min"))) == [2, 3]


def test_the_order_in_which_files_were_written_counts_and_not_that_of_the_claims() -> None:
    """If two scores are equal, the checkpoint that was written first keeps the slot."""
    slow, quick = record(1, 0.5, created_at=20.0), record(2, 0.5, created_at=10.0)
    assert board(planned(slow, quick, num_models=1)) == [2]


def test_of_two_with_the_same_position_the_later_claim_was_the_live_one() -> None:
    founder = record(1, 0.1)
    result = planned(founder, record(2, 0.9, parent=1, position=1), record(5, 0.3, parent=1, position=1))
    assert board(result) == [1, 5]


def test_a_checkpoint_with_descendants_was_admitted() -> None:
    founder, admitted = raw(1, 0.1), raw(2, 0.4, parent=1, position=1)
    child = record(6, 0.6, parent=2, position=2, ancestors=[founder, admitted])
    late = record(5, 0.9, parent=1, position=1)
    assert board(planned(record(1, 0.1), child, late, num_models=3)) == [1, 6]


# --- lineages and positions


def test_a_founder_starts_at_0_and_a_child_after_the_position_that_made_it() -> None:
    result = planned(record(1), record(4, 0.6, parent=1, position=5, ancestors=[raw(1, 0.5)]))
    entries = {c.record.generation: (c.start, c.floor, c.worked_on, c.founder) for c in result.checkpoints}
    assert entries == {1: (0, 1, 1, file(1)), 4: (6, 6, 0, file(1))}


def test_consumed_positions_are_passed_over_and_those_in_between_are_given_back() -> None:
    ancestors = [raw(1, 0.5)]
    children = [record(n, 0.6, parent=1, position=p, ancestors=ancestors) for n, p in ((2, 1), (3, 2), (6, 5))]
    result = planned(record(1), *children)
    assert [c.floor for c in result.checkpoints if c.record.generation == 1] == [3]
    assert [(gap.file, gap.position, gap.profile) for gap in result.gaps] == [(file(1), 3, "a"), (file(1), 4, "b")]


def test_ancestors_whose_files_are_gone_are_known_from_their_descendants() -> None:
    line = [raw(1, 0.1), raw(2, 0.2, parent=1, position=1)]
    result = planned(record(3, 0.3, parent=2, position=2, ancestors=line))
    assert [(c.record.generation, c.on_board, c.known, c.founder) for c in result.checkpoints] == [
        (1, False, True, file(1)), (2, False, True, file(1)), (3, True, True, file(1)),
    ]  # fmt: skip


def test_the_founder_of_a_line_without_records_is_unknown() -> None:
    result = planned(record(3, 0.3, parent=2, position=2))
    assert [(c.record.generation, c.on_board, c.known) for c in result.checkpoints] == [
        (2, False, False),
        (3, True, True),
    ]
    assert any(
        line == f"the founder of {file(3)} is unknown: no record holds their whole lineage" for line in result.notes
    )


# --- generations


def test_new_claims_have_generations_above_every_one_that_may_have_been_given() -> None:
    assert planned().generation == GENERATION_GAP
    assert planned(record(7)).generation == 7 + GENERATION_GAP
    names = (".tmp-g00000031-c00000009.pt-55", "g00000012-c00000002.json", "notes.txt")
    assert planned(record(7), names=names).generation == 31 + GENERATION_GAP


# --- suspended chunks


@pytest.mark.parametrize(
    ("chunk", "others", "goes_on"),
    [
        pytest.param(suspended(5), [], True, id="a founder's"),
        pytest.param(suspended(5, parent=1, position=1), [], True, id="of a parent that is complete"),
        pytest.param(suspended(5, parent=2, position=1), [], False, id="of a parent that is gone"),
        pytest.param(suspended(5, parent=1, position=1, profile="c"), [], False, id="of a profile that was amended"),
        pytest.param(
            suspended(5, parent=1, position=1, chunk=3),
            [record(6, 0.6, parent=1, position=1, chunk=3)],
            False,
            id="that was finished since",
        ),
        pytest.param(
            suspended(5, parent=1, position=1), [record(6, 0.6, parent=1, position=1)], False, id="that was done anew"
        ),
        pytest.param(
            suspended(5, parent=1, position=1, chunk=3),
            [suspended(7, parent=1, position=1, chunk=3)],
            False,
            id="that was suspended again since",
        ),
    ],
)
def test_a_suspended_chunk(chunk: CheckpointRecord, others: list[CheckpointRecord], goes_on: bool) -> None:
    result = planned(record(1), chunk, *others)
    assert (chunk in result.suspended) is goes_on
    assert any("must begin again" in line for line in result.notes) is not goes_on


# --- reading


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "else"}, "kind: Input should be 'candidate' or 'suspended'"),
        ({"chunk": None}, "chunk: Input should be a valid integer"),
        ({"generation": 2}, "belongs to another claim"),
        ({"file": "best.pt"}, "its file is named 'best.pt'"),
        ({"score": None}, "it has no finite score"),
        ({"score": float("nan")}, "it has no finite score"),
        ({"ancestors": [{}]}, "ancestors.0.kind: Field required"),
    ],
)
def test_a_record_that_is_not_valid_is_refused_with_the_reason(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"not a .*record: .*{message}"):
        parse(raw(1, 0.5) | change)
