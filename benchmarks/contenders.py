"""The stores that bookkeeping.py compares: orch, and other stores that do the same work for a chunk.

`prepare` creates an empty store. `open`, called in each process, returns two functions: one to call before training a
chunk, and one to call after it.
"""

from __future__ import annotations

import random
import sqlite3
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import insert, text, update

from orchestrator.leaderboard import schema
from orchestrator.leaderboard.chains import JobStart
from orchestrator.leaderboard.leaderboard import Leaderboard
from orchestrator.records import Candidate, Claim, EpochResult, Started
from orchestrator.rules.checkpoint_names import checkpoint_stem
from orchestrator.settings.settings import Settings

BOARD = 5  # number of models on the board
PROMOTED = 0.1  # share of chunks that are promoted
LEASE_S = 3600.0
BLOCK = 10_000  # chunks of history written per transaction

Begin = Callable[[], Any]
Finish = Callable[[Any], None]


class Contender(Protocol):
    """A store used by many processes."""

    name: str

    def prepare(self, folder: Path, workers: int) -> None: ...

    def drop(self, folder: Path) -> None:
        """Delete data that the store keeps outside the folder."""
        ...

    def open(self, folder: Path, number: int) -> tuple[Begin, Finish]:
        """Open the store in a new process. number: index of the process, from 0."""
        ...


@dataclass
class Orch:
    """Works like a worker: one transaction records a result and claims the next chunk. Chunks have one epoch each; a
    tenth of them are promoted, on a full board."""

    url: str | None = None
    history: int = 0  # number of finished chunks at the start
    name: str = "orch"
    _jobs: list[Started] = field(default_factory=list)
    _schema_name: str | None = None

    def prepare(self, folder: Path, workers: int) -> None:
        settings = Settings.model_validate(
            {
                "name": "bench",
                "num_models": BOARD,
                "stop_after_stale_cycles": None,
                "training_profiles": [{"name": f"p{i}", "learning_rate": 0.1 / (i + 1)} for i in range(13)],
            }
        )
        now = time.time()
        self._schema_name = f"bench_{uuid.uuid4().hex[:12]}" if self.url else None
        place = (folder, self.url, self._schema_name)
        Leaderboard.create(*place, settings=settings, import_paths=[], now=now, deadline=now + 1e6)
        board = self._leaderboard(folder)
        self._jobs.clear()
        for job in board.chains.add_workers([None] * workers, now):
            start = JobStart(job.token, job.worker_id, f"c{job.job_id}", "node", 1, 0.0)
            started = board.chains.start(start, now, 3)
            assert isinstance(started, Started)
            self._jobs.append(started)
        add_history(board, self.history, now)
        begin, finish = self.open(folder, 0)
        for _ in range(BOARD):
            finish(begin())

    def drop(self, folder: Path) -> None:
        Leaderboard.discard(folder, self.url, self._schema_name, schema_too=True)

    def _leaderboard(self, folder: Path) -> Leaderboard:
        return Leaderboard.open(folder, self.url, self._schema_name)

    def open(self, folder: Path, number: int) -> tuple[Begin, Finish]:
        board = self._leaderboard(folder).board
        job = self._jobs[number].job
        draw = random.Random(number)
        following: list[Claim] = []

        def begin() -> Claim:
            if following:
                return following.pop()
            now = time.time()
            claim = board.claim(job.worker_id, job.job_id, job.starts, now, now + LEASE_S)
            assert isinstance(claim, Claim)
            return claim

        def finish(claim: Claim) -> None:
            now = time.time()
            better = claim.bar is None or draw.random() < PROMOTED
            score = now if better else 0.0  # each promoted score is higher than all earlier scores
            epochs = claim.parent_epochs + 1
            _, after = board.record_and_claim(
                claim,
                Candidate(
                    score=score,
                    epochs=epochs,
                    results=(EpochResult(epochs, 60.0, metrics_of(score)),),
                    train_seconds=60.0,
                    file=f"{checkpoint_stem(claim.generation, claim.chunk_id)}.pt" if better else None,
                    sha256="0" * 64 if better else None,
                    size_bytes=100_000_000 if better else 0,
                ),
                job.job_id,
                job.starts,
                now,
                now + LEASE_S,
            )
            assert isinstance(after, Claim)
            following.append(after)

        return begin, finish


def metrics_of(score: float) -> dict[str, float]:
    return {"accuracy": score, "loss": 1.25, "train_loss": 1.0, "gpu_utilization": 0.9}


@dataclass
class OptunaRdb:
    """Calls ask, suggest_float and tell with the random sampler, which reads no history."""

    name: str = "optuna-rdb"

    def _storage(self, folder: Path) -> Any:
        import optuna

        # sqlite3 gives up after 5 s by default, which is too short for 64 processes.
        return optuna.storages.RDBStorage(
            f"sqlite:///{folder / 'optuna.db'}", engine_kwargs={"connect_args": {"timeout": 60}}
        )

    def prepare(self, folder: Path, workers: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        optuna.create_study(storage=self._storage(folder), study_name="bench", direction="maximize")

    def drop(self, folder: Path) -> None:
        pass

    def open(self, folder: Path, number: int) -> tuple[Begin, Finish]:
        import optuna

        study = optuna.load_study(
            study_name="bench", storage=self._storage(folder), sampler=optuna.samplers.RandomSampler(seed=number)
        )

        def begin() -> tuple[Any, float]:
            trial = study.ask()
            return trial, trial.suggest_float("learning_rate", 0.0, 1.0)

        return begin, lambda asked: study.tell(*asked)


@dataclass
class OptunaJournal(OptunaRdb):
    """Like OptunaRdb, but with an append-only journal file."""

    name: str = "optuna-journal"

    def _storage(self, folder: Path) -> Any:
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        return JournalStorage(JournalFileBackend(str(folder / "journal.log")))


@dataclass
class RawSqlite:
    """The minimum work: two durable transactions of one statement each, on a persistent connection."""

    name: str = "raw-sqlite"

    def prepare(self, folder: Path, workers: int) -> None:
        with sqlite3.connect(folder / "raw.db") as connection:
            connection.execute("CREATE TABLE chunk (chunk_id INTEGER PRIMARY KEY, state TEXT, at REAL)")
        connection.close()

    def drop(self, folder: Path) -> None:
        pass

    def open(self, folder: Path, number: int) -> tuple[Begin, Finish]:
        connection = sqlite3.connect(folder / "raw.db", isolation_level=None, timeout=60)
        connection.execute("PRAGMA journal_mode=DELETE")
        connection.execute("PRAGMA synchronous=FULL")

        def begin() -> int | None:
            connection.execute("BEGIN IMMEDIATE")
            done = connection.execute("INSERT INTO chunk (state, at) VALUES ('live', ?)", (time.time(),))
            connection.execute("COMMIT")
            return done.lastrowid

        def finish(chunk_id: int | None) -> None:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("UPDATE chunk SET state = 'discarded' WHERE chunk_id = ?", (chunk_id,))
            connection.execute("COMMIT")

        return begin, finish


# --- a long run's rows -------------------------------------------------------------------------------


def add_history(board: Leaderboard, chunks: int, now: float) -> None:
    """Add finished chunks with their epochs and events. Every tenth chunk was promoted and has since left the board.

    The entries of each block are the parents of the next block. The database assigns all ids, counting from 1.
    """
    done = entries = 0
    parents = range(0)
    while done < chunks:
        size = min(BLOCK, chunks - done)
        rows = [_chunk_row(done + i, parents, i, now) for i in range(size)]
        promoted = [done + i + 1 for i in range(0, size, 10)]
        with board.database.transaction() as tx:
            tx.execute(insert(schema.chunk), rows)
            tx.execute(insert(schema.epoch), [_epoch_row(done + i + 1, now) for i in range(size)])
            tx.execute(insert(schema.checkpoint), [_checkpoint_row(i, parents, n, now) for n, i in enumerate(promoted)])
            tx.execute(insert(schema.entry), [_entry_row(entries + 1 + n, now) for n in range(len(promoted))])
            tx.execute(insert(schema.event), [_event_row(i, entries + 1 + n, now) for n, i in enumerate(promoted)])
        parents = range(entries + 1, entries + 1 + len(promoted))
        entries += len(promoted)
        done += size
    if chunks:
        with board.database.transaction() as tx:
            tx.execute(insert(schema.job), [_job_row(link, now) for link in range(2, 3 + chunks // 100)])
            tx.execute(update(schema.run).values(generation=chunks, epochs=chunks))
            if board.database.file is None:  # stands in for the autovacuums of a run of this length
                tx.execute(text("ANALYZE"))


Row = Mapping[str, Any]


def _chunk_row(number: int, parents: range, i: int, now: float) -> Row:
    parent = parents[i // 10 % len(parents)] if parents else None
    return {
        "entry_id": parent, "parent_id": parent, "position": i % 10, "profile": f"p{i % 13}", "worker_id": 0,
        "job_id": 1, "generation": number + 1, "state": "discarded" if i % 10 else "promoted", "claimed_at": now,
        "lease_until": now + LEASE_S, "finished_at": now, "train_seconds": 60.0, "epochs": 1, "score": -1.0,
    }  # fmt: skip


def _epoch_row(chunk_id: int, now: float) -> Row:
    return {"chunk_id": chunk_id, "number": 1, "seconds": 60.0, "metrics": metrics_of(-1.0)}


def _checkpoint_row(chunk_id: int, parents: range, n: int, now: float) -> Row:
    return {
        "chunk_id": chunk_id, "parent_id": parents[n % len(parents)] if parents else None, "founder_id": 1,
        "worker_id": 0, "epochs": 1, "score": -1.0, "profile": "p0", "metrics": metrics_of(-1.0),
        "file": f"old-{chunk_id:08d}.pt", "sha256": "0" * 64, "size_bytes": 100_000_000, "created_at": now,
        "released": True,
    }  # fmt: skip


def _entry_row(checkpoint_id: int, now: float) -> Row:
    return {
        "checkpoint_id": checkpoint_id, "start_position": 0, "floor": 10, "worked_on": 10, "promoted_at": now,
        "on_board": False, "evicted_at": now,
    }  # fmt: skip


def _event_row(chunk_id: int, entry_id: int, now: float) -> Row:
    data = {"score": -1.0, "position": 0, "profile": "p0", "epochs": 1, "evicted": None, "entries": BOARD}
    return {
        "at": now, "kind": "promoted", "worker_id": 0, "chunk_id": chunk_id, "entry_id": entry_id,
        "data": data | {"worst": -1.0, "best": -1.0},
    }  # fmt: skip


def _job_row(link: int, now: float) -> Row:
    return {
        "worker_id": 0, "link": link, "token": f"old-{link}", "state": "ended", "starts": 1, "submitted_at": now,
        "started_at": now, "ended_at": now, "outcome": "done",
    }  # fmt: skip
