"""While a checkpoint is written, the worker trains the chunk that it will most likely claim next."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pytest

from orchestrator.cluster.inline import InlineJob, InlineQueue
from orchestrator.files import checkpoints
from orchestrator.leaderboard.chains import JobStart
from orchestrator.records import EpochResult, Finished, Interrupted, Kept, Started, Work
from orchestrator.run.run import Run
from orchestrator.worker.loop import JobLoop
from orchestrator.worker.trainer import Ending, StopFlag, Trainer
from tests.support.invariants import violations
from tests.support.small_runs import host_name, make_run, this_process
from tests.support.storage import Storage

STEPS = 4


class OnDemand(Future[Any]):
    """Writes at the latest when somebody waits for the result."""

    def __init__(self, run: Callable[[], None]) -> None:
        super().__init__()
        self._run = run

    def result(self, timeout: float | None = None) -> Any:
        self._run()
        return super().result(timeout)


class Later(Executor):
    """Writes each checkpoint when the test says so: at the given step of the chunk that trains meanwhile."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = OnDemand(self.run)

        def run() -> None:
            try:
                future.set_result(function(*args, **kwargs))
            except Exception as error:
                future.set_exception(error)

        self.waiting.append(run)
        return future

    def run(self) -> None:
        while self.waiting:
            self.waiting.pop(0)()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.run()


@dataclass
class Scripted(Trainer):
    """Trains STEPS steps a chunk. Calls `at` before each step; the scores rise."""

    background: Later
    written_at: int  # before which step of the next chunk the last checkpoint is complete; STEPS: after all of them
    at: Callable[[Scripted, Work, int], None] = lambda trainer, work, step: None
    state: dict[str, Any] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    begun: list[Work] = field(default_factory=list)
    claimed: list[Work] = field(default_factory=list)
    promoted: list[bool] = field(default_factory=list)

    def train(
        self, work: Work, should_stop: Callable[[], bool], on_epoch: Callable[[EpochResult], None]
    ) -> Finished | Interrupted:
        self.begun.append(work)
        source = work.suspended or work.parent
        self.state = {"epochs": 0, "line": []}
        if work.in_memory:
            self.state = json.loads(json.dumps(self.last))
        elif source:
            self.state = json.loads(Path(source).read_bytes())
        for step in range(STEPS):
            if step == self.written_at:
                self.background.run()
            self.at(self, work, step)
            if should_stop():
                return Interrupted(step)
        self.state["line"].append(work.profile.name)
        self.state["epochs"] += 1
        epochs = self.state["epochs"]
        if self.written_at >= STEPS:
            self.background.run()
        score = 0.5 + epochs / 1000
        result = EpochResult(epochs, 0.5, {"accuracy": score})
        on_epoch(result)
        return Finished(score, epochs, (result,), 0.5)

    def save(self, target: IO[bytes]) -> None:
        target.write(json.dumps(self.state).encode())

    def snapshot(self) -> Callable[[IO[bytes]], None]:
        self.last = self.state
        text = json.dumps(self.state).encode()

        def write(target: IO[bytes]) -> None:
            target.write(text)

        return write

    def confirmed(self, work: Work) -> None:
        self.claimed.append(work)

    def judged(self, promoted: bool) -> None:
        self.promoted.append(promoted)


def start(run: Run, worker_id: int = 0) -> Started:
    chains, now = run.leaderboard.chains, time.time()
    (job,) = chains.relink([worker_id], now, 10**6)
    begun = JobStart(job.token, worker_id, str(job.job_id), host_name(), *this_process())
    started = chains.start(begun, now, 10**6, successor=False)
    assert isinstance(started, Started), started
    return started


class ShortJob(InlineJob):
    """A job that works for 1,000 seconds."""

    def working_s(self) -> float:
        return 1000.0


def work(run: Run, trainer: Scripted, stop: StopFlag | None = None, clock: Callable[[], float] = time.time) -> Ending:
    started = start(run)
    run._queue = InlineQueue()
    this_job = ShortJob(run.settings, started.job.token)
    return JobLoop(run, this_job, lambda: trainer, clock, stop or StopFlag(), trainer.background).work(started)


def chunks(run: Run, *columns: str) -> list[tuple[Any, ...]]:
    return [tuple(str(row[column]) for column in columns) for row in run.leaderboard.reader.rows("chunk")]


def run_of(storage: Storage, tmp_path: Path, **changes: Any) -> Run:
    return make_run(storage, tmp_path / "run", **({"num_models": 1, "stop_after_epochs": 5} | changes))


@pytest.mark.parametrize("written_at", range(STEPS + 1))
def test_a_worker_goes_on_with_its_child_while_the_checkpoint_is_written(
    storage: Storage, tmp_path: Path, written_at: int
) -> None:
    run = run_of(storage, tmp_path)
    trainer = Scripted(Later(), written_at)
    work(run, trainer)
    assert [work.in_memory for work in trainer.begun] == [False, True, True, True, True]
    assert [(str(work.chunk_id),) for work in trainer.claimed] == chunks(run, "chunk_id")[1:]
    assert chunks(run, "position", "profile", "state") == [
        (str(position), profile, "promoted") for position, profile in enumerate(["a", "b", "a", "c", "a"])
    ]
    assert trainer.promoted == [True] * 5
    entry = run.board()["entries"][0]
    assert json.loads((run.folder / "checkpoints" / entry["file"]).read_bytes())["line"] == ["a", "b", "a", "c", "a"]
    assert run.status()["epochs"] == 5
    assert violations(run) == []


def test_founders_are_trained_ahead_too_where_their_seed_is_known(storage: Storage, tmp_path: Path) -> None:
    run = run_of(storage, tmp_path, num_models=3, stop_after_epochs=3)
    trainer = Scripted(Later(), 1)
    work(run, trainer)
    assert [(str(w.seed),) for w in trainer.begun] == chunks(run, "chunk_id")
    assert [w.tentative for w in trainer.begun] == [False, *[storage.url is None] * 2]
    assert violations(run) == []


def test_a_chunk_that_another_worker_claims_meanwhile_is_thrown_away(storage: Storage, tmp_path: Path) -> None:
    """The other worker takes the founder that this worker has begun."""
    run = run_of(storage, tmp_path, num_models=3, workers=2, stop_after_epochs=4)
    other = start(run, worker_id=1)

    def claim(trainer: Scripted, work: Work, step: int) -> None:
        if work.tentative and len(trainer.begun) == 2 and step == 1:
            at = (other.job.job_id, other.job.starts, time.time(), time.time() + 1000)
            run.leaderboard.board.claim(1, *at)

    trainer = Scripted(Later(), 2, claim)
    work(run, trainer)
    run.leaderboard.chains.end(other.job, "the end of the test", False, time.time(), 10**6)
    tentative, real = trainer.begun[1:3]
    if tentative.tentative:  # on a server, founders are not trained ahead
        assert (tentative.chunk_id, real.chunk_id) == (2, 3)
        assert not real.tentative
        assert chunks(run, "worker_id")[:3] == [("0",), ("1",), ("0",)]
    assert run.status()["epochs"] == 4  # those that were thrown away do not count
    assert violations(run) == []


def test_a_full_disk_gives_the_chunk_back_and_throws_the_training_ahead_away(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(storage, tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill_up(trainer: Scripted, work: Work, step: int) -> None:
        if len(trainer.begun) == 2 and step == 0:
            monkeypatch.setattr(checkpoints, "publish", full)

    ending = work(run, Scripted(Later(), 2, fill_up))
    assert ending.error
    assert "can't be written: No space left on device" in ending.outcome
    assert chunks(run, "chunk_id", "state") == [("1", "expired")]
    assert run.board()["entries"] == []
    assert violations(run) == []


@pytest.mark.parametrize("written_at", [0, 2, STEPS])
def test_a_signal_during_the_training_ahead_loses_no_finished_chunk(
    storage: Storage, tmp_path: Path, written_at: int
) -> None:
    run, stop = run_of(storage, tmp_path), StopFlag()

    def signal(trainer: Scripted, work: Work, step: int) -> None:
        if len(trainer.begun) == 3 and step == 1:
            stop.reason = "SIGUSR2"

    trainer = Scripted(Later(), written_at, signal)
    ending = work(run, trainer, stop)
    assert ending.outcome == "stopped by SIGUSR2"
    states = [state for (state,) in chunks(run, "state")]
    assert states == ["promoted", "promoted", *(["suspended"] if written_at == 0 else [])]
    assert violations(run) == []


class Keeps(Scripted):
    """Keeps the state with which a failed chunk began, as if it had finished an epoch."""

    def kept(self) -> Sequence[Kept]:
        return [Kept(0, self.save)]


@pytest.mark.parametrize("written_at", [0, 3, STEPS])
def test_an_error_in_the_training_ahead_keeps_what_the_trainer_has_kept(
    storage: Storage, tmp_path: Path, written_at: int
) -> None:
    run = run_of(storage, tmp_path)

    def fail(trainer: Scripted, work: Work, step: int) -> None:
        if len(trainer.begun) == 2 and step == 2:
            raise RuntimeError("out of memory")

    trainer = Keeps(Later(), written_at, fail)
    work(run, trainer)
    assert [work.suspended is not None for work in trainer.begun] == [False, False, True, False, False, False]
    assert chunks(run, "state", "failures") == [("promoted", str(int(number == 1))) for number in range(5)]
    entry = run.board()["entries"][0]
    assert json.loads((run.folder / "checkpoints" / entry["file"]).read_bytes())["line"] == ["a", "b", "a", "c", "a"]
    assert violations(run) == []


@pytest.mark.parametrize("written_at", [0, 3, STEPS])
def test_an_error_in_the_training_ahead_counts_once_and_only_if_the_chunk_was_claimed(
    storage: Storage, tmp_path: Path, written_at: int
) -> None:
    run = run_of(storage, tmp_path)

    def fail(trainer: Scripted, work: Work, step: int) -> None:
        if len(trainer.begun) == 2 and step == 2:
            raise RuntimeError("out of memory")

    work(run, Scripted(Later(), written_at, fail))
    assert [state for (state,) in chunks(run, "state")][:3] == ["promoted", "failed", "promoted"]
    assert run.status()["epochs"] == 5
    assert violations(run) == []


def test_an_amendment_meanwhile_is_taken_before_the_next_chunk(storage: Storage, tmp_path: Path) -> None:
    run = run_of(storage, tmp_path)

    def amend(trainer: Scripted, work: Work, step: int) -> None:
        if len(trainer.begun) == 2 and step == 1:
            Run.open(run.folder).amend(["epochs_per_chunk=2"], time.time())

    trainer = Scripted(Later(), 2, amend)
    work(run, trainer)
    assert [work.epochs for work in trainer.begun][:3] == [1, 1, 2]
    assert not trainer.begun[2].tentative
    assert violations(run) == []


@pytest.mark.parametrize("written_at", [1, STEPS])
def test_when_the_time_of_the_job_is_up_the_result_is_recorded_and_nothing_claimed(
    storage: Storage, tmp_path: Path, written_at: int
) -> None:
    run = run_of(storage, tmp_path)
    late = [0.0]

    def time_is_up(trainer: Scripted, work: Work, step: int) -> None:
        if len(trainer.begun) == 2 and step == 0:
            late[0] = 2000.0

    trainer = Scripted(Later(), written_at, time_is_up)
    ending = work(run, trainer, clock=lambda: time.time() + late[0])
    assert ending.outcome == "no time is left for another chunk"
    assert chunks(run, "state") == [("promoted",)]
    assert violations(run) == []


def begun_of(begun: Sequence[Work]) -> list[tuple[Any, ...]]:
    return [(w.profile.name, w.parent_file, w.seed) for w in begun]


def numbered(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Replace entry and parent by 0, 1, 2, ... in their order: a server's sequences skip what was rolled back."""
    numbers = [
        {value: place for place, value in enumerate(dict.fromkeys(column))}
        for column in list(zip(*rows, strict=True))[:2]
    ]
    return [(*(known[value] for known, value in zip(numbers, row, strict=False)), *row[2:]) for row in rows]


@pytest.mark.parametrize("num_models", [1, 2, 3])
def test_the_database_is_the_same_with_and_without_training_ahead(
    storage: Storage, tmp_path: Path, num_models: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for ahead in (True, False):
        run = make_run(storage, tmp_path / str(ahead), num_models=num_models, stop_after_epochs=9)
        trainer = Scripted(Later(), 1)
        if not ahead:
            monkeypatch.setattr(Scripted, "snapshot", lambda self: None)
        work(run, trainer)
        columns = ("entry_id", "parent_id", "position", "profile", "generation", "state", "score", "epochs")
        entries = [(e["rank"], e["score"], e["epochs"], e["profile"]) for e in run.board()["entries"]]
        results.append((numbered(chunks(run, *columns)), entries))
    assert results[0] == results[1]
