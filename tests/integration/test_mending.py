"""What mending does about a job that has ended and is still there, with real processes."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator import rules
from orchestrator.cluster.local import LocalCluster, host_name
from orchestrator.mending import reconcile
from orchestrator.records import Started, Submitted
from orchestrator.settings import ProfileSettings, Settings
from tests.storage import Storage

SETTINGS = Settings(name="run", training_profiles=[ProfileSettings(name="a", learning_rate=0.1)], executor="local")


@pytest.fixture
def hangs() -> Iterator[psutil.Process]:
    """A process that has said its last word and does not end, as torch with a broken GPU does."""
    process = subprocess.Popen(["sleep", "60"])
    yield psutil.Process(process.pid)
    process.kill()
    process.wait()


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(("since_s", "stays"), [(rules.EXIT_GRACE_S - 5, True), (rules.EXIT_GRACE_S + 5, False)])
def test_a_job_that_does_not_end_after_its_last_word_is_killed_since_its_successor_waits(
    tmp_path: Path, hangs: psutil.Process, since_s: float, stays: bool
) -> None:
    leaderboard = Storage(None).make(tmp_path, SETTINGS)
    chains, now = leaderboard.chains, time.time()
    (job,) = chains.add_workers([None], now - since_s)
    place = (str(hangs.pid), host_name(), hangs.pid, hangs.create_time())
    started = chains.start(job.token, 0, *place, now - since_s, 5)
    assert isinstance(started, Started)
    assert started.successor is not None
    me = psutil.Process()  # stands for the successor, which waits
    chains.submitted([Submitted(started.successor.job_id, "2", me.pid, me.create_time(), host_name())])
    chains.end(started.job, "no time is left", False, now - since_s, 5)

    reconcile(leaderboard, LocalCluster(SETTINGS, tmp_path, print), SETTINGS, now)
    time.sleep(0.2)
    assert alive(hangs) == stays
