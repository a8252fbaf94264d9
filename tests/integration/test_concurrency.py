"""Many processes use one leaderboard: no result is lost or counted twice, and no process starves. A process that was
stopped and continues after its lease has ended is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.files import checkpoints
from orchestrator.leaderboard.leaderboard import Leaderboard
from orchestrator.records import Claim, Started
from orchestrator.settings.settings import Settings
from tests.support import invariants
from tests.support.boards import begin, file_of
from tests.support.storage import TABLES, Storage

# No process may wait longer for one call. This is far longer than one turn of all processes takes on a busy machine.
PATIENCE_S = 10.0
SECONDS = 1.0  # how long the processes claim and record
ZOMBIES_LEASE_S = 0.5
NUM_MODELS = 5

# Forks a process for each job. Each process claims and ends chunks until the time is up. Then it writes what it did,
# its errors and its longest wait to a file. Commits do not wait for the disk, because these tests do not need that.
MANY_WORKERS = """
import collections, json, multiprocessing, random, sys, time
from pathlib import Path
import sqlalchemy
from orchestrator.leaderboard.leaderboard import Leaderboard
from orchestrator.records import Candidate, EpochResult
from tests.support.boards import file_of
from tests.support.storage import do_not_wait_for_the_disk

folder, url, schema, jobs, seconds = json.loads(sys.argv[1])
folder = Path(folder)

def work(worker_id, job_id, starts, barrier):
    leaderboard = Leaderboard.open(folder, url, schema)
    if url is None:
        sqlalchemy.event.listen(leaderboard.database._engine, "connect", do_not_wait_for_the_disk)
    board, draw, did, errors, longest = leaderboard.board, random.Random(worker_id), collections.Counter(), [], 0.0
    barrier.wait(60)
    end = time.monotonic() + seconds
    claim = None
    while time.monotonic() < end or claim is not None:
        now, before = time.time(), time.monotonic()
        try:
            if claim is None:
                claim = board.claim(worker_id, job_id, starts, now, now + 3600)
                did["claim"] += 1
            else:
                mine, claim = claim, None
                did[finish(board, mine, draw, now)] += 1
        except Exception as error:
            errors.append(repr(error))
            claim = None
        longest = max(longest, time.monotonic() - before)
    (folder / f"did-{worker_id}.json").write_text(json.dumps([did, errors, longest]))

def finish(board, claim, draw, now):
    kind = draw.choices(["record", "suspend", "give back", "fail"], [85, 5, 5, 5])[0]
    if kind == "suspend":
        board.suspend(claim, file_of(claim), "0" * 64, now)
    elif kind == "give back":
        board.give_back(claim, "no reason", now)
    elif kind == "fail":
        board.fail(claim, "an exception", now)
    else:
        score, epochs = draw.random(), claim.parent_epochs + 1
        if draw.random() < 0.1 or claim.bar is None:
            score += claim.bar or 0.0
        board.record(claim, Candidate(score, epochs, (EpochResult(epochs, 1.0, {"accuracy": score}),), 1.0,
                                      file_of(claim), "0" * 64, 1), now)
    return kind

context = multiprocessing.get_context("fork")
barrier = context.Barrier(len(jobs))
workers = [context.Process(target=work, args=(*job, barrier)) for job in jobs]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
"""

# Makes a claim, prints it, and waits for a line from the test. Then it tries every kind of write that a worker makes.
ZOMBIE = """
import json, sys, time
from pathlib import Path
from orchestrator.errors import StaleClaimError
from orchestrator.leaderboard.leaderboard import Leaderboard
from orchestrator.records import Candidate, EpochResult
from tests.support.boards import file_of

folder, url, schema, (worker_id, job_id, starts), lease_s = json.loads(sys.argv[1])
board = Leaderboard.open(Path(folder), url, schema).board
now = time.time()
claim = board.claim(worker_id, job_id, starts, now, now + lease_s)
file = file_of(claim)
print(json.dumps([claim.generation, claim.position, file]), flush=True)
sys.stdin.readline()
(Path(folder) / "checkpoints" / file).write_bytes(b"written too late")
candidate = Candidate(9.0, 2, (EpochResult(2, 1.0, {"accuracy": 9.0}),), 1.0, file, "0" * 64, 1)
writes = {
    "record": lambda: board.record(claim, candidate, time.time()),
    "suspend": lambda: board.suspend(claim, file, "0" * 64, time.time()),
    "give back": lambda: board.give_back(claim, "no reason", time.time()),
    "condemn": lambda: board.condemn(claim, "damaged", time.time()),
    "fail": lambda: board.fail(claim, "an exception", time.time()),
}
for name, write in writes.items():
    try:
        write()
    except StaleClaimError as refusal:
        print(json.dumps([name, str(refusal)]), flush=True)
"""


def settings() -> Settings:
    profiles = [{"name": name, "learning_rate": 0.1} for name in ("a", "b", "c")]
    return Settings.model_validate(
        {
            "name": "run",
            "num_models": NUM_MODELS,
            "training_profiles": profiles,
            "stop_after_stale_cycles": None,
            "max_chunk_attempts": 2,
        }
    )


@pytest.fixture
def board(storage: Storage, tmp_path: Path) -> Iterator[Leaderboard]:
    (tmp_path / "checkpoints").mkdir()
    board = storage.make(tmp_path, settings(), durable=False)
    yield board
    storage.remove(board)


def start_workers(board: Leaderboard, number: int) -> list[tuple[int, int, int]]:
    """Start workers. Returns (worker id, job id, number of starts) of each."""
    now = time.time()
    started = [begin(board, job, now) for job in board.chains.add_workers([None] * number, now)]
    assert all(isinstance(s, Started) for s in started)
    return [(s.job.worker_id, s.job.job_id, s.job.starts) for s in started]


def run_script(script: str, storage: Storage, board: Leaderboard, folder: Path, *more: Any) -> subprocess.Popen[str]:
    arguments = json.dumps([str(folder), storage.url, board.database.schema_name, *more])
    return subprocess.Popen(
        [sys.executable, "-c", script, arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


@pytest.mark.parametrize(
    ("storage", "processes"),
    [("sqlite", 2), ("sqlite", 16), ("sqlite", 64), ("postgresql", 16)],
    indirect=["storage"],
)
def test_processes_that_claim_and_record_all_the_time_lose_nothing_and_none_of_them_starves(
    storage: Storage, board: Leaderboard, tmp_path: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = start_workers(board, processes)
    with run_script(MANY_WORKERS, storage, board, tmp_path, workers, SECONDS) as processes_:
        processes_.communicate()
    assert processes_.returncode == 0
    reports = [json.loads((tmp_path / f"did-{worker_id}.json").read_text()) for worker_id, _, _ in workers]
    assert [error for _, errors, _ in reports for error in errors] == [], "such as: database is locked"
    assert max(longest for _, _, longest in reports) < PATIENCE_S
    assert all(did["claim"] > 0 for did, _, _ in reports)

    did: Counter[str] = sum((Counter(counts) for counts, _, _ in reports), Counter())
    tables = dict(zip(TABLES, storage.rows(board, *TABLES), strict=True))
    run, chunks = tables["run"][0], tables["chunk"]
    recorded = [c for c in chunks if c["epochs"] is not None]
    assert (len(recorded), len(tables["epoch"]), run["epochs"]) == (did["record"],) * 3
    assert run["generation"] == did["claim"]
    kinds = Counter(event["kind"] for event in tables["event"])
    assert (kinds["suspended"], kinds["expired"], kinds["failed"]) == (did["suspend"], did["give back"], did["fail"])
    assert kinds["promoted"] == len(tables["checkpoint"]) == sum(c["state"] == "promoted" for c in chunks)
    assert sum(bool(entry["on_board"]) for entry in tables["entry"]) == NUM_MODELS
    assert not [c for c in chunks if c["state"] == "live"]
    for table in tables.values():
        for row in table:
            for name in ("data", "metrics"):
                if isinstance(row.get(name), str):
                    row[name] = json.loads(row[name])
    # A worker reads the clock before it waits for the lock, and the waits are longer here than in a run.
    monkeypatch.setattr(invariants, "CLOCK_S", PATIENCE_S)
    checks = (invariants._worst_never_falls, invariants._positions, invariants._generations, invariants._epochs)
    assert [line for check in checks for line in check(tables)] == []


def test_a_worker_that_was_stopped_past_its_lease_is_refused_every_write_and_its_files_are_deleted(
    storage: Storage, board: Leaderboard, tmp_path: Path
) -> None:
    sleeper, heir = start_workers(board, 2)
    with run_script(ZOMBIE, storage, board, tmp_path, sleeper, ZOMBIES_LEASE_S) as zombie:
        assert zombie.stdin is not None
        assert zombie.stdout is not None
        generation, position, file = json.loads(zombie.stdout.readline())
        os.kill(zombie.pid, signal.SIGSTOP)
        time.sleep(ZOMBIES_LEASE_S)
        now = time.time()
        claim = board.board.claim(*heir, now, now + 3600)
        assert isinstance(claim, Claim)
        assert claim.position == position
        assert claim.generation > generation
        before = storage.rows(board, *TABLES)
        os.kill(zombie.pid, signal.SIGCONT)
        refused = dict(json.loads(line) for line in zombie.communicate("go on\n")[0].splitlines())
    assert set(refused) == {"record", "suspend", "give back", "condemn", "fail"}
    assert all(f"generation {generation} of worker {sleeper[0]} is stale" in why for why in refused.values())
    assert storage.rows(board, *TABLES) == before
    (tmp_path / "checkpoints" / file_of(claim)).write_bytes(b"of a live claim")
    assert checkpoints.collect(tmp_path / "checkpoints", board.reader.references) == [file]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [file_of(claim)]
