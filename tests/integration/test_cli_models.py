"""`orch evaluate` and `orch export`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.training.opening import load_job
from jobs.training.session import Session
from jobs.training.states import read
from orchestrator.run.run import Run
from tests.support.command_line import (
    BOARD_KEYS,
    QUICK,
    OrchCall,
    events,
    job_with,
    names_in,
    orch,
    output,
    write_job,
    write_settings,
)


def readings_of(folder: Path) -> list[tuple[Any, Any]]:
    board = Run.open(folder / "runs/quick").board()
    return [(entry["tested_at"], entry["test_metrics"]) for entry in board["entries"]]


def test_the_test_set_is_read_once_and_again_only_when_asked(folder: Path, orch_call: OrchCall) -> None:
    run = folder / "runs/quick"
    assert readings_of(folder) == [(None, None)] * 2

    board = json.loads(output(orch(folder, "evaluate", "--json")))
    assert board.keys() >= BOARD_KEYS
    first = [(entry["tested_at"], entry["test_metrics"]) for entry in board["entries"]]
    assert all(at is not None and metrics.keys() == {"accuracy", "loss"} for at, metrics in first)
    assert readings_of(folder) == first
    assert events(run, "tested") == 2

    code, out, _ = orch_call(folder, "evaluate")
    assert code == 0
    assert "on test" in out
    assert readings_of(folder) == first
    assert events(run, "tested") == 2

    code, out, _ = orch_call(folder, "evaluate", "--json", "--again")
    assert code == 0
    for entry, (_, metrics) in zip(json.loads(out)["entries"], first, strict=True):
        assert entry["test_metrics"] == pytest.approx(metrics)
    assert events(run, "tested") == 4


def test_an_error_of_the_job_at_its_evaluation_is_reported(tmp_path: Path, orch_call: OrchCall) -> None:
    lost = "        if Path('gone').exists(): raise JobError('pretrained_weights: they are gone')\n"
    method = f"def model(self):\n{lost}        return super().model()"
    write_job(tmp_path, "from jobs.errors import JobError\n" + job_with(method))
    file = write_settings(tmp_path, job="mine:Mine", stop_after_epochs=1)
    assert orch_call(tmp_path, "launch", file)[0] == 0
    (tmp_path / "gone").touch()
    assert orch_call(tmp_path, "evaluate") == (2, "", "orch: pretrained_weights: they are gone\n")


@pytest.mark.quick
def test_an_exported_model_loads_and_scores_as_it_did(folder: Path) -> None:
    done = orch(folder, "export", "--out", "out/model.pt")
    entry = Run.open(folder / "runs/quick").board()["entries"][0]
    assert f"out/model.pt: rank 1, score {entry['score']:.6g}, {entry['epochs']} epochs\n" in output(done)
    assert json.loads((folder / "out/model.json").read_text()) == {
        "run": "quick",
        "job": QUICK["job"],
        "data": None,
        **entry,
    }
    assert names_in(folder / "out") == {"model.pt", "model.json"}

    weights = torch.load(folder / "out/model.pt", weights_only=True)
    job = load_job(Run.open(folder / "runs/quick").settings)
    model = job.model()
    model.load_state_dict(weights)
    model.eval()
    right = count = 0
    for inputs, targets in Session(job).feed("validation").in_order():
        right += int((model(inputs).argmax(dim=1) == targets).sum())
        count += len(targets)
    assert right / count == pytest.approx(entry["score"])


@pytest.mark.parametrize("rank", [1, 2])
def test_an_export_is_bit_for_bit_the_model_of_its_rank(folder: Path, rank: int, orch_call: OrchCall) -> None:
    assert orch_call(folder, "export", "--rank", str(rank))[0] == 0
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
    folder: Path, options: list[str], message: str, orch_call: OrchCall
) -> None:
    before = names_in(folder)
    code, out, error = orch_call(folder, "export", *options)
    assert code == 2, out
    assert error.startswith(f"orch: {message}")
    assert names_in(folder) == before


def test_a_damaged_checkpoint_is_never_exported(folder: Path, orch_call: OrchCall) -> None:
    entry = Run.open(folder / "runs/quick").board()["entries"][0]
    with (folder / "runs/quick/checkpoints" / entry["file"]).open("r+b") as file:
        file.seek(1000)
        file.write(b"damaged")
    code, _, error = orch_call(folder, "export")
    assert code == 2
    assert entry["file"] in error
    assert "`orch repair quick` to take this entry off the board" in error
    assert "best.pt" not in names_in(folder)
