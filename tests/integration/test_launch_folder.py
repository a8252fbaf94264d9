"""What may be in the folder of a launch, and what the user's module may do to its process. The processes are real; the
jobs bring their own trainer, so they start without torch."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.run.run import Run
from tests.support.command_line import OrchCall, orch, output, write_job, write_settings
from tests.support.invariants import violations
from tests.support.processes import processes_of, until

TRAINER = '''
class Mine:
    """Trains one step a chunk. Writes what its process is like to a file for each job."""

    @staticmethod
    def open_trainer(settings, cores):
        (HERE / f"job-{os.getpid()}").write_text("\\n".join([os.getcwd(), str(list(WORDS)), *EXTRA]))
        return Mine()

    def train(self, work, should_stop, on_epoch):
        from orchestrator.records import EpochResult, Finished, Interrupted

        before_step()
        while (HERE / "hold").exists() or should_stop():
            if should_stop():
                return Interrupted(0)
            time.sleep(0.05)
        results = tuple(EpochResult(work.parent_epochs + i + 1, 0.1, {"accuracy": 0.5}) for i in range(work.epochs))
        return Finished(0.5, work.parent_epochs + work.epochs, results, 0.1)

    def save(self, target):
        target.write(b"state")


HERE = Path(__file__).parent
WORDS = {"cat", "dog", "house", "mouse", "tree", "river", "stone", "cloud"}
EXTRA = []


def before_step():
    pass
'''
RUN: Mapping[str, Any] = {"job": "mine:Mine", "executor": "local", "workers": 1, "stop_after_epochs": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder to launch in. No process of its runs is left at the end."""
    made = tmp_path / "launch folder"
    made.mkdir()
    yield made

    def none_left() -> bool:
        for process in processes_of(tmp_path):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return not processes_of(tmp_path)

    until("every process to be gone", none_left)


def launch(folder: Path, code: str = "", *options: str, **changes: Any) -> subprocess.CompletedProcess[str]:
    write_job(folder, TRAINER + code)
    return orch(folder, "launch", write_settings(folder, **{**RUN, **changes}), "--runs-dir", "runs", *options)


def jobs(folder: Path) -> list[list[str]]:
    """What each job has written: its working folder, the order of a set, and more."""
    return [path.read_text().split("\n") for path in sorted(folder.glob("job-*"))]


# --- files with the names of modules that orch needs

NAMES = (
    "jobs/__init__.py", "orchestrator/__init__.py", "torch.py", "numpy.py", "submitit.py", "sqlalchemy/__init__.py",
    "random.py", "types.py", "queue.py", "logging/__init__.py", "secrets.py", "typer.py",
)  # fmt: skip


def wrong_modules(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("raise ImportError('the wrong module')\n")


def test_files_with_the_names_of_modules_that_orch_needs_hide_nothing(folder: Path) -> None:
    wrong_modules(folder, *NAMES)
    code = "import random, types, numpy, torch\nEXTRA.append(torch.__version__)\n"
    assert "mine:Mine" not in output(launch(folder, code, "--dry-run"))
    output(launch(folder, code, "--wait"))
    assert json.loads(output(orch(folder, "status", "--json")))["state"] == "finished"
    run = Run.open(folder / "runs/quick")
    assert [row["failures"] for row in run.leaderboard.reader.rows("chunk")] == [0, 0]
    assert violations(run) == []


@pytest.mark.parametrize("names", [("jobs.py", "orchestrator.py"), ("jobs/run.sbatch",)], ids=["modules", "scripts"])
def test_files_named_like_orchs_packages_hide_nothing(folder: Path, names: tuple[str, ...]) -> None:
    wrong_modules(folder, *names)
    output(launch(folder, "", "--wait"))
    assert json.loads(output(orch(folder, "status", "--json")))["state"] == "finished"


@pytest.mark.parametrize(
    ("job", "code", "files", "advice"),
    [
        pytest.param(
            "jobs.mine:Mine",
            "",
            ["jobs/__init__.py", "jobs/mine.py"],
            "{}/jobs can't be imported, because orch has a package named jobs, which is used instead; rename jobs",
            id="the job is in a package named jobs",
        ),
        pytest.param(
            "mine:Mine",
            "from jobs.helpers import help",
            ["jobs/helpers.py"],
            "{}/jobs can't be imported, because orch has a package named jobs, which is used instead; rename jobs",
            id="the job imports from such a package",
        ),
        pytest.param(
            "orchestrator:Mine",
            "",
            ["orchestrator.py"],
            "{}/orchestrator.py can't be imported, because orch has a package named orchestrator, which is used "
            "instead; rename orchestrator.py",
            id="the job is in a module named orchestrator",
        ),
        pytest.param(
            "mine:Mine",
            "from types import MyType",
            ["types.py"],
            "{}/types.py can't be imported, because Python or a library of orch has a module named types, which is "
            "used instead; rename types.py",
            id="the job imports from a module named types",
        ),
    ],
)
def test_a_module_that_can_not_be_imported_because_of_its_name_is_named(
    folder: Path, orch_call: OrchCall, job: str, code: str, files: list[str], advice: str
) -> None:
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text("class Mine: pass\n")
    write_job(folder, code)
    status, _, error = orch_call(folder, "launch", write_settings(folder, job=job), "--dry-run")
    assert status == 2
    assert advice.format(folder) in error
    assert "Traceback" not in error


# --- the working folder


@pytest.mark.parametrize("executor", ["local", "inline"])
def test_a_module_that_changes_the_working_folder_does_not_move_the_run(
    folder: Path, tmp_path: Path, executor: str
) -> None:
    (tmp_path / "elsewhere").mkdir()
    code = f"os.chdir({str(tmp_path / 'elsewhere')!r})\ndef before_step():\n    os.chdir('/')\n"
    output(launch(folder, code, "--wait", executor=executor))
    assert {path.name for path in (folder / "runs").iterdir()} == {"quick"}
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert {job[0] for job in jobs(folder)} == {str(folder)}
    assert json.loads(output(orch(folder, "status", "--json")))["state"] == "finished"


def test_a_job_starts_in_the_folder_of_the_launch_wherever_its_chain_was_resumed(folder: Path, tmp_path: Path) -> None:
    output(launch(folder, "", "--wait"))
    output(orch(folder, "amend", "quick", "--set", "stop_after_epochs=4"))
    output(orch(tmp_path, "resume", str(folder / "runs/quick")))
    run = Run.open(folder / "runs/quick")
    until("the end", lambda: run.status()["state"] == "finished" and not processes_of(tmp_path))
    assert len(jobs(folder)) >= 2
    assert {job[0] for job in jobs(folder)} == {str(folder)}


# --- the order of sets


@pytest.mark.parametrize("exported", [None, "random", "7"])
def test_all_jobs_of_a_run_iterate_over_a_set_in_the_same_order(
    folder: Path, monkeypatch: pytest.MonkeyPatch, exported: str | None
) -> None:
    if exported is not None:
        monkeypatch.setenv("PYTHONHASHSEED", exported)
    changes = {"stop_after_epochs": 40, "eon_lifetime": 0.5}
    code = "def before_step():\n    time.sleep(0.2)\n"
    output(launch(folder, code, **changes))
    until("three jobs", lambda: len(jobs(folder)) >= 3)
    Run.open(folder / "runs/quick").cancel(at_once=True, now=0.0)
    assert len({job[1] for job in jobs(folder)}) == 1


def test_processes_that_the_users_code_starts_find_modules_as_usual(folder: Path) -> None:
    (folder / "helper.py").write_text("import neighbour\n")
    (folder / "neighbour.py").write_text("print('found')\n")
    code = (
        "import subprocess\nEXTRA.append(subprocess.check_output([sys.executable, 'helper.py'], text=True).strip())\n"
    )
    output(launch(folder, code, "--wait"))
    assert [job[2] for job in jobs(folder)] == ["found"] * len(jobs(folder))


# --- user code that ends the process


@pytest.mark.parametrize(
    ("code", "text"),
    [
        pytest.param("sys.exit('no more credits')", "SystemExit: no more credits", id="the import ends with a text"),
        pytest.param("exit(0)", "SystemExit: 0", id="the import ends with exit(0)"),
        pytest.param("raise BaseException('odd')", "BaseException: odd", id="the import raises a BaseException"),
        pytest.param(
            "from jobs.job import Job\nclass Mine(Job):\n    def __init__(self, context): sys.exit(0)",
            "job mine:Mine: SystemExit: 0",
            id="the constructor",
        ),
        pytest.param(
            "from jobs.digits import Digits\nclass Mine(Digits):\n    def prepare(self, download): sys.exit('no data')",
            "job mine:Mine: SystemExit: no data",
            id="prepare",
        ),
    ],
)
def test_code_that_ends_the_process_at_launch_is_one_clear_error(
    folder: Path, orch_call: OrchCall, code: str, text: str
) -> None:
    write_job(folder, code)
    for command in (["launch"], ["prepare"], ["launch", "--dry-run"]):
        status, _, error = orch_call(folder, *command, write_settings(folder, job="mine:Mine"))
        assert (status, error.startswith("orch: job mine:Mine: ")) == (2, True)
        assert text in error
        assert "Traceback" not in error
    assert not (folder / "runs").exists()


def test_a_model_that_ends_the_process_is_an_error_of_the_job(folder: Path, orch_call: OrchCall) -> None:
    write_job(folder, "from jobs.digits import Digits\nclass Mine(Digits):\n    def model(self): sys.exit('no GPU')")
    status, _, error = orch_call(folder, "launch", write_settings(folder, job="mine:Mine"), "--dry-run")
    assert status == 2
    assert "job mine:Mine: SystemExit: no GPU" in error


def test_a_module_that_ends_each_job_ends_its_chain_at_the_second_one(folder: Path) -> None:
    code = "if os.environ.get('SUBMITIT_EXECUTOR'):\n    sys.exit('no more credits')\n"
    assert launch(folder, code, "--wait").returncode == 1
    run = Run.open(folder / "runs/quick")
    status = run.status()
    assert status["state"] == "failed"
    assert "failed twice before its first step, in the same way: " in status["reason"]
    assert "SystemExit: no more credits" in status["reason"]
    assert len([job for job in run.leaderboard.reader.rows("job") if job["started_at"]]) == 2


# --- signals


def test_a_warning_suspends_the_chunk_of_a_module_that_sets_its_own_handlers(folder: Path, tmp_path: Path) -> None:
    set_handlers = (
        "import signal\ndef before_step():\n    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):\n"
        "        signal.signal(number, signal.SIG_IGN)\n"
    )
    (folder / "hold").touch()
    output(launch(folder, set_handlers + "before_step()\n"))
    run = Run.open(folder / "runs/quick")
    until("a job at work", lambda: len(jobs(folder)) == 1 and run.leaderboard.reader.counts()["chunks"]["live"])
    (working,) = [job for job in run.leaderboard.reader.rows("job") if job["state"] == "running"]
    until("its first step", lambda: suspended(run, working["pid"]))
    (folder / "hold").unlink()
    until("the end", lambda: run.status()["state"] == "finished" and not processes_of(tmp_path))
    assert run.leaderboard.reader.rows("job")[0]["outcome"] == "stopped by SIGUSR2"
    assert violations(run) == []


def suspended(run: Run, pid: int) -> bool:
    """Warn the job again, since a signal before its first step was ignored. Return whether its chunk is suspended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGUSR2)
    return any(event["kind"] == "suspended" for event in run.leaderboard.reader.rows("event"))
