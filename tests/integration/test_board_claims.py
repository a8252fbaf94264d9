"""What a claim, its result and the death of its worker do to the board, on both databases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import StaleClaimError
from orchestrator.leaderboard.leaderboard import Leaderboard
from orchestrator.records import ChainJob, Claim, Started
from tests.support.boards import LEASE_S, MAX_CHUNK_ATTEMPTS, WRITES, begin, candidate, file_of, make_board
from tests.support.storage import Storage


@dataclass
class Scene:
    """A run with two running workers."""

    storage: Storage
    board: Leaderboard
    running: list[ChainJob]
    waiting: list[ChainJob]
    now: float = 1000.0

    def claim(self, worker_id: int = 0) -> Claim:
        job = self.running[worker_id]
        claim = self.board.board.claim(worker_id, job.job_id, job.starts, self.now, self.now + LEASE_S)
        assert isinstance(claim, Claim)
        return claim

    def record(self, claim: Claim, score: float) -> bool:
        return self.board.board.record(claim, candidate(claim, score), self.now).promoted

    def entry_of(self, claim: Claim) -> dict[str, Any]:
        """Return the entry of this claim's promoted candidate."""
        (row,) = [row for row in self.board.reader.entries() if row["file"] == file_of(claim)]
        return row

    def begin(self, job: ChainJob) -> None:
        started = begin(self.board, job, self.now)
        assert isinstance(started, Started)
        self.running[job.worker_id] = started.job


@pytest.fixture
def scene(tmp_path: Path, storage: Storage) -> Scene:
    board = make_board(storage, tmp_path, num_models=1)
    started = [begin(board, job, 1000.0) for job in board.chains.add_workers([None, None], 1000.0)]
    return Scene(storage, board, [s.job for s in started], [s.successor for s in started])


# Events by which worker 0 loses its claim.
DEATHS: dict[str, Callable[[Scene], object]] = {
    "its lease ends": lambda scene: setattr(scene, "now", scene.now + LEASE_S + 1),
    "its successor begins": lambda scene: scene.begin(scene.waiting[0]),
    "its job is requeued": lambda scene: scene.begin(scene.running[0]),
    "its job is gone": lambda scene: scene.board.chains.apply_mend(
        [scene.running[0]], [], scene.now, {scene.running[0].job_id: "its job is gone"}
    ),
}
each_death = pytest.mark.parametrize("dies", DEATHS.values(), ids=DEATHS)


def test_a_founder_consumes_position_0_by_its_own_chunk_and_goes_on_at_1(scene):
    founding = scene.claim()
    assert founding.position == 0
    assert scene.record(founding, 0.5)
    assert scene.entry_of(founding)["start_position"] == 0
    assert scene.claim().position == 1


def test_a_promoted_child_starts_after_the_position_that_made_it(scene):
    scene.record(scene.claim(), 0.5)
    scene.record(scene.claim(), 0.1)
    scene.record(scene.claim(), 0.1)
    child = scene.claim()
    assert child.position == 3
    assert scene.record(child, 0.6)
    assert scene.entry_of(child)["start_position"] == 4
    grandchild = scene.claim()
    assert (grandchild.parent_file, grandchild.position) == (file_of(child), 4)


def test_two_workers_never_hold_the_same_position(scene):
    scene.record(scene.claim(), 0.5)
    assert [scene.claim(0).position, scene.claim(1).position] == [1, 2]


@each_death
def test_the_position_of_a_worker_that_dies_is_taken_next(scene, dies):
    scene.record(scene.claim(), 0.5)
    lost = scene.claim(0)
    later = scene.claim(1)
    scene.record(later, 0.1)
    assert (lost.position, later.position) == (1, 2)
    dies(scene)
    assert [scene.claim(1).position, scene.claim(1).position] == [1, 3]


@each_death
def test_a_suspended_chunk_outlives_the_worker_that_went_on_with_it(scene, dies):
    scene.record(scene.claim(), 0.5)
    first = scene.claim(0)
    scene.board.board.suspend(first, file_of(first), "0" * 64, scene.now)
    second = scene.claim(0)
    assert (second.chunk_id, second.suspended_file) == (first.chunk_id, file_of(first))
    dies(scene)
    third = scene.claim(1)
    assert (third.chunk_id, third.position, third.suspended_file) == (first.chunk_id, 1, file_of(first))
    assert third.generation > second.generation > first.generation


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@each_death
def test_what_a_zombie_writes_is_refused_and_changes_nothing(scene, dies, write):
    scene.record(scene.claim(), 0.5)
    zombie = scene.claim(0)
    dies(scene)
    heir = scene.claim(1)  # an expired lease is taken away when another worker claims
    assert heir.position == zombie.position
    before = scene.storage.contents(scene.board)
    with pytest.raises(StaleClaimError, match=f"generation {zombie.generation} of worker 0 is stale"):
        write(scene.board, zombie, scene.now)
    assert scene.storage.contents(scene.board) == before
    assert scene.record(heir, 0.6)


def test_a_result_and_the_next_claim_in_one_are_what_they_are_one_after_the_other(scene):
    first = scene.claim()
    job = scene.running[0]
    at = (job.job_id, job.starts, scene.now, scene.now + LEASE_S)
    outcome, second = scene.board.board.record_and_claim(first, candidate(first, 0.5), *at)
    assert outcome.promoted
    assert (second.position, second.parent_file, second.generation) == (1, file_of(first), first.generation + 1)
    outcome, third = scene.board.board.record_and_claim(second, candidate(second, 0.4), *at)
    assert not outcome.promoted
    assert (third.position, third.parent_file) == (2, file_of(first))
    before = scene.storage.contents(scene.board)
    with pytest.raises(StaleClaimError):  # the call neither records nor claims
        scene.board.board.record_and_claim(second, candidate(second, 0.9), *at)
    assert scene.storage.contents(scene.board) == before


def test_a_position_that_fails_too_often_is_consumed_and_the_next_one_comes(scene):
    scene.record(scene.claim(), 0.5)
    for _ in range(MAX_CHUNK_ATTEMPTS):
        claim = scene.claim()
        assert claim.position == 1
        scene.board.board.fail(claim, "an exception", scene.now)
    assert scene.claim().position == 2


def test_an_entry_that_is_dropped_gives_a_run_that_had_converged_work_again(scene):
    scene.record(scene.claim(), 0.5)
    for _ in range(3):
        scene.record(scene.claim(), 0.1)
    assert scene.board.run_state.row()["chunks_since_promotion"] == 3
    scene.board.board.condemn(scene.claim(), "damaged", scene.now)
    assert scene.board.run_state.row()["chunks_since_promotion"] == 0


def test_the_files_of_a_parent_stay_while_its_child_is_trained_though_it_lost_its_place(scene):
    founding = scene.claim()
    scene.record(founding, 0.5)
    held = scene.claim(0)
    better = scene.claim(1)
    assert scene.record(better, 0.6)
    files, _ = scene.board.reader.references()
    assert files == {file_of(founding), file_of(better)}
    outcome = scene.board.board.record(held, candidate(held, 0.1), scene.now)
    assert outcome.collectable == (file_of(founding),)
    assert scene.board.reader.references() == ({file_of(better)}, set())
