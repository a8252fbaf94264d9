"""Settings for tests, and the messages about mistakes in a settings file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import SettingsError
from orchestrator.settings.loading import load

FOLDER = Path(__file__).resolve().parents[2] / "settings"
ALEX = {"name": "alex", "learning_rate": 0.01, "momentum": 0.9, "weight_decay": 0.0005}
RON = {"name": "ron", "learning_rate": 0.0001, "momentum": 0.1, "weight_decay": 0.0005}
LEAST: dict[str, Any] = {"training_profiles": [ALEX]}


def mistakes(path: Path, *overrides: str, **fixed: Any) -> list[str]:
    """Return the lines of the error, without the file name at the beginning of each line."""
    with pytest.raises(SettingsError) as caught:
        load(path, overrides, **fixed)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(str(path)) for line in lines), lines
    return [line.removeprefix(str(path)).removeprefix(": ") for line in lines]


def write_quick(folder: Path, *, seconds: float, eon_lifetime: float, **changes: Any) -> Path:
    """Write quick.json: two local workers whose chunks wait `seconds` instead of training."""
    file = folder / "quick.json"
    profiles = [{"name": "a", "learning_rate": 0.1}, {"name": "b", "learning_rate": 0.01}]
    settings = {
        "job": "tests.support.quick_job:Quick", "job_params": {"seconds": seconds}, "training_profiles": profiles,
        "workers": 2, "num_models": 3, "eon_lifetime": eon_lifetime, "total_lifetime": 300,
        "stop_after_stale_cycles": None, "stop_after_epochs": 40, "executor": "local", "max_failures": 50,
    }  # fmt: skip
    file.write_text(json.dumps(settings | changes))
    return file
