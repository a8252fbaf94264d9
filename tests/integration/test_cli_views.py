"""What `orch` prints about runs: JSON for programs and tables for people."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrator.cli import tables
from orchestrator.cli.launch import _line
from tests.support.command_line import BOARD_KEYS, OrchCall, names_in, orch, output, write_job, write_settings

ENTRY_KEYS = {
    *("rank", "checkpoint", "score", "epochs", "worked_on", "founder", "parent", "profile", "worker"),
    *("promoted_at", "file", "sha256"),
}
STATUS_KEYS = {"run", "state", "deadline", "best", "workers", "chunks", "epochs", "train_seconds"}


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


def test_json_stays_json_when_the_job_prints(tmp_path: Path, orch_call: OrchCall) -> None:
    write_job(tmp_path, CHATTY)
    file = write_settings(tmp_path, job="mine:Mine", stop_after_epochs=1)
    for command in (["launch", file, "--json"], ["evaluate", "--json"]):
        code, out, error = orch_call(tmp_path, *command)
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
def test_commands_print_a_table_for_people(launched: tuple[Path, Any], command: str, shown: list[str]) -> None:
    done = orch(launched[0], command)
    text = output(done)
    assert all(words in text for words in shown), text
    assert done.stderr == ""


@pytest.mark.parametrize("width", [80, 60, 40, 30])
def test_a_score_is_shown_whole_in_a_terminal_of_any_width(width: int) -> None:
    entry = {"score": 0.987654, "epochs": 1234, "worked_on": 56, "profile": "a long name of a profile", "founder": 12}
    entry |= {"parent": 345, "promoted_at": "2026-01-02T03:04:05+00:00"}
    entries = [entry | {"rank": rank, "test_metrics": {"validation_f1": 0.87654}} for rank in (1, 10)]
    board = {"run": "quick", "metric": {"name": "validation_f1"}, "num_models": 5, "founders": 1}
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(tables.board(board | {"entries": entries, "select_on": "validation"}))
    console.print(tables.runs([{"run": "a_long_name_of_a_run", "state": "finished", "best": 0.12345, "epochs": 6}]))
    text = console.export_text()
    assert [text.count(score) for score in ("0.9877", "0.8765", "0.1235")] == [2, 2, 1], text


def test_a_count_of_one_has_a_singular_noun() -> None:
    """In the progress lines of `orch launch --wait`, and above the board."""
    state = {"state": "active", "best": 0.5, "chunks": {"promoted": 1, "discarded": 0}, "epochs": 1}
    assert _line(state) == "active: best 0.5000, 1 promoted, 0 discarded, 1 epoch"
    board = {"run": "quick", "metric": {"name": "loss"}, "num_models": 1, "founders": 1, "entries": []}
    assert (
        str(tables.board(board | {"select_on": "test"}).title) == "quick: 0 of 1 model, 1 lineage; loss on the test set"
    )


def test_commands_warn_if_no_score_is_a_finite_number(tmp_path: Path, orch_call: OrchCall) -> None:
    profiles = [{"name": "wild", "learning_rate": 1e30, "weight_decay": 0.0005}]
    file = write_settings(tmp_path, stop_after_epochs=2, training_profiles=profiles)
    for command, expected in (["launch", file, "--wait", "--no-try"], 1), (["status"], 0):
        code, out, _ = orch_call(tmp_path, *command)
        assert code == expected
        said = " ".join(out.split())
        assert "finished (2 epochs were trained, of 2 allowed) best - epochs 2" in said
        assert "warning: all 2 chunks so far ended with a score (accuracy) that is not a finite number" in said
        assert "learning rate" in said
    (warning,) = json.loads(orch_call(tmp_path, "status", "--json")[1])["warnings"]
    assert warning.startswith("all 2 chunks so far")


def test_a_run_with_a_board_has_no_warning(launched: tuple[Path, Any]) -> None:
    assert json.loads(output(launched[1]))["warnings"] == []


def test_a_folder_without_runs_is_reported(tmp_path: Path) -> None:
    assert output(orch(tmp_path, "runs")) == "no runs in runs\n"
    assert json.loads(output(orch(tmp_path, "runs", "--json"))) == []
    done = orch(tmp_path, "leaderboard")
    assert done.returncode == 2
    assert done.stderr == "orch: there is no run in runs; `orch launch settings/digits.json` makes one\n"
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("command", ["leaderboard", "status", "evaluate", "export", "cancel"])
def test_an_unknown_run_is_an_error_that_names_the_known_runs(launched: tuple[Path, Any], command: str) -> None:
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
def test_commands_that_only_show_something_import_nothing_slow(
    launched: tuple[Path, Any], arguments: list[str], unwanted: list[str]
) -> None:
    command = [sys.executable, "-c", FAST_START.format(unwanted=unwanted), *arguments]
    done = subprocess.run(command, cwd=launched[0], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout
    assert done.stderr == "[] 0\n"
