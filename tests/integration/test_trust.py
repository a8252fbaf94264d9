"""Who may read and write a run: file modes whatever the umask, runs shared with a group, folders that are refused."""

from __future__ import annotations

import grp
import json
import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.cluster.foreign import ForeignQueue
from orchestrator.errors import RunError, SettingsError, SubmissionError
from orchestrator.files import permissions
from orchestrator.records import Evidence
from orchestrator.run.launch import launch
from orchestrator.run.models import export_entry
from orchestrator.run.run import Run
from orchestrator.settings.loading import load
from orchestrator.settings.settings import Settings

ROOT = Path(__file__).parents[2]
ORCH = Path(sys.executable).with_name("orch")
AS_ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not AS_ROOT, reason="only root can make files of another user")
QUICK = {
    "name": "quick",
    "job": "tests.support.quick_job:Quick",
    "job_params": {"seconds": 0.05},
    "num_models": 2,
    "training_profiles": [{"name": "a", "learning_rate": 0.1}],
    "stop_after_epochs": 4,
    "stop_after_stale_cycles": None,
    "total_lifetime": 200,
    "eon_lifetime": 100,
    "executor": "inline",
}


def a_group_of_mine() -> str:
    """Return a group of the user, if possible not the primary one. For root any group will do."""
    mine = sorted({os.getegid(), *os.getgroups()})
    gid = 100 if AS_ROOT else mine[-1]
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        pytest.skip(f"the group {gid} has no name on this machine")


def launched(runs_dir: Path, **changes: Any) -> Run:
    return launch(Settings.model_validate(QUICK | changes), runs_dir, [str(ROOT)])


def rights(folder: Path) -> dict[str, set[str]]:
    """Return the modes (octal, without the sticky bit) of a run's folders, files and lock claims."""
    found: dict[str, set[str]] = {"folders": set(), "files": set(), "claims": set()}
    for path in (folder, *folder.rglob("*")):
        mode = stat.S_IMODE(path.lstat().st_mode)
        claims = ".lock.filelock" in str(path)  # filelock makes these with the sticky bit
        found["claims" if claims else "folders" if path.is_dir() else "files"].add(f"{mode & ~0o1000:o}")
    return found


@pytest.fixture
def umask() -> Iterator[Callable[[int], None]]:
    before = os.umask(0o022)
    yield lambda value: (os.umask(value), None)[1]
    os.umask(before)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users can reach; pytest's own folders are private."""
    folder = Path(tempfile.mkdtemp(prefix="orch-trust-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in part for part in process.info["cmdline"] or ()):
            process.kill()
    shutil.rmtree(folder)


# --- rights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
@pytest.mark.parametrize("shared", [False, True], ids=["private", "a group's"])
@pytest.mark.parametrize("lock", ["flock", "soft"])
def test_a_new_run_has_its_rights_whatever_the_umask(tmp_path, umask, mask, shared, lock):
    umask(mask)
    run = launched(tmp_path / "runs", group=a_group_of_mine() if shared else None, lock=lock)
    found = rights(run.folder)
    assert found["folders"] == {"2770" if shared else "700"}
    assert found["files"] == {"660" if shared else "600"}


@pytest.mark.parametrize(("mask", "shared", "lock"), [(0o000, False, "flock"), (0o077, True, "soft")])
def test_all_files_of_local_jobs_have_the_run_s_rights(tmp_path, mask, shared, lock):
    settings = QUICK | {"group": a_group_of_mine() if shared else None, "lock": lock, "workers": 2}
    (tmp_path / "quick.json").write_text(json.dumps(settings))
    command = [str(ORCH), "launch", "quick.json", "--executor", "local", "--wait"]
    done = subprocess.run(
        command, cwd=tmp_path, umask=mask, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/quick"
    assert sum(1 for _ in folder.glob("jobs/*/*log.out")) >= 2
    assert sum(1 for _ in folder.glob("jobs/*/*.pkl")) >= 2
    assert sum(1 for _ in folder.glob("checkpoints/*.pt")) >= 1
    found = rights(folder)
    assert found["folders"] == {"2770" if shared else "700"}
    assert found["files"] == {"660" if shared else "600"}
    assert found["claims"] <= {"2770", "660", "2750", "640", "700", "600"}
    if shared:
        gid = grp.getgrnam(a_group_of_mine()).gr_gid
        assert {path.stat().st_gid for path in folder.rglob("*")} == {gid}


def test_the_runs_folder_itself_is_made_as_the_user_makes_folders(tmp_path, umask):
    umask(0o027)
    launched(tmp_path / "a/runs")
    assert f"{stat.S_IMODE((tmp_path / 'a/runs').stat().st_mode):o}" == "750"
    assert os.umask(0o027) == 0o027, "a launch leaves the process's umask as it was"


def test_an_exported_model_has_the_rights_of_the_user_s_other_files(tmp_path, monkeypatch, umask):
    monkeypatch.setattr(permissions, "_umask_at_start", None)
    umask(0o022)
    permissions.use_umask(tmp_path)
    with permissions.users_umask():
        (tmp_path / "best.pt").touch()
    (tmp_path / "of-the-run").touch()
    modes = {path.name: f"{stat.S_IMODE(path.stat().st_mode):o}" for path in tmp_path.iterdir()}
    assert modes == {"best.pt": "644", "of-the-run": "600"}
    assert export_entry  # the function that `orch export` calls inside users_umask


def test_a_run_is_refused_on_a_file_system_that_ignores_permissions(tmp_path, monkeypatch):
    monkeypatch.setattr(permissions, "PRIVATE", 0o777)  # the mode of every folder on such a mount
    with pytest.raises(RunError, match="keeps no permissions: choose another --runs-dir"):
        launched(tmp_path / "runs")
    assert list((tmp_path / "runs").iterdir()) == []


# --- folders that are refused ------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["", "settings.json", "orch.db", "orch.db.lock.json", "checkpoints", "jobs", "logs"])
def test_a_run_that_everybody_may_write_is_not_opened_and_the_error_has_the_command_that_corrects_it(tmp_path, part):
    run = launched(tmp_path)
    (run.folder / part).chmod((run.folder / part).stat().st_mode | stat.S_IWOTH)
    with pytest.raises(RunError, match="can be written by everybody") as caught:
        Run.open(run.folder)
    command = str(caught.value).partition("then run: ")[2].partition(". (")[0]
    assert command == f"chmod -R o-w {run.folder}"
    subprocess.run(command, shell=True, check=True)
    assert Run.open(run.folder).name == "quick"


def test_a_database_outside_the_run_folder_is_checked_too(tmp_path):
    run = launched(tmp_path / "runs", database=f"sqlite:///{tmp_path}/x.db")
    (tmp_path / "x.db").chmod(0o666)
    with pytest.raises(RunError, match=r"x\.db can be written by everybody"):
        Run.open(run.folder)


def test_a_folder_that_others_may_only_read_is_opened(tmp_path):
    run = launched(tmp_path)
    subprocess.run(["chmod", "-R", "go+rX,g+w", str(run.folder)], check=True)  # as old runs made with umask 002
    assert Run.open(run.folder).name == "quick"


@needs_root
@pytest.mark.parametrize("part", ["", "settings.json", "orch.db", "checkpoints", "jobs"])
def test_a_run_with_files_of_another_user_is_not_opened(tmp_path, part):
    run = launched(tmp_path)
    os.chown(run.folder / part, pwd.getpwnam("nobody").pw_uid, -1)
    with pytest.raises(RunError, match=r"belongs to nobody, and orch would execute its contents as root.*chown -R"):
        Run.open(run.folder)


def as_nobody(script: str, *arguments: object) -> str:
    """Run the script as user nobody, who is in the group given as the first argument. Imports come before the change of
    user."""
    prologue = (
        "import os, sys, time, pathlib\n"
        "import orchestrator.worker.job_main, orchestrator.run.run, orchestrator.cluster.local\n"
        "import submitit, sqlite3, sqlalchemy.dialects.sqlite.pysqlite, filelock, tests.support.quick_job\n"
        "from orchestrator.run.run import Run\n"
        "from orchestrator.errors import OrchError\n"
        "from orchestrator.files import permissions\n"
        "os.setgroups([int(sys.argv[1])])\n"
        "os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
        "folder = pathlib.Path(sys.argv[2])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", prologue + script, *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_root
def test_a_colleague_in_the_group_reads_and_controls_and_one_outside_it_is_kept_out(open_folder):
    group = a_group_of_mine()
    gid = grp.getgrnam(group).gr_gid
    run = launched(open_folder / "runs", group=group)
    script = "\n".join(
        [
            "permissions.use_umask(folder)",
            "run = Run.open(folder)",
            "print(run.status()['state'], run.pause(time.time()), run.status()['state'])",
            "print(run.amend(['workers=3'], time.time()))",
            "open(folder / 'logs/mine', 'w').close()",
        ]
    )
    said = as_nobody(script, gid, run.folder)
    assert said.splitlines() == ["active [] paused", "['workers: 1 -> 3']"]
    assert stat.S_IMODE((run.folder / "logs/mine").stat().st_mode) == 0o660
    assert run.status()["state"] == "paused"
    assert Run.open(run.folder).settings.workers == 3, "what the colleague wrote, the owner opens"

    outside = "try:\n    Run.open(folder)\nexcept OrchError as error:\n    print(error)"
    assert "Permission denied" in as_nobody(outside, 65534, run.folder)


@needs_root
def test_a_colleague_does_not_open_a_folder_whose_rights_are_not_those_of_its_group(open_folder):
    group = a_group_of_mine()
    gid = grp.getgrnam(group).gr_gid
    run = launched(open_folder / "runs")
    os.chown(run.folder, 65533, gid)
    os.chown(run.folder / "settings.json", 65533, gid)
    run.folder.chmod(0o755)  # everybody may read the run, and its mode does not show that it was launched for a group
    (run.folder / "settings.json").chmod(0o644)
    outside = "try:\n    Run.open(folder)\nexcept OrchError as error:\n    print(error)"
    assert 'launch the run with "group" set' in as_nobody(outside, gid, run.folder)


def test_another_user_has_no_evidence_of_jobs_and_only_the_owner_queues_them(tmp_path):
    run = launched(tmp_path)
    seen = ForeignQueue("inline", "alice")
    jobs = run.leaderboard.run_state.snapshot().open_jobs
    assert len(jobs) == 1
    assert seen.evidence(jobs) == {jobs[0].job_id: Evidence.UNKNOWN}
    with pytest.raises(SubmissionError, match="only alice can queue"):
        seen.submit(jobs, after=None)
    run._queue = seen
    before = run.leaderboard.reader.rows("job")
    assert run.reconcile(time.time() + 10**6) == []
    assert run.leaderboard.reader.rows("job") == before


# --- the setting -------------------------------------------------------------------------------------


def test_an_unknown_group_is_an_error_that_names_the_user_s_groups(tmp_path):
    (tmp_path / "quick.json").write_text(json.dumps(QUICK | {"group": "no-such-group"}))
    expected = r"quick\.json: group: there is no group 'no-such-group' on this machine; yours are"
    with pytest.raises(SettingsError, match=expected):
        load(tmp_path / "quick.json")
    with pytest.raises(SettingsError, match="no-such-group"):
        launched(tmp_path / "runs", group="no-such-group")
    assert list((tmp_path / "runs").iterdir() if (tmp_path / "runs").exists() else []) == []


@needs_root
def test_a_group_that_the_user_is_not_in_is_an_error(tmp_path):
    said = as_nobody(
        "try:\n    permissions.group_id('root')\nexcept OrchError as error:\n    print(error)", 65534, tmp_path
    )
    assert said.startswith("group: you are not in the group 'root'; yours are ")


def test_the_group_is_fixed_at_launch(tmp_path):
    run = launched(tmp_path)
    with pytest.raises(SettingsError, match="group is fixed at launch"):
        run.amend(["group=users"], 0.0)
