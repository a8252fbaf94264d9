"""Failures of chunks and jobs: each is counted once, the training before it is kept, and a chain that can't work ends.
The leaderboard, files and worker loop are real; the trainer follows a script."""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pytest

from orchestrator.cluster.inline import InlineJob, InlineQueue
from orchestrator.files import checkpoints
from orchestrator.leaderboard.chains import JobStart
from orchestrator.records import ChainJob, EpochResult, Finished, Interrupted, Kept, Started, Submitted, Work
from orchestrator.run.repair import repair
from orchestrator.run.run import Run
from orchestrator.worker.loop import JobLoop
from orchestrator.worker.trainer import Ending, StopFlag, Trainer
from tests.support.invariants import violations
from tests.support.small_runs import host_name, lose, make_run, opened, this_process
from tests.support.storage import Storage


@dataclass
class Act:
    """One chunk of a script: it makes steps, and then finishes or raises an error."""

    error: BaseException | None = None
    steps: int = 3
    score: float = 0.5
    keeps: Sequence[str] = ()  # the states that are left after the error, the latest first
    before: Callable[[], object] = lambda: None  # called first, as user code is


@dataclass
class Scripted(Trainer):
    """The states are texts: that of the parent or the suspended file, and the text of each act."""

    acts: list[Act]
    stop: StopFlag
    worked: list[Work] = field(default_factory=list)
    began_with: list[str] = field(default_factory=list)
    act: Act = field(default_factory=Act)

    def train(
        self, work: Work, should_stop: Callable[[], bool], on_epoch: Callable[[EpochResult], None]
    ) -> Finished | Interrupted:
        self.act = self.acts.pop(0)
        source = work.suspended or work.parent
        self.worked.append(work)
        self.began_with.append(source.read_text() if source else "")
        self.act.before()
        for step in range(self.act.steps + 1):  # the last step is not completed
            if should_stop():
                return Interrupted(step)
            if step == self.act.steps and self.act.error is not None:
                raise self.act.error
        epochs = work.parent_epochs + work.epochs
        results = tuple(EpochResult(work.parent_epochs + i + 1, 0.5, {"accuracy": 0.5}) for i in range(work.epochs))
        if not self.acts:
            self.stop.reason = "the end of its script"
        return Finished(self.act.score, epochs, results, 0.5)

    def save(self, target: IO[bytes]) -> None:
        target.write(b"saved")

    def kept(self) -> Sequence[Kept]:
        def writer(text: str) -> Callable[[IO[bytes]], None]:
            def save(target: IO[bytes]) -> None:
                if text == "unreadable":
                    raise RuntimeError("CUDA error: the GPU does not answer")
                if text == "no room":
                    raise OSError(28, "No space left on device")
                target.write(text.encode())

            return save

        return [Kept(0, writer(text)) for text in self.act.keeps]


@dataclass
class Worked:
    """A job after its end."""

    ending: Ending
    trainer: Scripted

    @property
    def left(self) -> int:
        return len(self.trainer.acts)


def begin(run: Run, worker_id: int = 0) -> Started:
    """Begin a job of a worker."""
    chains, now = run.leaderboard.chains, time.time()
    (job,) = chains.relink([worker_id], now, 10**6)
    start = JobStart(job.token, worker_id, str(job.job_id), host_name(), *this_process())
    started = chains.start(start, now, 10**6, successor=False)
    assert isinstance(started, Started), started
    return started


def loop(run: Run, started: Started, open_trainer: Callable[[], Trainer], stop: StopFlag) -> JobLoop:
    of_the_job = copy.copy(run)
    of_the_job._queue = InlineQueue()
    return JobLoop(of_the_job, InlineJob(run.settings, started.job.token), open_trainer, time.time, stop)


def work(run: Run, *acts: Act, worker_id: int = 0, opening: BaseException | None = None) -> Worked:
    """Run one job of a worker. opening: raised when the job is opened."""
    stop = StopFlag()
    trainer = Scripted(list(acts), stop)

    def open_trainer() -> Trainer:
        if opening is not None:
            raise opening
        return trainer

    started = begin(run, worker_id)
    return Worked(loop(run, started, open_trainer, stop).work(started), trainer)


def lost(run: Run, *jobs: ChainJob) -> None:
    """The cluster proves that these jobs are gone."""
    run.leaderboard.chains.apply_mend(jobs, [], time.time(), {job.job_id: "gone" for job in jobs})


@pytest.fixture
def run(storage: Storage, tmp_path: Path) -> Iterator[Run]:
    made = make_run(storage, tmp_path / "run", workers=2, num_models=2, epochs_per_chunk=3)
    yield made
    storage.remove(made.leaderboard)


def chunks(run: Run) -> list[dict[str, Any]]:
    return run.leaderboard.reader.rows("chunk")


def failures(run: Run, worker_id: int = 0) -> int:
    return run.leaderboard.chains.workers()[worker_id].failures


def stopped(run: Run, worker_id: int = 0) -> str | None:
    return run.leaderboard.chains.workers()[worker_id].stopped


OOPS = ValueError("oops")


# --- what is kept


def test_a_failed_chunk_goes_on_from_its_kept_state_and_counts_as_one_failure(run: Run) -> None:
    done = work(run, Act(OOPS, keeps=["two epochs"]), Act())
    first, second = done.trainer.worked
    assert done.trainer.began_with == ["", "two epochs"]
    assert (second.chunk_id, second.position) == (first.chunk_id, first.position)
    assert [(c["state"], c["failures"], c["error"]) for c in chunks(run)] == [("promoted", 1, "ValueError: oops")]
    assert [e["data"]["error"] for e in run.leaderboard.reader.rows("event") if e["kind"] == "failed"] == [
        "ValueError: oops"
    ]
    assert violations(run, over=False) == []


def test_until_it_goes_on_the_chunk_is_suspended_and_its_error_is_shown(run: Run) -> None:
    work(run, Act(OOPS, keeps=["two epochs"]), Act(OOPS, steps=2))
    (chunk,) = chunks(run)
    assert (chunk["state"], chunk["failures"], failures(run)) == ("suspended", 2, 2)
    assert run.status()["last_error"] == "ValueError: oops"
    assert run.status()["last_error_at"] is not None
    assert violations(run, over=False) == []


def test_another_worker_goes_on_with_it(run: Run) -> None:
    work(run, Act(OOPS, keeps=["two epochs"]), Act(OOPS, steps=2))
    done = work(run, Act(), worker_id=1)
    assert done.trainer.began_with == ["two epochs"]
    assert [c["worker_id"] for c in chunks(run)] == [1]


def test_a_chunk_that_fails_again_goes_on_from_the_same_state_until_it_has_failed_too_often(run: Run) -> None:
    work(run, Act(score=0.5), Act(score=0.6))
    done = work(run, Act(OOPS, keeps=["one epoch"]), Act(OOPS))
    again = work(run, Act(OOPS), Act(score=0.7))
    assert done.trainer.began_with[1:] == again.trainer.began_with[:1] == ["one epoch"]
    assert [(c["state"], c["failures"]) for c in chunks(run)][2:] == [("discarded", 3), ("promoted", 0)]
    assert violations(run, over=False) == []


def test_a_founder_that_fails_too_often_makes_room_for_another_one(run: Run) -> None:
    work(run, Act(OOPS, keeps=["one epoch"]), Act(OOPS))
    work(run, Act(OOPS), Act())
    assert [(c["state"], c["failures"], c["entry_id"] is None) for c in chunks(run)] == [
        ("failed", 3, True),
        ("promoted", 0, False),
    ]
    assert violations(run, over=False) == []


def test_a_chunk_that_fails_later_goes_on_from_the_later_state_and_the_earlier_one_is_deleted(run: Run) -> None:
    done = work(run, Act(OOPS, keeps=["one epoch"]), Act(OOPS, keeps=["two epochs"]))
    assert done.trainer.began_with == ["", "one epoch"]
    (chunk,) = chunks(run)
    files = [path.read_text() for path in (run.folder / "checkpoints").glob("*.pt")]
    assert files == ["two epochs"]
    assert (run.folder / "checkpoints" / chunk["suspended_file"]).read_text() == "two epochs"


def test_a_chunk_that_was_suspended_and_then_fails_in_its_first_epoch_is_not_lost(run: Run) -> None:
    stop = StopFlag()

    def warned() -> None:
        stop.reason = "SIGUSR2"

    started = begin(run)
    loop(run, started, lambda: Scripted([Act(before=warned)], stop), stop).work(started)
    assert [(c["state"], c["failures"]) for c in chunks(run)] == [("suspended", 0)]
    assert work(run, Act(OOPS), Act()).trainer.began_with == ["saved", "saved"]
    assert [(c["state"], c["failures"]) for c in chunks(run)] == [("promoted", 1)]


@pytest.mark.parametrize("keeps", [["unreadable"], ["no room"], ["unreadable", "no room"], []])
def test_without_a_state_that_can_be_written_the_chunk_begins_again(run: Run, keeps: list[str]) -> None:
    done = work(run, Act(OOPS, keeps=keeps), Act())
    assert done.trainer.began_with == ["", ""]
    assert [(c["state"], c["failures"]) for c in chunks(run)] == [("failed", 1), ("promoted", 0)]
    assert violations(run, over=False) == []


def test_if_the_latest_state_can_not_be_written_the_one_before_it_is_used(run: Run) -> None:
    assert work(run, Act(OOPS, keeps=["unreadable", "one epoch"]), Act()).trainer.began_with == ["", "one epoch"]


def test_a_disk_budget_without_room_keeps_nothing(storage: Storage, tmp_path: Path) -> None:
    run = make_run(storage, tmp_path / "full", max_disk_gb=1e-9)
    done = work(run, Act(OOPS, keeps=["one epoch"]), Act(OOPS))
    assert done.trainer.began_with == ["", ""]
    assert [c["state"] for c in chunks(run)] == ["failed", "failed"]
    storage.remove(run.leaderboard)


def test_a_change_of_the_profiles_frees_the_position_of_a_failed_chunk(run: Run) -> None:
    profiles = [{"name": "other", "learning_rate": 1.0}]
    amend = Act(OOPS, keeps=["one epoch"], before=lambda: run.amend([f"training_profiles={json.dumps(profiles)}"], 1.0))
    run.pause(time.time())
    run.leaderboard.run_state.change_state("active", ["paused"], None, time.time())
    run._queue = InlineQueue()
    done = work(run, amend, Act())
    assert done.trainer.began_with == ["", ""]
    assert [c["state"] for c in chunks(run)] == ["failed", "promoted"]
    assert violations(run, over=False) == []


def test_a_claim_that_was_taken_away_keeps_nothing(run: Run) -> None:
    def take() -> None:
        lost(run, *(j for j in run.leaderboard.run_state.snapshot().open_jobs if j.worker_id == 0))

    work(run, Act(OOPS, keeps=["one epoch"], before=take))
    assert list((run.folder / "checkpoints").glob("*.pt")) == []
    assert [c["state"] for c in chunks(run)] == ["expired"]


def test_repair_finds_the_kept_state_of_a_failed_chunk(run: Run) -> None:
    work(run, Act())
    work(run, Act(OOPS, keeps=["one epoch"]), Act(OOPS, steps=2))
    lose(run)
    assert repair(run.folder, dry_run=False, force=False, now=time.time()).condition == "lost"
    again = opened(run.folder)
    again.leaderboard.run_state.change_state("active", ["paused"], None, time.time())
    assert work(again, Act()).trainer.began_with == ["one epoch"]
    assert violations(again, over=False) == []
    run.leaderboard = again.leaderboard


def test_collecting_files_leaves_the_kept_state(run: Run) -> None:
    work(run, Act(OOPS, keeps=["one epoch"]), Act(OOPS, steps=2))
    assert checkpoints.collect(run.folder / "checkpoints", run.leaderboard.reader.references) == []


def test_a_chunk_that_can_not_write_its_result_goes_on_from_the_state_that_it_was_resumed_from(run: Run) -> None:
    work(run, Act(OOPS, keeps=["one epoch"]), Act(OOPS, steps=2))
    folder = run.folder / "checkpoints"
    had = {path.name for path in folder.iterdir()}

    def full(path: Path, fill: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.files.checkpoints.publish", full)
        ending = work(run, Act()).ending
    assert (ending.error, "No space left" in ending.outcome) == (True, True)
    assert {path.name for path in folder.iterdir()} == had
    assert work(run, Act()).trainer.began_with == ["one epoch"]


# --- one failure is counted once


def test_an_error_that_leaves_the_process_unusable_is_one_failure(run: Run) -> None:
    """After a CUDA error, each call fails: the next chunk raises an error before its first step."""
    broken = RuntimeError("CUDA error: an illegal memory access was encountered")
    done = work(run, Act(broken, steps=3, keeps=["one epoch"]), Act(broken, steps=0), Act())
    assert (failures(run), done.left, done.ending.error) == (1, 1, False)
    assert work(run, Act()).trainer.began_with == ["one epoch"]
    assert [(c["state"], c["failures"]) for c in chunks(run)] == [("promoted", 1)]
    assert violations(run, over=False) == []


def test_two_errors_in_the_middle_of_chunks_are_two_failures(run: Run) -> None:
    done = work(run, Act(OOPS), Act(OOPS), Act())
    assert (failures(run), done.left) == (2, 1)


@pytest.mark.parametrize("keeps", [[], ["one epoch"]])
def test_a_job_that_dies_after_its_chunk_failed_is_one_failure(run: Run, keeps: list[str]) -> None:
    def dies(*_arguments: Any, **_more: Any) -> None:
        raise KeyError("the process ends before it reports its end")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JobLoop, "_finish", dies)
        with pytest.raises(KeyError):
            work(run, Act(OOPS, keeps=keeps), Act(OOPS, steps=0))
    lost(run, *(j for j in run.leaderboard.run_state.snapshot().open_jobs if j.worker_id == 0))
    assert failures(run) == 1


def test_a_job_that_vanishes_with_its_queued_successor_is_one_failure(run: Run) -> None:
    chains, now = run.leaderboard.chains, time.time()
    (job,) = chains.relink([0], now, 5)
    started = chains.start(JobStart(job.token, 0, "1", host_name(), *this_process()), now, 5)
    assert isinstance(started, Started)
    assert started.successor is not None
    chains.submitted([Submitted(started.successor.job_id, "2", *this_process(), host_name())])
    lost(run, *(j for j in run.leaderboard.run_state.snapshot().open_jobs if j.worker_id == 0))
    assert failures(run) == 1


def test_a_job_whose_claim_expired_at_the_end_of_its_lease_is_one_failure(run: Run) -> None:
    first, now = begin(run).job, time.time()
    run.leaderboard.board.claim(0, first.job_id, first.starts, now, now + 1)
    second = begin(run, worker_id=1).job
    run.leaderboard.board.claim(1, second.job_id, second.starts, now + 10, now + 100)
    assert [c["state"] for c in chunks(run)] == ["expired", "live"]
    lost(run, first)
    assert (failures(run), failures(run, worker_id=1)) == (1, 0)


def test_a_job_that_can_not_be_opened_is_one_failure(run: Run) -> None:
    assert work(run, opening=OSError("no such device")).ending.error
    assert failures(run) == 1


# --- anything that user code may raise

ANYTHING = [
    pytest.param(SystemExit("no more credits"), "SystemExit: no more credits", id="sys.exit with a text"),
    pytest.param(SystemExit(0), "SystemExit: 0", id="exit(0)"),
    pytest.param(SystemExit(), "SystemExit", id="exit()"),
    pytest.param(KeyboardInterrupt("stop"), "KeyboardInterrupt: stop", id="KeyboardInterrupt"),
    pytest.param(GeneratorExit("done"), "GeneratorExit: done", id="GeneratorExit"),
    pytest.param(BaseException("odd"), "BaseException: odd", id="BaseException"),
    pytest.param(ValueError("NUL \0, half \ud800"), "ValueError: NUL \ufffd, half \\ud800", id="odd characters"),
]


@pytest.mark.parametrize(("error", "shown"), ANYTHING)
def test_whatever_a_chunk_raises_is_its_failure_with_the_text_shown(run: Run, error: BaseException, shown: str) -> None:
    done = work(run, Act(error), Act())
    assert [(c["state"], c["error"]) for c in chunks(run)] == [("failed", shown), ("promoted", None)]
    assert done.ending.outcome == "stopped by the end of its script"


@pytest.mark.parametrize(("error", "shown"), ANYTHING)
def test_whatever_opening_the_job_raises_is_the_jobs_failure_with_the_text_shown(
    run: Run, error: BaseException, shown: str
) -> None:
    work(run, opening=error)
    assert run.leaderboard.reader.rows("job")[-1]["outcome"] == shown
    assert (failures(run), run.leaderboard.reader.rows("job")[-1]["state"]) == (1, "ended")


def test_user_code_that_ends_the_process_does_not_hide_that_the_job_was_told_to_stop(run: Run) -> None:
    stop = StopFlag()

    def warned() -> None:
        stop.reason = "SIGUSR2"
        sys.exit("the user's code")

    started = begin(run)
    trainer = Scripted([Act(before=warned), Act()], stop)
    assert loop(run, started, lambda: trainer, stop).work(started).outcome == "stopped by SIGUSR2"
    assert [(c["state"], c["error"]) for c in chunks(run)] == [("failed", "SystemExit: the user's code")]


# --- chains that can't work


def test_a_chain_ends_at_the_second_failure_before_a_first_step_that_looks_the_same(run: Run) -> None:
    mistakes = [ValueError(f"no layer at 0x{number:x}, line {number}") for number in (7, 8)]
    done = work(run, *(Act(error, steps=0) for error in mistakes), Act())
    assert (failures(run), done.left) == (2, 1)
    reason = "failed twice before its first step, in the same way: ValueError: no layer at 0x8, line 8"
    assert stopped(run) == reason
    assert run.leaderboard.chains.relink([0], time.time(), 5) == []
    assert stopped(run, worker_id=1) is None


def test_a_run_has_failed_when_all_its_chains_have_ended_in_this_way(run: Run) -> None:
    for worker_id in (0, 1):
        work(run, Act(OOPS, steps=0), Act(OOPS, steps=0), worker_id=worker_id)
    status = run.status()
    assert status["state"] == "failed"
    assert "failed twice before its first step, in the same way: ValueError: oops" in status["reason"]


def test_a_job_that_twice_can_not_be_opened_in_the_same_way_ends_its_chain(run: Run) -> None:
    for _ in range(2):
        work(run, opening=ImportError("No module named 'mine'"))
    assert stopped(run) == "failed twice before its first step, in the same way: ImportError: No module named 'mine'"


def test_a_resumed_run_tries_again(run: Run) -> None:
    for _ in range(2):
        work(run, opening=ImportError("No module named 'mine'"))
    run.leaderboard.run_state.revive(2)
    work(run, opening=ImportError("No module named 'mine'"))
    assert stopped(run) is None


@pytest.mark.parametrize(
    "acts",
    [
        pytest.param([Act(OOPS, steps=0), Act(TypeError("oops"), steps=0)], id="another error"),
        pytest.param([Act(OOPS, steps=0), Act(OOPS, steps=3)], id="the second time after a step"),
        pytest.param([Act(MemoryError(), steps=0)] * 2, id="an error of the node"),
        pytest.param([Act(OOPS, steps=1), Act(OOPS, steps=1)], id="both after a step"),
    ],
)
def test_other_failures_do_not_end_the_chain_at_once(run: Run, acts: list[Act]) -> None:
    work(run, *acts)
    assert (failures(run), stopped(run)) == (2, None)


@dataclass
class NeverAsks(Scripted):
    """Reports an epoch, and then fails, without having asked whether to stop."""

    def train(
        self, work: Work, should_stop: Callable[[], bool], on_epoch: Callable[[EpochResult], None]
    ) -> Finished | Interrupted:
        on_epoch(EpochResult(1, 0.5, {"accuracy": 0.5}))
        raise OOPS


def test_a_loop_that_does_not_ask_whether_to_stop_has_made_steps_if_it_has_reported_an_epoch(run: Run) -> None:
    stop, started = StopFlag(), begin(run)
    loop(run, started, lambda: NeverAsks([], stop), stop).work(started)
    assert (failures(run), stopped(run)) == (2, None)


def test_a_finished_chunk_between_them_ends_the_row(run: Run) -> None:
    work(run, Act(OOPS, steps=0), Act(), Act(OOPS, steps=0), Act())
    assert stopped(run) is None


def test_a_lost_job_between_them_ends_the_row(run: Run) -> None:
    work(run, opening=OOPS)
    lost(run, begin(run).job)
    work(run, opening=OOPS)
    assert (failures(run), stopped(run)) == (3, None)


# --- signals


@pytest.fixture
def handlers() -> Iterator[None]:
    had = {signum: signal.getsignal(signum) for signum in StopFlag.SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    yield
    for signum, handler in had.items():
        signal.signal(signum, handler)


def set_handlers() -> None:
    """Set handlers that end the process, as user code or a library may do."""
    for signum in StopFlag.SIGNALS:
        signal.signal(signum, lambda *_: sys.exit("the user's handler"))


@dataclass
class Warned(Scripted):
    """Gets a signal after its first step."""

    signum: int = 0

    def train(
        self, work: Work, should_stop: Callable[[], bool], on_epoch: Callable[[EpochResult], None]
    ) -> Finished | Interrupted:
        asked: list[bool] = []

        def warned() -> bool:
            asked.append(should_stop())
            if len(asked) == 2:
                os.kill(os.getpid(), self.signum)
            return asked[-1]

        return super().train(work, warned, on_epoch)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("signum", StopFlag.SIGNALS)
def test_a_warning_suspends_the_chunk_although_user_code_has_set_its_own_handlers(
    run: Run, signum: signal.Signals
) -> None:
    stop = StopFlag()
    stop.listen()
    trainer = Warned([Act(before=set_handlers)], stop, signum=signum)

    def open_trainer() -> Trainer:
        set_handlers()
        return trainer

    started = begin(run)
    assert loop(run, started, open_trainer, stop).work(started).outcome == f"stopped by {signum.name}"
    assert [c["state"] for c in chunks(run)] == ["suspended"]


@pytest.mark.usefixtures("handlers")
def test_ctrl_c_in_an_inline_launch_suspends_the_chunk_and_then_ends_the_launch(run: Run) -> None:
    had = [signal.getsignal(signum) for signum in StopFlag.SIGNALS]
    stop, started = StopFlag(), begin(run)
    trainer = Warned([Act()], stop, signum=signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop.listening():
        assert loop(run, started, lambda: trainer, stop).work(started).outcome == "stopped by SIGINT"
    assert [c["state"] for c in chunks(run)] == ["suspended"]
    assert [signal.getsignal(signum) for signum in StopFlag.SIGNALS] == had


@pytest.mark.usefixtures("handlers")
def test_a_second_ctrl_c_does_not_wait_for_the_step(run: Run) -> None:
    def press_twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    stop, started = StopFlag(), begin(run)
    trainer = Scripted([Act(before=press_twice)], stop)
    with pytest.raises(KeyboardInterrupt), stop.listening():
        loop(run, started, lambda: trainer, stop).work(started)
    assert [c["state"] for c in chunks(run)] == ["live"], "as after any other sudden death of the process"
