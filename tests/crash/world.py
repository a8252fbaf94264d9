"""Simulates the surroundings of one run: a queue in a file, a clock with predetermined times, and a trainer with known
scores. Everything else is orch's own code: the worker, the database and the files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import IO, Any

from orchestrator.cluster.protocol import JobQueue, ThisJob
from orchestrator.files.run_folder import FOLDERS, SETTINGS_NAME
from orchestrator.leaderboard import chains
from orchestrator.leaderboard.board import Outcome
from orchestrator.leaderboard.chains import JobStart
from orchestrator.leaderboard.leaderboard import Leaderboard
from orchestrator.records import (
    Candidate,
    ChainJob,
    Claim,
    EpochResult,
    Evidence,
    Finished,
    Interrupted,
    Over,
    Started,
    Submitted,
    Work,
)
from orchestrator.run.run import Run
from orchestrator.settings.loading import freeze
from orchestrator.settings.settings import Settings
from orchestrator.worker.loop import JobLoop
from orchestrator.worker.trainer import Ending, StopFlag, Trainer

STEPS, TICK_S, JOB_S, LIMIT_S = 8, 0.05, 2.0, 900.0
BETWEEN_JOBS_S = 1000.0  # longer than a lease
SETTINGS = Settings.model_validate(
    {
        "name": "world", "job": "tests.crash.world:Scripted", "executor": "local", "num_models": 2, "workers": 1,
        "training_profiles": [{"name": name, "learning_rate": 0.1} for name in ("a", "b", "a")],
        "stop_after_stale_cycles": None, "stop_after_epochs": 9, "total_lifetime": 1e9, "max_failures": 30,
    }
)  # fmt: skip


class AtOnce(Executor):
    """Writes a checkpoint when it is asked to, not in another thread: the order of the calls must not vary."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class Scripted(Trainer):
    """A trainer whose chunks alternate: one is better than its parent, the next has the score 0."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}
        self.last: dict[str, Any] = {}

    def train(
        self, work: Work, should_stop: Callable[[], bool], on_epoch: Callable[[EpochResult], None]
    ) -> Finished | Interrupted:
        source = work.suspended or work.parent
        self.state = {"epochs": 0, "score": 0.1}
        if work.in_memory:
            self.state = dict(self.last)
        elif source:
            self.state = json.loads(Path(source).read_bytes())
        self.state.setdefault("step", 0)
        while self.state["step"] < STEPS:
            if should_stop():
                return Interrupted(self.state["step"])
            self.state["step"] += 1
        score = self.state["score"] + 0.01 if work.seed % 2 else 0.0
        epochs = self.state["epochs"] + 1
        self.state = {"epochs": epochs, "score": score}
        return Finished(score, epochs, (EpochResult(epochs, 0.1, {"accuracy": score}),), 0.1)

    def save(self, target: IO[bytes]) -> None:
        target.write(json.dumps(self.state).encode())

    def snapshot(self) -> Callable[[IO[bytes]], None]:
        self.last = dict(self.state)
        text = json.dumps(self.last).encode()

        def write(target: IO[bytes]) -> None:
            target.write(text)

        return write


class Queue(JobQueue):
    """Simulates Slurm's queue in a file: a list of {"token": ..., "state": "queued", "running" or "gone"}."""

    name = "slurm"

    def __init__(self, file: Path) -> None:
        self.file = file

    def listed(self) -> list[dict[str, str]]:
        listed: list[dict[str, str]] = json.loads(self.file.read_text()) if self.file.exists() else []
        return listed

    def mark(self, token: str, state: str) -> None:
        self.file.write_text(json.dumps([{**j, "state": state} if j["token"] == token else j for j in self.listed()]))

    def next_up(self) -> str | None:
        """Return the token of the first queued job. Marks a running job as gone, because afterany waits for its end."""
        self.file.write_text(
            json.dumps([{**j, "state": "gone"} if j["state"] == "running" else j for j in self.listed()])
        )
        return next((j["token"] for j in self.listed() if j["state"] == "queued"), None)

    def submit(self, jobs: Sequence[ChainJob], after: ChainJob | None) -> list[Submitted]:
        self.file.write_text(json.dumps([*self.listed(), *({"token": j.token, "state": "queued"} for j in jobs)]))
        return [Submitted(j.job_id, f"c-{j.token}") for j in jobs]

    def evidence(self, jobs: Sequence[ChainJob]) -> dict[int, Evidence]:
        states = {j["token"]: j["state"] for j in self.listed()}
        known = {"queued": Evidence.QUEUED, "running": Evidence.RUNNING}
        return {j.job_id: known.get(states.get(j.token, "gone"), Evidence.GONE) for j in jobs}

    def find(self, jobs: Sequence[ChainJob]) -> dict[str, str]:
        alive = {j["token"] for j in self.listed() if j["state"] != "gone"}
        return {j.token: f"c-{j.token}" for j in jobs if j.token in alive}

    def cancel(self, jobs: Sequence[ChainJob], now: bool) -> list[str]:
        for job in jobs:
            self.mark(job.token, "gone")
        return []


class Job(ThisJob):
    """A job that works for JOB_S seconds of the simulated clock."""

    def working_s(self) -> float:
        return JOB_S

    def latest_work_s(self) -> float:
        return JOB_S

    def time_limit_s(self) -> float:
        return LIMIT_S

    def cores(self) -> int:
        return 1

    def token(self) -> str:
        raise AssertionError("the world gives the job its token")

    def identity(self) -> tuple[str, str]:
        return "c", "node"


@dataclass
class World:
    """The run runs/world, the file of the queue, and the results that were reported as recorded (promises)."""

    folder: Path  # holds runs/, queue.json and promises
    jobs: int = 0  # number of jobs that have run; the time depends on it
    promises: list[str] = field(default_factory=list)

    @property
    def run_folder(self) -> Path:
        return self.folder / "runs" / SETTINGS.name

    @property
    def queue(self) -> Queue:
        return Queue(self.folder / "queue.json")

    def now(self) -> float:
        return 1e6 + self.jobs * BETWEEN_JOBS_S

    def clock(self) -> Callable[[], float]:
        ticks: Iterator[int] = count(1)
        start = self.now()
        return lambda: start + TICK_S * next(ticks)

    def open(self) -> Run:
        run = Run.open(self.run_folder)
        run._queue = self.queue
        return run

    def found(self) -> None:
        """Create the run, with its first job in the queue."""
        self.run_folder.mkdir(parents=True, mode=0o700)
        for part in FOLDERS:
            (self.run_folder / part).mkdir(mode=0o700)
        text = freeze(SETTINGS)
        (self.run_folder / SETTINGS_NAME).write_text(text)
        now = self.now()
        Leaderboard.create(self.run_folder, None, None, settings=SETTINGS, import_paths=[], now=now, deadline=now + 1e9)
        self.open().resume(self.now())

    def work(self) -> Ending | str:
        """Run the next job of the queue, from its start to its end."""
        same_names(self.jobs, 1)
        queue = self.queue
        token = queue.next_up()
        if token is None:
            return "the queue is empty"
        queue.mark(token, "running")
        run = self.open()
        clock = self.clock()
        start = JobStart(token, 0, f"c-{token}", "node", 1, 0.0)
        started = run.leaderboard.chains.start(start, clock(), SETTINGS.max_failures)
        if not isinstance(started, Started):
            queue.mark(token, "gone")
            return started
        self._watch(run.leaderboard)
        trainer = Scripted()
        ending = JobLoop(run, Job(SETTINGS), lambda: trainer, clock, StopFlag(), AtOnce()).work(started)
        queue.mark(token, "gone")
        return ending

    def _watch(self, leaderboard: Leaderboard) -> None:
        """Write down each outcome that `record` returns as a promise: the database must keep it, whatever happens."""
        board, promises = leaderboard.board, self.folder / "promises"
        record, record_and_claim = board.record, board.record_and_claim

        def promised(claim: Claim, candidate: Candidate, outcome: Outcome) -> None:
            with open(promises, "a") as file:
                what = "promoted" if outcome.promoted else "discarded"
                file.write(f"{claim.chunk_id} {what} {candidate.score:.4f}\n")

        def watched(claim: Claim, candidate: Candidate, now: float) -> Outcome:
            outcome = record(claim, candidate, now)
            promised(claim, candidate, outcome)
            return outcome

        def watched_and_claim(claim: Claim, candidate: Candidate, *asker: Any) -> tuple[Outcome, Claim | Over]:
            outcome, following = record_and_claim(claim, candidate, *asker)
            promised(claim, candidate, outcome)
            return outcome, following

        board.record = watched  # type: ignore[method-assign]
        board.record_and_claim = watched_and_claim  # type: ignore[method-assign]

    def broken_promises(self, run: Run) -> list[str]:
        known = {
            f"{c['chunk_id']} {c['state']} {c['score']:.4f}"
            for c in run.leaderboard.reader.rows("chunk")
            if c["score"] is not None
        }
        file = self.folder / "promises"
        made = file.read_text().splitlines() if file.exists() else []
        return [f"recorded and lost: chunk {promise}" for promise in made if promise not in known]

    def mend(self) -> Run:
        """Mend the run as `orch status` does, after the running job has died."""
        self.jobs += 1
        same_names(self.jobs, 2)
        self.queue.next_up()
        run = self.open()
        run.reconcile(self.now(), grace_s=0.0)
        return run

    def finish(self) -> Run:
        """Run one job after another until the run is over."""
        for _ in range(30):
            run = self.mend()
            if run.leaderboard.run_state.snapshot().state != "active":
                return run
            self.work()
        raise AssertionError("the run does not end")


def same_names(jobs: int, by: int) -> None:
    """Make tokens that do not depend on earlier crashes, so that the results of different crashes can be compared.
    by: 1 for the job, 2 for the process that mends, so that no token is used twice."""
    numbers = count(1)

    def base() -> str:
        return f"{jobs:06d}{by}{next(numbers):04d}"

    chains.new_base = base


def dump(run: Run) -> Mapping[str, Any]:
    """Return everything that the rest of the run depends on."""
    reader = run.leaderboard.reader
    tables = ("run", "job", "checkpoint", "entry", "chunk", "epoch", "event")
    files = {p.name: p.read_bytes().hex() for p in sorted((run.folder / "checkpoints").iterdir())}
    return {
        **{table: reader.rows(table) for table in tables},
        "files": files,
        "workers": run.leaderboard.chains.workers(),
    }
