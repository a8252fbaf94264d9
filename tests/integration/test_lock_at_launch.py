"""Runs on both kinds of lock, launched from the command line, with a flock that works and one that does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.cli.launch import _refuse_changes
from orchestrator.errors import LockError, RunError, SettingsError
from orchestrator.locking.choice import Choice, record_path, write_record
from orchestrator.locking.soft_lock import SoftLock
from orchestrator.run.launch import launch
from orchestrator.run.run import Run
from tests.support.invariants import violations

ROOT = Path(__file__).parents[2]
ORCH = Path(sys.executable).with_name("orch")
QUICK = {
    "job": "tests.support.quick_job:Quick",
    "job_params": {"seconds": 0.05},
    "num_models": 3,
    "training_profiles": [{"name": "a", "learning_rate": 0.1}, {"name": "b", "learning_rate": 0.01}],
    "stop_after_epochs": 12,
    "stop_after_stale_cycles": None,
    "total_lifetime": 200,
    "eon_lifetime": 100,
    "workers": 2,
}


@pytest.fixture
def orch(tmp_path: Path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Runs `orch` in a new folder that contains quick.json, the settings of a quick job."""
    (tmp_path / "quick.json").write_text(json.dumps(QUICK))

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(ORCH), *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)} | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    yield run
    for process in psutil.process_iter(["cmdline"]):
        if any(str(tmp_path) in part for part in process.info["cmdline"] or ()):
            process.kill()


def launched(tmp_path: Path, **changes: Any) -> Run:
    from orchestrator.settings.settings import Settings

    settings = Settings.model_validate(QUICK | {"name": "quick", "executor": "inline", "workers": 1} | changes)
    return launch(settings, tmp_path / "runs", [str(ROOT)])


def test_two_workers_train_on_the_soft_lock(orch, tmp_path):
    done = orch("launch", "quick.json", "--executor", "local", "--wait", "--set", "lock=soft")
    assert done.returncode == 0, done.stderr
    run = Run.open(tmp_path / "runs/quick")
    assert violations(run) == []
    assert run.status()["state"] == "finished"
    assert run.status()["epochs"] >= 12
    assert {j["worker_id"] for j in run.leaderboard.reader.rows("job") if j["started_at"]} == {0, 1}
    assert run.leaderboard.database.lock_choice.kind == run.settings.lock == "soft"
    assert (run.folder / "orch.db.lock.filelock/claims").is_dir()
    assert "lock: soft lock (files), proven on" in done.stdout
    assert list((run.folder / "orch.db.lock.filelock/claims").iterdir()) == []


def test_status_shows_the_lock(orch, tmp_path):
    launched(tmp_path, lock="soft")
    shown = json.loads(orch("status", "quick", "--json").stdout)
    assert shown["lock"].startswith("soft lock (files), proven on")


def test_a_second_launch_keeps_the_chosen_lock_and_no_other_can_be_set(tmp_path):
    run = launched(tmp_path, lock="soft")
    _refuse_changes(run, run.settings.model_copy(update={"lock": "auto"}))
    with pytest.raises(RunError, match='lock: "soft" -> "flock"'):
        _refuse_changes(run, run.settings.model_copy(update={"lock": "flock"}))
    with pytest.raises(SettingsError, match="lock is fixed at launch"):
        run.amend(["lock=flock"], time.time())


@pytest.mark.parametrize(("wanted", "code"), [("auto", 0), ("flock", 2)])
def test_a_flock_that_does_nothing_is_detected_before_the_run_starts(orch, tmp_path, wanted, code):
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text("import fcntl\nfcntl.flock = lambda fd, operation: None\n")
    options = ["--executor", "inline", "--set", "stop_after_epochs=3", "--set", f"lock={wanted}"]
    done = orch("launch", "quick.json", *options, PYTHONPATH=os.pathsep.join([str(tmp_path / "site"), str(ROOT)]))
    assert done.returncode == code, done.stderr
    if code == 0:
        assert Run.open(tmp_path / "runs/quick").settings.lock == "soft"
    else:
        assert "fair flock: two processes got it at the same time" in done.stderr
        assert '"database": "postgresql+psycopg://' in done.stderr
        errors = [line for line in done.stderr.splitlines() if line.startswith("orch: ")]
        assert done.stderr.strip().endswith(errors[0]), "one clear error of one line"
        assert list((tmp_path / "runs").iterdir()) == []


def test_a_process_that_would_take_another_lock_does_not_open_the_run(tmp_path):
    run = launched(tmp_path, lock="soft")
    write_record(run.leaderboard.database.file, Choice("flock", "by hand"))
    with pytest.raises(RunError, match="mixing lock kinds gives no protection"):
        Run.open(run.folder)
    record_path(run.leaderboard.database.file).unlink()
    with pytest.raises(LockError, match="the soft lock was in use here"):
        Run.open(run.folder)


def test_a_run_without_its_settings_file_still_knows_its_lock(tmp_path):
    run = launched(tmp_path, lock="soft")
    (run.folder / "settings.json").unlink()
    assert Run.open(run.folder).leaderboard.database.lock_choice.kind == "soft"


def test_a_foreign_host_that_holds_the_lock_is_named_to_the_user(tmp_path):
    run = launched(tmp_path, lock="soft")
    held = SoftLock(f"{run.leaderboard.database.file}.lock", timeout=5).acquire()
    for claim in (run.folder / "orch.db.lock.filelock/claims").iterdir():
        lines = claim.read_text().split("\n")
        claim.write_text("\n".join([*lines[:2], "4711", b"node17".hex(), *lines[4:]]))
    run.leaderboard.database._lock.timeout = 0.1
    with pytest.raises(
        Exception, match=r"process 4711 on node17.*never removed because of its age.*ssh node17 ps -p 4711"
    ):
        run.summary()
    held.release()


def test_the_lock_for_a_database_elsewhere_is_proven_and_recorded_there(tmp_path):
    url = f"sqlite:///{tmp_path}/elsewhere/x.db"
    run = launched(tmp_path, lock="soft", database=url)
    assert record_path(tmp_path / "elsewhere/x.db").exists()
    assert not record_path(run.folder / "orch.db").exists()
    assert Run.open(run.folder).settings.lock == "soft"
