"""Each built-in job on real data with its settings file, but smaller: from `orch launch` to a full board.

`make test` runs one of several similar settings files; `make test-long` runs the others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision import models

from jobs.data import randomness
from jobs.resnet18 import BREEDS
from jobs.training import states
from orchestrator.run.run import Run
from tests.support import curves, real_data
from tests.support.command_line import orch_here, output
from tests.support.invariants import violations

ROOT = Path(__file__).parents[2]
BATCH = 50
TRAIN_IMAGES = 500  # a tenth of them are used for validation
STEPS = 9  # steps in an epoch

SMALL = {
    "num_models": 2,
    "workers": 1,
    "cores_per_worker": 1,
    "max_batch_size": BATCH,
    "total_lifetime": 200,
    "eon_lifetime": 100,
    "stop_after_stale_cycles": None,  # so that a run ends after its epochs, however good its few pictures are
    "slurm_file": None,
    "job_params.train_images": TRAIN_IMAGES,
    "job_params.test_images": 100,
}


Launch = Callable[..., Run]


def also(names: list[str]) -> list[Any]:
    """Mark settings files as long, because they are similar to one that is always tested."""
    return [pytest.param(name, marks=pytest.mark.long) for name in names]


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Launches a settings file, waits for the end, evaluates the models, and checks that the board is full and has test
    metrics. The commands run in this process, and with the executor "inline" the job does too, because importing torch
    again would take most of the time."""

    def run(name: str, root: Path, executor: str = "inline", **changes: Any) -> Run:
        values = SMALL | {"training_source_dir": str(root)} | {key.replace("__", "."): v for key, v in changes.items()}
        options = [part for key, value in values.items() for part in ("--set", f"{key}={json.dumps(value)}")]
        file = str(ROOT / "settings" / f"{name}.json")
        output(orch_here(tmp_path, "launch", file, "--executor", executor, "--wait", *options))
        output(orch_here(tmp_path, "evaluate", name))
        run = Run.open(tmp_path / "runs" / name)
        status = run.status()
        assert status["state"] == "finished", status
        assert status["chunks"]["failed"] == 0
        assert violations(run) == []
        assert len(run.board()["entries"]) == values["num_models"]
        for entry in run.board()["entries"]:
            assert 0 <= entry["score"] <= 1
            assert math.isfinite(entry["test_metrics"]["loss"])
        return run

    return run


def rates(run: Run) -> list[list[float]]:
    """Return the learning rates of all steps, for each chunk of the longest lineage."""
    trained_by = {c["checkpoint_id"]: c["chunk_id"] for c in run.leaderboard.reader.rows("checkpoint")}
    lines: dict[int, list[list[float]]] = {}
    for chunk in run.leaderboard.reader.rows("chunk"):
        before = lines[trained_by[chunk["parent_id"]]] if chunk["parent_id"] else []
        curve, _ = curves.of_tensorboard(run.folder / "logs", chunk["chunk_id"])
        lines[chunk["chunk_id"]] = [*before, [value for _, value in curve["train/learning_rate"]]]
    return max(lines.values(), key=len)


# --- davidnet


@pytest.mark.parametrize("name", ["davidnet_tricks", *also(["davidnet"])])
def test_davidnet_fills_a_board(name: str, launch: Launch) -> None:
    narrow = {"job_params__channels": [8, 8, 16, 16], "epochs_per_chunk": 1, "stop_after_epochs": 3}
    run = launch(name, real_data.cifar10_root(), **narrow)
    assert run.settings.job_params["channels"] == [8, 8, 16, 16]


# --- lenet5

SCHEDULES: dict[str, Callable[[int], float]] = {  # the learning rate of an epoch, which is counted from 0
    "constant": lambda epoch: 0.001,
    "step": lambda epoch: 0.002 * 0.4 ** (epoch // 4),
    "multistep": lambda epoch: 0.002 * 0.3 ** sum(epoch >= milestone for milestone in (4, 8, 12)),
    "exponential": lambda epoch: 0.002 * 0.8**epoch,
}


@pytest.mark.parametrize("schedule", ["exponential", *also(["constant", "step", "multistep"])])
def test_lenet5_fills_a_board_and_each_schedule_continues_from_chunk_to_chunk(schedule: str, launch: Launch) -> None:
    run = launch(f"lenet5_{schedule}", real_data.mnist_root(), num_models=1, stop_after_epochs=12)
    line = rates(run)
    assert len(line) >= 2
    wanted = [
        [SCHEDULES[schedule](4 * chunk + step // STEPS) for step in range(4 * STEPS)] for chunk in range(len(line))
    ]
    for trained, expected in zip(line, wanted, strict=True):
        assert trained == pytest.approx(expected)


def test_lenet5_fills_a_board_with_one_cycle_in_each_chunk(launch: Launch) -> None:
    run = launch("lenet5_onecycle", real_data.mnist_root(), num_models=1, stop_after_epochs=16)
    for trained, peak in zip(rates(run), (0.003, 0.0005), strict=True):
        assert len(trained) == 8 * STEPS
        assert max(trained) == pytest.approx(peak, rel=0.001)  # the peak lies between two steps
        assert trained[0] == pytest.approx(peak / 25)  # torch's default div_factor
        assert trained[-1] == pytest.approx(peak / 25 / 1e4)
        top = trained.index(max(trained))
        assert trained == sorted(trained[:top]) + sorted(trained[top:], reverse=True)


def test_lenet5_learns_digits_within_a_few_epochs_and_fills_a_board(launch: Launch) -> None:
    changes = {"workers": 2, "stop_after_epochs": 8, "job_params__train_images": 3000, "job_params__test_images": 1000}
    run = launch("lenet5", real_data.mnist_root(), "local", **changes)
    assert run.board()["entries"][0]["test_metrics"]["accuracy"] > 0.85


# --- resnet18


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of an untrained network for other classes, because tests do not download."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    with randomness.random_state_kept():
        torch.save(models.resnet18(num_classes=BREEDS + 1).state_dict(), path)
    return path


@pytest.mark.parametrize("name", ["resnet18_scratch", "resnet18_head", *also(["resnet18"])])
def test_resnet18_fills_a_board(name: str, weights: Path, launch: Launch) -> None:
    changes: dict[str, Any] = {"job_params__image_size": 32, "job_params__train_images": None}
    if name != "resnet18_scratch":
        changes["job_params__pretrained"] = str(weights)
    run = launch(name, real_data.pets_root(), epochs_per_chunk=1, stop_after_epochs=3, **changes)
    for entry in run.board()["entries"]:
        trained = states.read(run.folder / "checkpoints" / entry["file"])["model"]
        given = torch.load(weights, weights_only=True)
        kept = (
            {key for key in trained if torch.equal(trained[key], given[key])} if name != "resnet18_scratch" else set()
        )
        assert kept == (set(trained) - {"fc.weight", "fc.bias"} if name == "resnet18_head" else set())
