"""A small board, and every kind of write that a worker can make with a claim."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from orchestrator.leaderboard.chains import JobStart
from orchestrator.leaderboard.leaderboard import Leaderboard
from orchestrator.records import Candidate, ChainJob, Claim, EpochResult, Started
from orchestrator.rules.checkpoint_names import SUFFIX, checkpoint_stem
from orchestrator.settings.settings import Settings
from tests.support.storage import Storage

CYCLE = ["a", "b", "a", "c"]
MAX_CHUNK_ATTEMPTS = 2
LEASE_S = 100.0
NEVER = 1_000_000


def make_board(storage: Storage, folder: Path, mode: str = "max", num_models: int = 2) -> Leaderboard:
    rates = {"a": 0.1, "b": 0.01, "c": 0.001}
    settings = Settings(
        name="run",
        num_models=num_models,
        training_profiles=[{"name": name, "learning_rate": rates[name]} for name in CYCLE],
        metric={"name": "measure", "mode": mode},
        stop_after_stale_cycles=None,
        max_chunk_attempts=MAX_CHUNK_ATTEMPTS,
    )
    return storage.make(folder, settings, durable=False)


def begin(board: Leaderboard, job: ChainJob, now: float) -> Started | str:
    start = JobStart(job.token, job.worker_id, f"c{job.job_id}", "node", 1, 0.0)
    return board.chains.start(start, now, max_failures=NEVER)


def candidate(claim: Claim, score: float, written: bool = True) -> Candidate:
    epochs = claim.parent_epochs + 1
    return Candidate(
        score=score,
        epochs=epochs,
        results=(EpochResult(epochs, 1.0, {"measure": score}),),
        train_seconds=1.0,
        file=file_of(claim) if written else None,
        sha256="0" * 64 if written else None,
        size_bytes=1 if written else 0,
    )


def file_of(claim: Claim) -> str:
    return checkpoint_stem(claim.generation, claim.chunk_id) + SUFFIX


# Every kind of write that a worker can make with a claim.
WRITES: dict[str, Callable[[Leaderboard, Claim, float], object]] = {
    "record a better score": lambda b, claim, now: b.board.record(claim, candidate(claim, 0.99), now),
    "record no file": lambda b, claim, now: b.board.record(claim, candidate(claim, 0.0, written=False), now),
    "suspend": lambda b, claim, now: b.board.suspend(claim, file_of(claim), "0" * 64, now),
    "give back": lambda b, claim, now: b.board.give_back(claim, "its disk is full", now),
    "condemn": lambda b, claim, now: b.board.condemn(claim, "damaged", now),
    "fail": lambda b, claim, now: b.board.fail(claim, "an exception", now),
}
