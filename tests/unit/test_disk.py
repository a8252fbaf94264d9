"""The disk budget, and the estimate of the disk space that a run needs."""

from __future__ import annotations

import errno
import io
import json
import math
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from jobs.job import Job
from jobs.training.footprint import checkpoint_bytes
from jobs.training.opening import open_session
from orchestrator.errors import CheckpointError, NoSpaceError, SettingsError
from orchestrator.files import checkpoints, disk_budget
from orchestrator.messages import gb
from orchestrator.records import Work
from orchestrator.rules import collecting
from orchestrator.settings.loading import load
from orchestrator.settings.settings import Settings
from orchestrator.worker import user_job
from tests.support.checkpoints import record_of

ROOT = Path(__file__).parents[2]
STEM = "g{0:08d}-c{0:08d}"


def demand(of: Settings, checkpoint_bytes: int | str, folder: Path) -> tuple[float | None, list[str]]:
    return disk_budget.demand(of.num_models, of.workers, of.max_disk_gb, checkpoint_bytes, folder)


def settings(**changes: Any) -> Settings:
    profiles = [{"name": "a", "learning_rate": 0.1}]
    return Settings.model_validate({"name": "run", "training_profiles": profiles} | changes)


@pytest.mark.parametrize(
    ("used", "needed", "budget", "fits"), [(60, 40, 100, True), (61, 40, 100, False), (0, 101, 100, False)]
)
def test_used_and_needed_bytes_fit_the_budget_or_not(used: int, needed: int, budget: int, fits: bool) -> None:
    assert collecting.fits(used, needed, budget) is fits


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [(0, "0"), (1, "0.00000000100"), (123_456_789, "0.124"), (1_000_000_000, "1.00"), (12_341_000_000, "12.4"),
     (3_456_100_000_000, "3457")],
)  # fmt: skip
def test_a_size_is_shown_in_gb_to_three_digits(size_bytes: int, shown: str) -> None:
    assert gb(size_bytes) == shown


@given(st.integers(1, 10**15))
def test_a_shown_size_is_never_less_than_the_real_size(size_bytes: int) -> None:
    assert float(gb(size_bytes)) * 1e9 >= size_bytes * (1 - 1e-12)
    assert float(gb(size_bytes)) * 1e9 <= size_bytes * 1.0101 or size_bytes > 999e9


# --- before a checkpoint is written


def write(folder: Path, number: int, size_bytes: int) -> str:
    return checkpoints.write(
        folder / "checkpoints", STEM.format(number), lambda target: target.write(b"x" * size_bytes), record_of()
    ).file


def never_called(target: IO[bytes]) -> None:
    raise AssertionError("the size is known from those that are there")


def test_the_next_checkpoint_is_estimated_as_the_largest_or_measured_if_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    files = tmp_path / "checkpoints"
    assert disk_budget.needed_bytes(files, lambda target: target.write(b"x" * 700)) == 700
    write(tmp_path, 1, 300)
    write(tmp_path, 2, 200)
    assert disk_budget.needed_bytes(files, never_called) == 300


def test_unreferenced_files_are_deleted_only_if_their_space_is_needed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    held, garbage = write(tmp_path, 1, 1000), write(tmp_path, 2, 1000)
    used = disk_budget.used_bytes(tmp_path)
    disk_budget.make_room(tmp_path, (used + 1000) / 1e9, lambda: pytest.fail("there is room"), never_called)
    assert (tmp_path / "checkpoints" / garbage).exists()
    disk_budget.make_room(tmp_path, (used + 999) / 1e9, lambda: ({held}, set()), never_called)
    left = {path.suffix for path in (tmp_path / "checkpoints").iterdir() if path.stem == held.removesuffix(".pt")}
    assert left == {".pt", ".json"}
    assert not (tmp_path / "checkpoints" / garbage).exists()


def test_a_checkpoint_that_does_not_fit_is_an_error_with_the_needed_budget(tmp_path: Path) -> None:
    run = tmp_path / "mine"
    (run / "checkpoints").mkdir(parents=True)
    held = write(run, 1, 5_000_000)
    with pytest.raises(NoSpaceError, match=r"max_disk_gb is 0\.009: .* 0\.0101 GB in all\. `orch amend mine --set"):
        disk_budget.make_room(run, 0.009, lambda: ({held}, set()), never_called)
    disk_budget.make_room(run, 0.0101, lambda: ({held}, set()), never_called)


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "No space left on device"), (errno.EDQUOT, "Disk quota exceeded"), (errno.EROFS, "Read-only")],
)
def test_a_full_disk_is_one_clear_error_and_leaves_no_file(tmp_path: Path, code: int, words: str) -> None:
    def save(target: IO[bytes]) -> None:
        target.write(b"half of it")
        raise OSError(code, words)

    with pytest.raises(CheckpointError, match=rf"can't be written: {words}.*`orch gc`.*nothing is lost"):
        checkpoints.write(tmp_path, STEM.format(1), save, record_of())
    assert list(tmp_path.iterdir()) == []


# --- before a launch


def test_the_demand_counts_the_board_and_two_for_each_worker(tmp_path: Path) -> None:
    needed, lines = demand(settings(num_models=5, workers=3), 10**6, tmp_path / "runs" / "run")
    assert needed == pytest.approx(0.011)
    assert lines == ["disk: about 0.0110 GB at most, for 11 checkpoints of about 0.00100 GB each"]


def test_a_budget_that_is_less_than_the_demand_is_refused_with_both_figures(tmp_path: Path) -> None:
    small = settings(num_models=5, workers=3, max_disk_gb=0.01)
    with pytest.raises(SettingsError, match=r"^max_disk_gb: 0\.01 is less than what the run needs, about 0\.0110:"):
        demand(small, 10**6, tmp_path)
    assert demand(settings(num_models=5, workers=3, max_disk_gb=0.011), 10**6, tmp_path)[0] is not None


def test_less_free_space_than_the_demand_is_a_warning(tmp_path: Path) -> None:
    _, lines = demand(settings(), 10**17, tmp_path)
    assert lines[1].startswith(f"warning: {tmp_path} has ")
    assert lines[1].endswith(" GB free, less than the run needs")


def test_an_unknown_checkpoint_size_is_reported(tmp_path: Path) -> None:
    said = None, ["disk: unknown, because the job uses its own trainer"]
    assert demand(settings(max_disk_gb=1e-9), "the job uses its own trainer", tmp_path) == said


# --- how large a checkpoint is


def real_bytes(run: Settings) -> int:
    session = open_session(run, 1)
    session.train(Work(run.policy(1).cycle[0], 1, 0, 0, None, None), lambda: False, lambda result: None)
    written = io.BytesIO()
    session.save(written)
    return len(written.getvalue())


@pytest.mark.parametrize("width", [8, 64])
def test_the_estimate_for_the_digits_is_close_to_the_real_size(width: int) -> None:
    run, _ = load(ROOT / "settings/digits.json", [f"job_params.width={width}", "validation_fraction=0.97"])
    assert checkpoint_bytes(run) == pytest.approx(real_bytes(run), rel=0.2)


class Large(Job):
    """100 million parameters, 400 MB."""

    def model(self) -> nn.Module:
        return nn.Linear(10_000, 10_000, bias=False)


class LargeAdam(Large):
    def optimizer(self, model: nn.Module, profile: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters())


class Frozen(Large):
    def model(self) -> nn.Module:
        return nn.Sequential(super().model().requires_grad_(False), nn.Linear(10, 1))


class LooksAtValues(Job):
    """Its code needs the values of its tensors, which the meta device does not have."""

    def model(self) -> nn.Module:
        model = nn.Linear(100, 100)
        assert math.isfinite(model.weight.sum().item())
        return model


@pytest.mark.parametrize(
    ("job", "momentum", "times"),
    [("Large", 0.9, 2), ("Large", 0.0, 1), ("LargeAdam", 0.9, 3), ("Frozen", 0.9, 0)],
    ids=["SGD with momentum", "SGD without", "AdamW", "frozen layers, which the run keeps once"],
)
def test_the_estimate_knows_what_each_checkpoint_contains(job: str, momentum: float, times: int) -> None:
    profiles = [
        {"name": "a", "learning_rate": 0.1, "momentum": 0},
        {"name": "b", "learning_rate": 0.1, "momentum": momentum},
    ]
    values = settings(job=f"{__name__}:{job}", training_profiles=profiles)
    assert checkpoint_bytes(values) == pytest.approx(times * 400e6, rel=0.01, abs=1e6)


def test_a_model_that_needs_its_values_is_made_on_the_cpu() -> None:
    found = checkpoint_bytes(settings(job=f"{__name__}:LooksAtValues"))
    assert found is not None
    assert found > 2 * 40_400


def test_a_job_with_a_trainer_of_its_own_has_an_unknown_size() -> None:
    unknown = user_job.checkpoint_bytes(settings(job="tests.support.quick_job:Quick"))
    assert unknown == "the job uses its own trainer"


def test_the_budget_may_change_while_a_run_goes_on() -> None:
    from orchestrator.settings.loading import amend

    assert amend(settings(), ["max_disk_gb=0.5"]).max_disk_gb == 0.5
    for wrong in ("0", "-1", '"much"', "true"):
        with pytest.raises(SettingsError, match="max_disk_gb"):
            amend(settings(), [f"max_disk_gb={wrong}"])


def test_a_launch_file_s_demand_is_in_the_plan(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from orchestrator.cli.main import app

    run, _ = load(ROOT / "settings/digits.json")
    arguments = ["launch", str(ROOT / "settings/digits.json"), "--dry-run", "--json", "--runs-dir", str(tmp_path)]
    done = CliRunner().invoke(app, [*arguments, "--executor", "local"])
    size = checkpoint_bytes(run)
    assert size is not None
    assert json.loads(done.stdout)["disk_gb_at_most_about"] == pytest.approx(9 * size / 1e9, rel=0.01)
    assert "disk: about 0.0023" in done.stderr
    small = CliRunner().invoke(app, [*arguments, "--executor", "local", "--set", "max_disk_gb=0.001"])
    assert isinstance(small.exception, SettingsError)
