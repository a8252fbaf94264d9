"""`orch evaluate` and `orch export`."""

from __future__ import annotations

import hashlib
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
    content = (folder / "out/model.pt").read_bytes()
    assert json.loads((folder / "out/model.json").read_text()) == {
        "made_by": "orch export",
        "weights": "model.pt",
        "weights_sha256": hashlib.sha256(content).hexdigest(),
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


def test_an_export_never_replaces_the_users_settings_file(folder: Path, orch_call: OrchCall) -> None:
    (folder / "tiny.json").write_text('{"name": "tiny"}')
    before = names_in(folder)
    code, out, error = orch_call(folder, "export", "--out", "tiny.pt")
    assert (code, out) == (2, "")
    assert error.startswith("orch: --out tiny.pt: the description would replace tiny.json, which `orch export` did not")
    assert (folder / "tiny.json").read_text() == '{"name": "tiny"}'
    assert names_in(folder) == before


def test_an_export_may_be_repeated_with_another_rank(folder: Path, orch_call: OrchCall) -> None:
    for rank in ("1", "2", "1"):
        assert orch_call(folder, "export", "--rank", rank, "--out", "my best.pt")[0] == 0
        assert json.loads((folder / "my best.json").read_text())["rank"] == int(rank)


@pytest.mark.parametrize("known", [True, False], ids=["the model is made", "the model can't be made here"])
def test_weights_of_a_wrapped_model_are_exported_and_evaluated_without_the_wrapper(
    known: bool, tmp_path: Path, orch_call: OrchCall
) -> None:
    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\n"
        "import torch\n"
        "from jobs.digits import Digits\n"
        "from jobs.job import ChunkResult\n\n\n"
        "class Mine(Digits):\n"
        "    def model(self):\n"
        "        assert not Path('gone').exists()\n"
        "        return super().model()\n\n"
        "    def train_chunk(self, context):\n"
        "        for _ in range(context.epochs):\n"
        "            context.report({'accuracy': 0.5})\n"
        "        model = torch.nn.DataParallel(torch.compile(self.model(), backend='eager'))\n"
        "        assert all(name.startswith('module._orig_mod.') for name in model.state_dict())\n"
        "        return ChunkResult({'model': model.state_dict()})\n"
    )
    file = write_settings(tmp_path, job="mine:Mine", num_models=1, stop_after_epochs=1)
    assert orch_call(tmp_path, "launch", file)[0] == 0
    code, out, _ = orch_call(tmp_path, "evaluate", "--json")
    assert (code, len(json.loads(out)["entries"][0]["test_metrics"])) == (0, 2)
    if not known:
        (tmp_path / "gone").touch()
    assert orch_call(tmp_path, "export")[0] == 0
    (tmp_path / "gone").unlink(missing_ok=True)
    weights = torch.load(tmp_path / "best.pt", weights_only=True)
    load_job(Run.open(tmp_path / "runs/quick").settings).model().load_state_dict(weights)


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
