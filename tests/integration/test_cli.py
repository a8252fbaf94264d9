"""`orch` as a user meets it: a process in some folder, its two outputs, its exit code, and what it leaves.

Where nothing depends on the process, it is called in this one: importing torch again would take most of the time.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console

from jobs.training.opening import load_job
from jobs.training.session import Session
from jobs.training.states import read
from orchestrator.cli import tables
from orchestrator.cli.launch import _line
from orchestrator.cli.main import main
from orchestrator.errors import JobSpecError
from orchestrator.run.run import Run
from orchestrator.settings.loading import load
from orchestrator.worker.user_job import check_job
from tests.support.invariants import violations
from tests.support.small_runs import make_run
from tests.support.storage import Storage

ORCH = Path(sys.executable).with_name("orch")

# Seconds of training: the embedded digits, a narrow network, six epochs.
QUICK: dict[str, Any] = {
    "name": "quick",
    "job": "jobs.digits:Digits",
    "job_params": {"width": 4},
    "executor": "inline",
    "cores_per_worker": 1,
    "num_models": 2,
    "max_batch_size": 200,
    "validation_fraction": 0.2,
    "total_lifetime": 200,
    "eon_lifetime": 100,
    "stop_after_stale_cycles": None,
    "stop_after_epochs": 6,
    "training_profiles": [
        {"name": "fast", "learning_rate": 0.05, "momentum": 0.9, "weight_decay": 0.0005},
        {"name": "fine", "learning_rate": 0.01, "momentum": 0.5},
    ],
}

ENTRY_KEYS = {
    *("rank", "checkpoint", "score", "epochs", "worked_on", "founder", "parent", "profile", "worker"),
    *("promoted_at", "file", "sha256"),
}
BOARD_KEYS = {"run", "metric", "num_models", "entries"}
STATUS_KEYS = {"run", "state", "deadline", "best", "workers", "chunks", "epochs", "train_seconds"}


def orch(cwd: Path, *arguments: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "ORCH_RUNS_DIR"}
    command = [str(ORCH), *arguments]
    return subprocess.run(
        command, cwd=cwd, env=kept | {"COLUMNS": "200"}, capture_output=True, text=True, timeout=timeout_s
    )


Here = Callable[..., tuple[int, str, str]]


@pytest.fixture
def orch_here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Here]:
    """The same in this process, where torch is there already: its exit code and its two outputs."""

    def run(cwd: Path, *arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["orch", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return (int(end.value.code or 0), *capfd.readouterr())

    monkeypatch.delenv("ORCH_RUNS_DIR", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("mine", None)
    yield run
    sys.modules.pop("mine", None)


def output(done: subprocess.CompletedProcess[str], code: int = 0) -> str:
    assert done.returncode == code, done.stderr
    return done.stdout


def write_settings(folder: Path, **changes: Any) -> str:
    (folder / "settings.json").write_text(json.dumps(QUICK | changes, indent=2))
    return "settings.json"


def write_job(folder: Path, code: str) -> None:
    """A user's own module in the folder that they launch from."""
    (folder / "mine.py").write_text(f"import os, sys, time\nfrom pathlib import Path\n{code}")


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"__pycache__"}


def events(folder: Path, kind: str) -> int:
    """How often something was written down in the run in this folder."""
    with sqlite3.connect(folder / "orch.db") as database:
        (count,) = database.execute("SELECT count(*) FROM event WHERE kind = ?", (kind,)).fetchone()
    database.close()
    return int(count)


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder with a run that is over, and what its launch printed. Not to be changed: see `folder`."""
    cwd = tmp_path_factory.mktemp("launched")
    done = orch(cwd, "launch", write_settings(cwd), "--json")
    assert done.returncode == 0, done.stderr
    return cwd, done


@pytest.fixture
def folder(launched: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy of that folder."""
    shutil.copytree(launched[0], tmp_path / "copy")
    return tmp_path / "copy"


# --- launch: mistakes


def test_three_mistakes_are_three_lines_and_nothing_is_made(tmp_path: Path) -> None:
    file = write_settings(tmp_path, num_modles=3, workers=0, training_profiles=[{"name": "fast"}])
    done = orch(tmp_path, "launch", file)
    assert done.returncode == 2
    assert done.stdout == ""
    assert sorted(done.stderr.removeprefix("orch: ").splitlines()) == [
        "settings.json: num_modles: unknown key; did you mean 'num_models'?",
        "settings.json: training_profiles[0].learning_rate: is missing and has no default",
        "settings.json: workers: 0 is not allowed; input should be greater than or equal to 1",
    ]
    assert names_in(tmp_path) == {"settings.json"}


@pytest.mark.usefixtures("orch_here")
def test_what_is_wrong_with_the_metric_and_each_profile_is_said_at_once(tmp_path: Path) -> None:
    profiles = [
        {"name": "one", "learning_rate": 0.1, "optimizer": "Adamm"},
        {"name": "two", "learning_rate": 0.1},
        {"name": "three", "learning_rate": 0.1, "schedule": {"name": "StepLR", "stepsize": 2}},
    ]
    metric = {"name": "acuracy", "mode": "max"}
    settings, _ = load(tmp_path / write_settings(tmp_path, training_profiles=profiles, metric=metric))
    with pytest.raises(JobSpecError) as caught:
        check_job(settings, [str(tmp_path)])
    about_the_metric, first, second = str(caught.value).splitlines()
    assert about_the_metric == "metric.name: 'acuracy' is not among the metrics of Digits: accuracy, loss"
    assert "Adamm" in first
    assert "stepsize" in second


@pytest.mark.usefixtures("orch_here")
def test_a_class_without_a_model_or_data_is_refused(tmp_path: Path) -> None:
    write_job(tmp_path, "from jobs.job import Job\nclass Mine(Job):\n    pass\n")
    settings, _ = load(tmp_path / write_settings(tmp_path, job="mine:Mine", job_params={}))
    with pytest.raises(JobSpecError, match=r"^Mine has no model; .*\nMine has no data; "):
        check_job(settings, [str(tmp_path)])


def test_a_model_that_can_not_be_made_here_is_told_with_its_error(tmp_path: Path, orch_here: Here) -> None:
    write_job(tmp_path, job_with("def model(self): raise ValueError('no such backbone')"))
    file = write_settings(tmp_path, job="mine:Mine", job_params={})
    code, _, said = orch_here(tmp_path, "launch", file, "--dry-run")
    assert code == 0, "it may be there on a node with a GPU"
    assert "disk: unknown, since the model can't be made here: ValueError: no such backbone" in said


def test_the_plan_of_a_run_that_is_over_is_that_it_is_over(tmp_path: Path, orch_here: Here) -> None:
    make_run(Storage(None), tmp_path / "runs" / "quick", total_lifetime=0.001, job="jobs.digits:Digits")
    code, out, said = orch_here(tmp_path, "launch", "runs/quick/settings.json", "--dry-run")
    assert (code, out) == (2, "")
    assert "quick is over: its total_lifetime ended at " in said


def test_a_run_folder_that_lost_both_its_files_says_how_to_get_it_back(tmp_path: Path, orch_here: Here) -> None:
    run = make_run(Storage(None), tmp_path / "runs" / "quick")
    (run.folder / "checkpoints" / "g00000001-c00000001.pt").write_bytes(b"weights")
    for name in ("orch.db", "settings.json"):
        (run.folder / name).unlink()
    file = write_settings(tmp_path)
    for command in (("launch", file), ("status", "quick"), ("repair", "quick")):
        code, _, said = orch_here(tmp_path, *command)
        assert code == 2
        assert "runs/quick is not a run: it has neither settings.json nor orch.db, but checkpoints." in said
        assert "`orch repair quick`" in said


def job_with(method: str) -> str:
    return f"from jobs.digits import Digits\nclass Mine(Digits):\n    {method}\n"


@pytest.mark.parametrize(
    ("code", "job", "message"),
    [
        pytest.param(None, "mine:Mine", "No module named 'mine'", id="no such module"),
        pytest.param("def broken(:\n", "mine:Mine", "SyntaxError", id="a typing mistake"),
        pytest.param("import nowhere_to_be_found\n", "mine:Mine", "nowhere_to_be_found", id="a missing package"),
        pytest.param("sys.exit('usage: mine')\n", "mine:Mine", "usage: mine", id="a script that ends when imported"),
        pytest.param(job_with("pass"), "mine:Yours", "mine has no class Yours", id="no such class"),
        pytest.param("class Mine: pass\n", "mine:Mine", "job mine:Mine: .* derived from jobs.job.Job", id="not a job"),
        pytest.param(
            job_with("def __init__(self, context): raise RuntimeError('the licence has expired')"),
            "mine:Mine",
            "RuntimeError: the licence has expired",
            id="a job that can not be made",
        ),
        pytest.param(
            job_with("def prepare(self, download): raise OSError('the archive is offline')"),
            "mine:Mine",
            "OSError: the archive is offline",
            id="a job whose own check fails",
        ),
    ],
)
@pytest.mark.usefixtures("orch_here")
def test_a_job_that_can_not_be_used_is_an_error_that_says_why(
    code: str | None, job: str, message: str, tmp_path: Path
) -> None:
    if code is not None:
        write_job(tmp_path, code)
    settings, _ = load(tmp_path / write_settings(tmp_path, job=job, job_params={}))
    with pytest.raises(JobSpecError, match=message):
        check_job(settings, [str(tmp_path)])


def test_a_job_that_can_not_be_imported_leaves_nothing_behind(tmp_path: Path) -> None:
    write_job(tmp_path, "import nowhere_to_be_found\n")
    done = orch(tmp_path, "launch", write_settings(tmp_path, job="mine:Mine"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "orch: job mine:Mine: mine can't be imported: ModuleNotFoundError: No module named 'nowhere_to_be_found'\n"
    )
    assert names_in(tmp_path) == {"settings.json", "mine.py"}


def test_a_dry_run_prints_the_plan_and_makes_nothing(tmp_path: Path, orch_here: Here) -> None:
    options = ["--dry-run", "--executor", "local", "--workers", "3", "--json"]
    code, out, _ = orch_here(tmp_path, "launch", write_settings(tmp_path), *options)
    plan = json.loads(out)
    assert code == 0
    assert (plan["run"], plan["resumes"], plan["workers"]) == ("quick", False, 3)
    assert plan["cycle"] == ["fast", "fine"]
    assert plan["first_claims"] == ["founder 1: fast", "founder 2: fast", "founder 3: fast"]
    assert names_in(tmp_path) == {"settings.json"}


# --- JSON


def test_a_launch_as_json_is_the_status_and_the_board(launched: tuple[Path, Any]) -> None:
    cwd, done = launched
    result = json.loads(done.stdout)
    assert STATUS_KEYS | {"board"} <= result.keys()
    assert result["board"].keys() >= BOARD_KEYS
    assert result["folder"] == str(cwd / "runs" / "quick")
    assert (result["run"], result["state"], result["epochs"]) == ("quick", "finished", 6)


def test_a_board_as_json_has_what_is_documented(launched: tuple[Path, Any]) -> None:
    board = json.loads(output(orch(launched[0], "leaderboard", "--json")))
    assert board.keys() >= BOARD_KEYS
    assert (board["run"], board["metric"], board["num_models"]) == ("quick", {"name": "accuracy", "mode": "max"}, 2)
    assert [entry["rank"] for entry in board["entries"]] == [1, 2]
    scores = [entry["score"] for entry in board["entries"]]
    assert scores == sorted(scores, reverse=True)
    for entry in board["entries"]:
        assert entry.keys() >= ENTRY_KEYS
        assert (launched[0] / "runs/quick/checkpoints" / entry["file"]).is_file()
        assert len(entry["sha256"]) == 64
        assert entry["promoted_at"].endswith("+00:00")


def test_a_status_as_json_has_what_is_documented(launched: tuple[Path, Any]) -> None:
    status = json.loads(output(orch(launched[0], "status", "--json")))
    assert status.keys() >= STATUS_KEYS
    assert status["deadline"].endswith("+00:00")
    (worker,) = status["workers"]
    assert worker.keys() >= {"worker", "state", "job", "node"}
    assert (worker["worker"], worker["state"]) == (0, "ended")
    chunks = status["chunks"]
    assert chunks.keys() >= {"claimed", "promoted", "discarded", "expired", "failed"}
    assert chunks["claimed"] == chunks["promoted"] + chunks["discarded"] == status["epochs"] == 6
    assert status["train_seconds"] > 0
    assert status["best"] == json.loads(launched[1].stdout)["board"]["entries"][0]["score"]


def test_the_runs_as_json_are_a_list(launched: tuple[Path, Any]) -> None:
    (run,) = json.loads(output(orch(launched[0], "runs", "--json")))
    assert run.keys() >= {"run", "state", "best", "epochs", "deadline"}
    assert (run["run"], run["state"], run["epochs"]) == ("quick", "finished", 6)


CHATTY = """
from jobs.digits import Digits
class Mine(Digits):
    def data(self, split):
        print("reading", split, flush=True)
        os.write(1, b"a library's own words\\n")
        return super().data(split)
"""


def test_json_stays_json_when_the_job_prints(tmp_path: Path, orch_here: Here) -> None:
    write_job(tmp_path, CHATTY)
    file = write_settings(tmp_path, job="mine:Mine", stop_after_epochs=1)
    for command in (["launch", file, "--json"], ["evaluate", "--json"]):
        code, out, error = orch_here(tmp_path, *command)
        assert json.loads(out)["run"] == "quick"
        assert "reading test" in error or command[0] == "launch"
        assert "a library's own words" in error
        assert code == 0


# --- for people


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        pytest.param("leaderboard", ["quick: 2 of 2 models", "accuracy", "fast"], id="the board"),
        pytest.param("status", ["quick: finished (6 epochs were trained, of 6 allowed)", "6 claimed"], id="the state"),
        pytest.param("runs", ["quick", "finished"], id="the runs"),
    ],
)
def test_people_see_a_table(launched: tuple[Path, Any], command: str, shown: list[str]) -> None:
    done = orch(launched[0], command)
    text = output(done)
    assert all(words in text for words in shown), text
    assert done.stderr == ""


@pytest.mark.parametrize("width", [80, 60, 40, 30])
def test_no_terminal_is_too_narrow_for_a_score(width: int) -> None:
    entry = {"score": 0.987654, "epochs": 1234, "worked_on": 56, "profile": "a long name of a profile", "founder": 12}
    entry |= {"parent": 345, "promoted_at": "2026-01-02T03:04:05+00:00"}
    entries = [entry | {"rank": rank, "test_metrics": {"validation_f1": 0.87654}} for rank in (1, 10)]
    board = {"run": "quick", "metric": {"name": "validation_f1"}, "num_models": 5, "founders": 1}
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(tables.board(board | {"entries": entries, "select_on": "validation"}))
    console.print(tables.runs([{"run": "a_long_name_of_a_run", "state": "finished", "best": 0.12345, "epochs": 6}]))
    text = console.export_text()
    assert [text.count(score) for score in ("0.9877", "0.8765", "0.1235")] == [2, 2, 1], text


def test_one_of_something_is_said_as_one() -> None:
    """In what is printed while a launch waits, and above the board."""
    state = {"state": "active", "best": 0.5, "chunks": {"promoted": 1, "discarded": 0}, "epochs": 1}
    assert _line(state) == "active: best 0.5000, 1 promoted, 0 discarded, 1 epoch"
    board = {"run": "quick", "metric": {"name": "loss"}, "num_models": 1, "founders": 1, "entries": []}
    assert (
        str(tables.board(board | {"select_on": "test"}).title) == "quick: 0 of 1 model, 1 lineage; loss on the test set"
    )


def test_a_run_whose_every_score_is_no_number_says_so_where_it_is_looked_at(tmp_path: Path, orch_here: Here) -> None:
    profiles = [{"name": "wild", "learning_rate": 1e30, "weight_decay": 0.0005}]
    file = write_settings(tmp_path, stop_after_epochs=2, training_profiles=profiles)
    for command, expected in (["launch", file, "--wait"], 1), (["status"], 0):
        code, out, _ = orch_here(tmp_path, *command)
        assert code == expected
        said = " ".join(out.split())
        assert "finished (2 epochs were trained, of 2 allowed) best - epochs 2" in said
        assert "warning: all 2 chunks so far ended with a score (accuracy) that is not a finite number" in said
        assert "learning rate" in said
    (warning,) = json.loads(orch_here(tmp_path, "status", "--json")[1])["warnings"]
    assert warning.startswith("all 2 chunks so far")


def test_a_run_with_a_board_is_not_warned_of(launched: tuple[Path, Any]) -> None:
    assert json.loads(output(launched[1]))["warnings"] == []


def test_a_folder_without_runs_has_none(tmp_path: Path) -> None:
    assert output(orch(tmp_path, "runs")) == "no runs in runs\n"
    assert json.loads(output(orch(tmp_path, "runs", "--json"))) == []
    done = orch(tmp_path, "leaderboard")
    assert done.returncode == 2
    assert done.stderr == "orch: there is no run in runs; `orch launch settings/digits.json` makes one\n"
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("command", ["leaderboard", "status", "evaluate", "export", "cancel"])
def test_an_unknown_run_is_an_error_that_names_those_there_are(launched: tuple[Path, Any], command: str) -> None:
    done = orch(launched[0], command, "quikc")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "orch: there is no run 'quikc' in runs; there are: quick\n"


FAST_START = """
import sys
from orchestrator.cli.main import main
try:
    main()
except SystemExit as end:
    print([name for name in {unwanted} if name in sys.modules], end.code or 0, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "unwanted"),
    [
        pytest.param(["--help"], ["torch", "sqlalchemy", "submitit", "pydantic", "sklearn", "rich.live"], id="--help"),
        pytest.param(["launch", "--help"], ["torch", "sqlalchemy", "submitit", "sklearn"], id="launch --help"),
        pytest.param(["--version"], ["torch", "sqlalchemy", "submitit", "sklearn"], id="--version"),
        pytest.param(["runs"], ["torch", "submitit", "sklearn"], id="runs"),
        pytest.param(["status"], ["torch", "submitit", "sklearn"], id="status"),
        pytest.param(["leaderboard"], ["torch", "submitit", "sklearn"], id="leaderboard"),
    ],
)
def test_looking_imports_nothing_that_is_slow(
    launched: tuple[Path, Any], arguments: list[str], unwanted: list[str]
) -> None:
    command = [sys.executable, "-c", FAST_START.format(unwanted=unwanted), *arguments]
    done = subprocess.run(command, cwd=launched[0], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout
    assert done.stderr == "[] 0\n"


# --- launch: again


def test_other_settings_under_the_same_name_are_refused_with_what_differs(folder: Path) -> None:
    before = (folder / "runs/quick/settings.json").read_text()
    done = orch(folder, "launch", write_settings(folder, num_models=3, max_batch_size=100))
    assert done.returncode == 2
    assert done.stderr.startswith("orch: quick exists already, with other settings;")
    assert done.stderr.splitlines()[1:] == ["  num_models: 2 -> 3", "  max_batch_size: 200 -> 100"]
    assert (folder / "runs/quick/settings.json").read_text() == before
    assert events(folder / "runs/quick", "state") == 1  # that it had finished


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training_profiles.0.optimizer=AdamWW", "optimizer AdamWW: torch has none of that name"),
        ('training_profiles.0.schedule={"name": "StepLR"}', "StepLR"),
        ('loggers=["nowhere:Mine"]', "nowhere"),
    ],
)
def test_an_amendment_that_the_job_can_t_train_with_is_refused_and_changes_nothing(
    folder: Path, orch_here: Here, change: str, message: str
) -> None:
    before = Run.open(folder / "runs/quick").leaderboard.run_state.settings()
    code, _, said = orch_here(folder, "amend", "quick", "--set", change)
    assert code != 0
    assert message in said
    assert "Traceback" not in said
    assert Run.open(folder / "runs/quick").leaderboard.run_state.settings() == before


def test_an_amendment_says_what_it_does_not_do(folder: Path, orch_here: Here) -> None:
    code, out, _ = orch_here(folder, "amend", "quick", "--set", "total_lifetime=2000")
    assert code == 0
    assert out.splitlines() == [
        "total_lifetime: 200.0 -> 2000.0",
        "quick is finished; `orch resume quick` goes on with it",
    ]


def test_an_amendment_that_ends_the_run_says_so(
    tmp_path: Path, orch_here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(Storage(None), tmp_path / "runs/quick")
    monkeypatch.setattr(Run, "reconcile", lambda *_: [])  # as while its jobs are at work
    code, out, _ = orch_here(tmp_path, "amend", "quick", "--set", "total_lifetime=0.001")
    assert code == 0
    assert "quick has lasted longer than its total_lifetime already: it ends with the chunks under way" in out


def test_a_run_that_is_over_is_not_resumed(folder: Path, orch_here: Here) -> None:
    code, out, error = orch_here(folder, "launch", "settings.json")
    assert (code, out) == (2, "")
    assert error.startswith("orch: quick is ")
    assert "6 epochs were trained, of 6 allowed" in error
    assert Run.open(folder / "runs/quick").status()["chunks"]["claimed"] == 6


DIES_ONCE = """
from jobs.digits import Digits
class Mine(Digits):
    steps = 0
    def loss(self, outputs, targets):
        Mine.steps += 1
        if Mine.steps == 20 and not Path("it died").exists():  # in the fourth epoch of six steps each
            Path("it died").touch()
            os.kill(os.getpid(), 9)
        return super().loss(outputs, targets)
"""


def test_launching_again_goes_on_where_a_killed_run_was(tmp_path: Path, orch_here: Here) -> None:
    write_job(tmp_path, DIES_ONCE)
    file = write_settings(tmp_path, job="mine:Mine")
    assert orch(tmp_path, "launch", file, "--json").returncode == -9
    assert (tmp_path / "it died").exists()

    code, out, _ = orch_here(tmp_path, "launch", file, "--json")
    result = json.loads(out)
    assert (code, result["state"], result["epochs"]) == (0, "finished", 6)
    assert result["chunks"]["expired"] == 1
    assert result["chunks"]["promoted"] + result["chunks"]["discarded"] == 6
    assert violations(Run.open(tmp_path / "runs/quick")) == []


# --- evaluate and export


def readings_of(folder: Path) -> list[tuple[Any, Any]]:
    board = Run.open(folder / "runs/quick").board()
    return [(entry["tested_at"], entry["test_metrics"]) for entry in board["entries"]]


def test_the_test_set_is_read_once_and_again_only_when_asked(folder: Path, orch_here: Here) -> None:
    run = folder / "runs/quick"
    assert readings_of(folder) == [(None, None)] * 2

    board = json.loads(output(orch(folder, "evaluate", "--json")))
    assert board.keys() >= BOARD_KEYS
    first = [(entry["tested_at"], entry["test_metrics"]) for entry in board["entries"]]
    assert all(at is not None and metrics.keys() == {"accuracy", "loss"} for at, metrics in first)
    assert readings_of(folder) == first
    assert events(run, "tested") == 2

    code, out, _ = orch_here(folder, "evaluate")
    assert code == 0
    assert "on test" in out
    assert readings_of(folder) == first
    assert events(run, "tested") == 2

    code, out, _ = orch_here(folder, "evaluate", "--json", "--again")
    assert code == 0
    for entry, (_, metrics) in zip(json.loads(out)["entries"], first, strict=True):
        assert entry["test_metrics"] == pytest.approx(metrics)
    assert events(run, "tested") == 4


def test_a_job_that_lost_what_it_needs_is_an_error_when_it_is_evaluated(tmp_path: Path, orch_here: Here) -> None:
    lost = "        if Path('gone').exists(): raise JobError('pretrained_weights: they are gone')\n"
    method = f"def model(self):\n{lost}        return super().model()"
    write_job(tmp_path, "from jobs.errors import JobError\n" + job_with(method))
    file = write_settings(tmp_path, job="mine:Mine", stop_after_epochs=1)
    assert orch_here(tmp_path, "launch", file)[0] == 0
    (tmp_path / "gone").touch()
    assert orch_here(tmp_path, "evaluate") == (2, "", "orch: pretrained_weights: they are gone\n")


def test_an_exported_model_loads_and_scores_as_it_did(folder: Path) -> None:
    done = orch(folder, "export", "--out", "out/model.pt")
    entry = Run.open(folder / "runs/quick").board()["entries"][0]
    assert f"out/model.pt: rank 1, score {entry['score']:.6g}, {entry['epochs']} epochs\n" in output(done)
    assert json.loads((folder / "out/model.json").read_text()) == {"run": "quick", "job": QUICK["job"], **entry}
    assert names_in(folder / "out") == {"model.pt", "model.json"}

    weights = torch.load(folder / "out/model.pt", weights_only=True)
    job = load_job(Run.open(folder / "runs/quick").settings.model_dump(mode="json"))
    model = job.model()
    model.load_state_dict(weights)
    model.eval()
    right = count = 0
    for inputs, targets in Session(job).feed("validation").in_order():
        right += int((model(inputs).argmax(dim=1) == targets).sum())
        count += len(targets)
    assert right / count == pytest.approx(entry["score"])


@pytest.mark.parametrize("rank", [1, 2])
def test_an_export_is_bit_for_bit_the_model_of_its_rank(folder: Path, rank: int, orch_here: Here) -> None:
    assert orch_here(folder, "export", "--rank", str(rank))[0] == 0
    run = Run.open(folder / "runs/quick")
    weights = torch.load(folder / "best.pt", weights_only=True)
    kept = read(run.folder / "checkpoints" / run.board()["entries"][rank - 1]["file"])["model"]
    assert list(weights) == list(kept)
    assert all(torch.equal(weights[name], kept[name]) for name in weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(["--rank", "3"], "--rank 3: the board of quick has 2 entries", id="a rank that nobody holds"),
        pytest.param(["--out", "settings.json/best.pt"], "--out settings.json/best.pt: ", id="a folder that is a file"),
        pytest.param(["--out", "best.json"], "--out best.json: ", id="the name of its own description"),
    ],
)
def test_an_export_that_can_not_be_written_is_an_error(
    folder: Path, options: list[str], message: str, orch_here: Here
) -> None:
    before = names_in(folder)
    code, out, error = orch_here(folder, "export", *options)
    assert code == 2, out
    assert error.startswith(f"orch: {message}")
    assert names_in(folder) == before


def test_a_damaged_checkpoint_is_never_exported(folder: Path, orch_here: Here) -> None:
    entry = Run.open(folder / "runs/quick").board()["entries"][0]
    with (folder / "runs/quick/checkpoints" / entry["file"]).open("r+b") as file:
        file.seek(1000)
        file.write(b"damaged")
    code, _, error = orch_here(folder, "export")
    assert code == 2
    assert entry["file"] in error
    assert "`orch repair quick` takes it off the board" in error
    assert "best.pt" not in names_in(folder)


# --- a user's own job

OWN = """
import torch
from jobs.job import Job
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

class Mine(Job):
    def model(self):
        return torch.nn.Linear(64, 10)

    def data(self, split):
        images, labels = load_digits(return_X_y=True)
        some = slice(1400, None) if split == "test" else slice(1400)
        return TensorDataset(torch.tensor(images[some] / 16, dtype=torch.float32), torch.tensor(labels[some]))
"""


def test_a_job_in_the_users_folder_trains_and_is_evaluated_from_any_other(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    write_job(tmp_path / "work", OWN)
    file = write_settings(tmp_path / "work", job="mine:Mine", job_params={}, executor=None, name="own")
    result = json.loads(output(orch(tmp_path / "work", "launch", file, "--executor", "inline", "--json")))
    assert (result["state"], result["epochs"], result["executor"]) == ("finished", 6, "inline")
    assert result["best"] > 0.5

    board = json.loads(output(orch(tmp_path, "evaluate", "work/runs/own", "--json")))
    assert all(entry["test_metrics"]["accuracy"] > 0.4 for entry in board["entries"])


RAISES = """
from jobs.digits import Digits
class Mine(Digits):
    def loss(self, outputs, targets):
        if not Path("mended").exists():
            raise ValueError("the camera is unplugged")
        return super().loss(outputs, targets)
"""


@pytest.mark.parametrize(
    ("max_failures", "workers"),
    [
        pytest.param(1, 1, id="one failure allowed"),
        pytest.param(2, 1, id="two allowed"),
        pytest.param(3, 1, id="three allowed"),
        pytest.param(2, 2, id="two allowed, settings for two workers"),
    ],
)
def test_a_job_that_fails_each_time_fails_the_run_and_says_why(
    max_failures: int, workers: int, tmp_path: Path, orch_here: Here
) -> None:
    write_job(tmp_path, RAISES)
    file = write_settings(tmp_path, job="mine:Mine", max_failures=max_failures, workers=workers)
    code, out, _ = orch_here(tmp_path, "launch", file, "--json")
    result = json.loads(out)
    assert (code, result["state"]) == (1, "failed")
    assert "ValueError: the camera is unplugged" in result["reason"]
    assert result["chunks"]["failed"] == max_failures
    assert (result["epochs"], result["board"]["entries"]) == (0, [])


def test_a_failed_run_shows_why_and_goes_on_when_its_job_is_mended(tmp_path: Path, orch_here: Here) -> None:
    write_job(tmp_path, RAISES)
    file = write_settings(tmp_path, job="mine:Mine", max_failures=2)
    for command, expected in (["launch", file], 1), (["status"], 0), (["runs"], 0):
        code, out, _ = orch_here(tmp_path, *command)
        assert code == expected
        assert "failed" in out
        assert "camera is unplugged" in " ".join(out.split())
    (tmp_path / "mended").touch()
    code, out, _ = orch_here(tmp_path, "launch", file, "--json")
    result = json.loads(out)
    assert (code, result["state"], result["epochs"], result["chunks"]["failed"]) == (0, "finished", 6, 2)


def test_nobody_waits_for_the_second_worker_of_an_inline_run(tmp_path: Path, orch_here: Here) -> None:
    """A settings file for two workers, tried out in one process."""
    code, out, _ = orch_here(tmp_path, "launch", write_settings(tmp_path, workers=2), "--json")
    result = json.loads(out)
    assert (code, result["state"]) == (0, "finished")
    assert {worker["state"] for worker in result["workers"]} == {"ended"}


# --- cancel

WAITS = """
from jobs.digits import Digits
class Mine(Digits):
    def loss(self, outputs, targets):
        Path("training").touch()
        while Path("hold").exists():
            time.sleep(0.02)
        return super().loss(outputs, targets)
"""


@pytest.fixture
def own_folder(tmp_path: Path) -> Iterator[Path]:
    """Nothing that was started from it is left afterwards."""
    yield tmp_path
    for process in processes_of(tmp_path):
        process.kill()


def processes_of(folder: Path) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if any(str(folder) in a for a in p.info["cmdline"] or ())]


def until(what: str, condition: Callable[[], bool], timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"waited {timeout_s} s for {what}"
        time.sleep(0.05)


def test_a_run_is_cancelled_gently_and_at_once_and_goes_on_each_time(own_folder: Path) -> None:
    write_job(own_folder, WAITS)
    file = write_settings(own_folder, job="mine:Mine", executor="local")
    hold, training = own_folder / "hold", own_folder / "training"

    def launch_and_hold() -> None:
        hold.touch()
        training.unlink(missing_ok=True)
        output(orch(own_folder, "launch", file))
        until("the job to train", training.exists)

    def status_when_all_ended() -> dict[str, Any]:
        until("the job to end", lambda: not processes_of(own_folder))
        status: dict[str, Any] = json.loads(output(orch(own_folder, "status", "--json")))
        assert (status["state"], status["reason"]) == ("cancelled", "cancelled by the user")
        return status

    launch_and_hold()
    assert output(orch(own_folder, "cancel", "quick")) == "quick is cancelled; its board stays as it is\n"
    hold.unlink()  # the step that it is in ends
    gentle = status_when_all_ended()
    assert [worker["state"] for worker in gentle["workers"]] == ["ended"]
    assert (gentle["chunks"]["suspended"], gentle["expirations"]) == (1, 0)

    launch_and_hold()
    output(orch(own_folder, "cancel", "quick", "--now"))
    at_once = status_when_all_ended()
    assert [worker["state"] for worker in at_once["workers"]] == ["lost"]
    assert (at_once["chunks"]["suspended"], at_once["expirations"]) == (1, 1)

    hold.unlink()
    result = json.loads(output(orch(own_folder, "launch", file, "--wait", "--json")))
    assert (result["state"], result["epochs"], result["chunks"]["claimed"]) == ("finished", 6, 6)
    assert violations(Run.open(own_folder / "runs/quick")) == []


def test_a_run_that_is_over_is_not_said_to_be_cancelled(folder: Path) -> None:
    done = orch(folder, "cancel", "quick")
    assert "is cancelled" not in done.stdout
    assert "quick is finished" in done.stdout + done.stderr
    assert Run.open(folder / "runs/quick").status()["state"] == "finished"
