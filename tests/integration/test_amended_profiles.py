"""After an amendment of the profiles, no chunk continues under a profile other than the one that it started with."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.leaderboard.chains import JobStart
from orchestrator.records import ChunkState, ExpiredBy
from orchestrator.run.run import Run
from tests.support.invariants import violations
from tests.support.small_runs import CUT, make_run, work
from tests.support.storage import Storage

PROFILES = [{"name": name, "learning_rate": rate} for name, rate in (("a", 0.1), ("b", 0.01), ("c", 0.001))]
OTHERS = '[{"name": "d", "learning_rate": 0.5}, {"name": "e", "learning_rate": 0.05}]'
AMENDMENTS = {"the whole list": f"training_profiles={OTHERS}", "one rate": "training_profiles.0.learning_rate=0.7"}
each_amendment = pytest.mark.parametrize("override", AMENDMENTS.values(), ids=AMENDMENTS)


@pytest.fixture
def run(storage: Storage, tmp_path: Path) -> Iterator[Run]:
    made = make_run(storage, tmp_path / "run", executor="inline", workers=1, num_models=1, training_profiles=PROFILES)
    yield made
    storage.remove(made.leaderboard)


def chunks(run: Run) -> list[dict[str, Any]]:
    return run.leaderboard.reader.rows("chunk")


@each_amendment
def test_a_suspended_chunk_expires_and_its_position_is_free_again(run: Run, override: str) -> None:
    work(run, [0.5, 0.1, 0.1, 0.1, CUT])
    suspended = chunks(run)[-1]
    assert (suspended["state"], suspended["position"]) == (ChunkState.SUSPENDED, 4)

    run.amend([override], time.time())

    expired = chunks(run)[-1]
    assert (expired["chunk_id"], expired["state"]) == (suspended["chunk_id"], ChunkState.EXPIRED)
    assert (expired["expired_by"], expired["error"]) == (ExpiredBy.AMENDED, None)
    assert suspended["suspended_file"] not in run.leaderboard.reader.references()[0]
    assert run.status()["last_error"] is None
    work(run, [0.6])
    again = chunks(run)[-1]
    assert again["chunk_id"] != suspended["chunk_id"]
    profiles = run.settings.training_profiles
    assert (again["position"], again["profile"]) == (4, profiles[4 % len(profiles)].name)
    assert violations(run, over=False) == []


def test_a_suspended_chunk_goes_on_after_other_amendments(run: Run) -> None:
    work(run, [0.5, CUT])
    suspended = chunks(run)[-1]
    run.amend(["max_failures=7", "max_chunk_attempts=2"], time.time())
    assert chunks(run)[-1] == suspended
    work(run, [0.6])
    assert [c["state"] for c in chunks(run)] == [ChunkState.PROMOTED, ChunkState.PROMOTED]


@each_amendment
def test_a_chunk_that_is_trained_meanwhile_is_not_suspended_under_another_profile(run: Run, override: str) -> None:
    now = time.time()
    board, claim = run.leaderboard.board, claimed(run, now)
    run.amend([override], now)
    file = "g00000001-c00000001.pt"
    assert board.suspend(claim, file, "0" * 64, now) == (file,), "the caller deletes it"
    assert (chunks(run)[0]["state"], chunks(run)[0]["expired_by"]) == (ChunkState.EXPIRED, ExpiredBy.AMENDED)


@each_amendment
def test_a_chunk_that_was_resumed_before_begins_again_if_its_job_dies(run: Run, override: str) -> None:
    work(run, [CUT])
    now = time.time()
    claim = claimed(run, now)
    assert claim.suspended_file is not None
    run.amend([override], now)
    (job,) = [job for job in run.leaderboard.run_state.snapshot().open_jobs if job.state == "running"]
    run.leaderboard.chains.apply_mend([job], [], now, {job.job_id: "its job is gone"})
    assert (chunks(run)[0]["state"], chunks(run)[0]["expired_by"]) == (ChunkState.EXPIRED, ExpiredBy.JOB_GONE)


def claimed(run: Run, now: float) -> Any:
    """Start a job and return its claim."""
    (link,) = run.leaderboard.chains.relink([0], now, 10)
    started = start(run, link, now)
    return run.leaderboard.board.claim(0, started.job.job_id, started.job.starts, now, now + 100)


def start(run: Run, link: Any, now: float) -> Any:
    return run.leaderboard.chains.start(
        JobStart(link.token, 0, "1", "node", 1, 0.0), now, max_failures=10, successor=False
    )


def test_surplus_workers_come_back_and_those_that_failed_stay_stopped(storage: Storage, tmp_path: Path) -> None:
    run = make_run(storage, tmp_path / "many", executor="local", workers=3)
    now = time.time()
    run.leaderboard.run_state.change_state("paused", ["active"], None, now)
    run.leaderboard.chains.stop_worker(1, "the run was amended to too few GPUs", now)  # text that code must not read

    def stopped() -> list[bool]:
        return [worker.stopped is not None for worker in run.leaderboard.chains.workers()]

    run.amend(["workers=2"], now)
    assert stopped() == [False, True, True]
    run.amend(["workers=3"], now)
    assert stopped() == [False, True, False]
    storage.remove(run.leaderboard)
