"""Mending with real processes: jobs that hang at their end, and jobs that were never submitted."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator.cli import launch
from orchestrator.cluster.host import host_name
from orchestrator.cluster.inline import InlineJob, InlineQueue
from orchestrator.cluster.local import LocalQueue
from orchestrator.errors import LeaderboardError
from orchestrator.leaderboard.chains import JobStart
from orchestrator.profile import Profile
from orchestrator.records import JobState, RunState, Started, Submitted
from orchestrator.rules.succession import EXIT_GRACE_S, ORPHANED_GRACE_S
from orchestrator.run.run import Run
from orchestrator.settings.settings import Settings
from orchestrator.worker.job_main import be_worker
from orchestrator.worker.mending import reconcile
from orchestrator.worker.opened_run import OpenedRun
from orchestrator.worker.trainer import StopFlag
from tests.support.small_runs import make_run
from tests.support.storage import Storage

SETTINGS = Settings(name="run", training_profiles=[Profile(name="a", learning_rate=0.1)], executor="local")


@pytest.fixture
def hangs() -> Iterator[psutil.Process]:
    """A process that does not end, like a process whose torch hangs on a broken GPU."""
    process = subprocess.Popen(["sleep", "60"])
    yield psutil.Process(process.pid)
    process.kill()
    process.wait()


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(("since_s", "stays"), [(EXIT_GRACE_S - 5, True), (EXIT_GRACE_S + 5, False)])
def test_a_job_that_hangs_after_it_reported_its_end_is_killed_since_its_successor_waits(
    tmp_path: Path, hangs: psutil.Process, since_s: float, stays: bool
) -> None:
    leaderboard = Storage(None).make(tmp_path, SETTINGS)
    chains, now = leaderboard.chains, time.time()
    (job,) = chains.add_workers([None], now - since_s)
    start = JobStart(job.token, 0, str(hangs.pid), host_name(), hangs.pid, hangs.create_time())
    started = chains.start(start, now - since_s, 5)
    assert isinstance(started, Started)
    assert started.successor is not None
    me = psutil.Process()  # takes the place of the waiting successor
    chains.submitted([Submitted(started.successor.job_id, "2", me.pid, me.create_time(), host_name())])
    chains.end(started.job, "no time is left", False, now - since_s, 5)

    reconcile(leaderboard, LocalQueue(SETTINGS, tmp_path, print), SETTINGS, now)
    time.sleep(0.2)
    assert alive(hangs) == stays


def orphan_a_successor(run: Run, now: float) -> None:
    """Make a job that was killed after it wrote its successor to the database and before it submitted the successor."""
    (job,) = run.leaderboard.chains.relink([0], now, 5)
    start = JobStart(job.token, 0, "1", host_name(), 999_999_999, now)  # no process has such a pid
    started = run.leaderboard.chains.start(start, now, 5)
    assert isinstance(started, Started)
    assert started.successor is not None


def states(run: Run) -> list[str]:
    """The states of the last two jobs."""
    return [row["state"] for row in run.leaderboard.reader.rows("job")][-2:]


def test_a_chain_is_mended_in_seconds_if_its_job_was_killed_before_it_queued_the_next(
    tmp_path: Path,
) -> None:
    run = make_run(Storage(None), tmp_path, executor="local", workers=1)
    now = time.time()
    orphan_a_successor(run, now)
    reconcile(run.leaderboard, InlineQueue(), run.settings, now + 1)
    assert states(run) == [JobState.LOST, JobState.SUBMITTING], "the cluster may have taken it"
    reconcile(run.leaderboard, InlineQueue(), run.settings, now + ORPHANED_GRACE_S + 1)
    assert states(run) == [JobState.LOST, JobState.LOST]


def test_launch_wait_ends_although_a_killed_job_left_a_successor_that_was_never_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(Storage(None), tmp_path, executor="local", workers=1)
    orphan_a_successor(run, time.time())
    reconcile(run.leaderboard, run.queue, run.settings, time.time())
    assert states(run) == [JobState.LOST, JobState.SUBMITTING]
    run.leaderboard.run_state.change_state(RunState.FINISHED, list(RunState), "all is trained", time.time())
    monkeypatch.setattr(launch, "MEND_EVERY_S", 0.0)
    launch._wait(run, quiet=True)
    assert not run.leaderboard.run_state.snapshot().open_jobs


def test_a_resume_does_not_give_up_jobs_that_another_resume_is_submitting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(Storage(None), tmp_path, executor="local", workers=1)
    run.pause(time.time())
    revive = run.leaderboard.run_state.revive

    def another_is_faster(workers: int) -> None:
        run.leaderboard.run_state.change_state(RunState.ACTIVE, list(RunState), None, time.time())
        assert run.leaderboard.chains.relink([0], time.time(), 5), "and has not called sbatch yet"
        revive(workers)

    monkeypatch.setattr(run.leaderboard.run_state, "revive", another_is_faster)
    assert run.resume(time.time()) == []
    assert states(run)[-1] == JobState.SUBMITTING


def test_a_job_that_was_being_submitted_at_a_pause_does_not_delay_the_resume(tmp_path: Path) -> None:
    run = make_run(Storage(None), tmp_path, executor="local", workers=1)
    run.leaderboard.chains.relink([0], time.time(), 5)  # the process that should submit this job has died
    run.leaderboard.run_state.change_state(RunState.PAUSED, list(RunState), None, time.time())
    run._queue = InlineQueue()
    run.resume(time.time())
    assert states(run)[-2:] != [JobState.SUBMITTING], "it was given up"
    assert JobState.LOST in states(run)


def test_launch_wait_survives_a_short_outage_of_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(Storage(None), tmp_path, executor="local", workers=1)
    run.leaderboard.run_state.change_state(RunState.FINISHED, list(RunState), "all is trained", time.time())
    status, answers = run.status, iter([False, False, True])

    def sometimes() -> dict[str, object]:
        if not next(answers):
            raise LeaderboardError("database or disk is full")
        return status()

    monkeypatch.setattr(run, "status", sometimes)
    launch._wait(run, quiet=False)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "database or disk is full; trying again"
    assert len(said) == 2, "said once; then how the run ended"


def test_launch_wait_ends_if_the_outage_of_the_database_lasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(Storage(None), tmp_path, executor="local", workers=1)
    (tmp_path / "orch.db").rename(tmp_path / "away")
    monkeypatch.setattr(launch, "PATIENCE_S", 0.0)
    with pytest.raises(LeaderboardError, match=r"orch\.db is missing.*Workers that are still running continue"):
        launch._wait(run, quiet=True)


def test_a_job_opens_its_run_once_and_uses_settings_that_were_amended_while_it_waited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = {"job": "tests.support.quick_job:Quick", "job_params": {"seconds": 0.0}}
    made = make_run(Storage(None), tmp_path / "run", executor="inline", **quick)
    (job,) = made.leaderboard.chains.relink([0], time.time(), 5)
    run = Run.open(made.folder)

    def amend(*_: object) -> None:
        made.amend(["stop_after_epochs=2"], time.time())
        monkeypatch.setattr(OpenedRun, "opened", None)  # a second opening would fail

    monkeypatch.setattr(InlineJob, "wait_turn", amend)
    be_worker(run, InlineJob(run.settings, job.token), 0, StopFlag())
    assert (run.version, run.settings.stop_after_epochs) == (2, 2)
    assert run.leaderboard.reader.counts()["epochs"] == 2
