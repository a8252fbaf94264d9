"""`orch amend` and `orch cancel`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.run.run import Run
from tests.support.command_line import OrchCall, orch, output, write_settings
from tests.support.invariants import violations
from tests.support.processes import processes_of, until
from tests.support.small_runs import make_run
from tests.support.storage import Storage


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training_profiles.0.optimizer=AdamWW", "optimizer AdamWW: torch has no suitable class of that name"),
        ('training_profiles.0.schedule={"name": "StepLR"}', "StepLR"),
        ('loggers=["nowhere:Mine"]', "nowhere"),
    ],
)
def test_an_amendment_that_the_job_can_t_train_with_is_refused_and_changes_nothing(
    folder: Path, orch_call: OrchCall, change: str, message: str
) -> None:
    before = Run.open(folder / "runs/quick").leaderboard.run_state.settings()
    code, _, said = orch_call(folder, "amend", "quick", "--set", change)
    assert code != 0
    assert message in said
    assert "Traceback" not in said
    assert Run.open(folder / "runs/quick").leaderboard.run_state.settings() == before


def test_an_amendment_of_a_finished_run_tells_how_to_continue_it(folder: Path, orch_call: OrchCall) -> None:
    code, out, _ = orch_call(folder, "amend", "quick", "--set", "stop_after_epochs=60")
    assert code == 0
    assert out.splitlines() == ["stop_after_epochs: 6 -> 60", "quick is finished; `orch resume quick` continues it"]


def test_an_amendment_that_does_not_extend_a_run_says_what_would(folder: Path, orch_call: OrchCall) -> None:
    code, out, _ = orch_call(folder, "amend", "quick", "--set", "total_lifetime=2000")
    assert code == 0
    assert "quick is over: 6 epochs were trained, of 6 allowed. Use `orch amend quick --set ...` to extend it" in out
    assert "continues it" not in out


def test_an_amendment_that_ends_the_run_says_so(
    tmp_path: Path, orch_call: OrchCall, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(Storage(None), tmp_path / "runs/quick")
    monkeypatch.setattr(Run, "reconcile", lambda *_: [])  # otherwise it would end the run, which has no jobs
    code, out, _ = orch_call(tmp_path, "amend", "quick", "--set", "total_lifetime=0.001")
    assert code == 0
    assert "quick has already lasted longer than its total_lifetime: it ends after the current chunks" in out


# --- cancel


ROOT = Path(__file__).parents[2]


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for a run; its processes are killed after the test."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the job in tests.support
    yield tmp_path
    for process in processes_of(tmp_path):
        process.kill()


def test_a_run_continues_after_a_gentle_and_after_an_immediate_cancel(own_folder: Path) -> None:
    hold = own_folder / "hold"
    job = {"job": "tests.support.quick_job:Quick", "job_params": {"seconds": 0.1, "hold": [str(hold), 5]}}
    file = write_settings(own_folder, executor="local", **job)

    def launch_and_hold() -> None:
        hold.touch()
        output(orch(own_folder, "launch", file))
        counts = Run.open(own_folder / "runs/quick").leaderboard.reader.counts
        until("the job to train", lambda: counts()["chunks"]["live"])

    def status_when_all_ended() -> dict[str, Any]:
        until("the job to end", lambda: not processes_of(own_folder))
        status: dict[str, Any] = json.loads(output(orch(own_folder, "status", "--json")))
        assert (status["state"], status["reason"]) == ("cancelled", "cancelled by the user")
        return status

    launch_and_hold()
    assert output(orch(own_folder, "cancel", "quick")) == "quick is cancelled; its board stays as it is\n"
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


def test_cancelling_a_finished_run_reports_that_it_is_finished(folder: Path) -> None:
    done = orch(folder, "cancel", "quick")
    assert "is cancelled" not in done.stdout
    assert "quick is finished" in done.stdout + done.stderr
    assert Run.open(folder / "runs/quick").status()["state"] == "finished"
