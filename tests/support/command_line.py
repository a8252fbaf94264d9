"""Helpers to call `orch` as a user does: settings files, a user's own job, the process and its output, the events."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ORCH = Path(sys.executable).with_name("orch")

# Trains in seconds: the digits of scikit-learn, a narrow network, six epochs.
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

BOARD_KEYS = {"run", "metric", "num_models", "entries"}

OrchCall = Callable[..., tuple[int, str, str]]  # see the fixture `orch_call`


def orch(cwd: Path, *arguments: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "ORCH_RUNS_DIR"}
    command = [str(ORCH), *arguments]
    return subprocess.run(
        command, cwd=cwd, env=kept | {"COLUMNS": "200"}, capture_output=True, text=True, timeout=timeout_s
    )


def output(done: subprocess.CompletedProcess[str], code: int = 0) -> str:
    assert done.returncode == code, done.stderr
    return done.stdout


def write_settings(folder: Path, **changes: Any) -> str:
    (folder / "settings.json").write_text(json.dumps(QUICK | changes, indent=2))
    return "settings.json"


def write_job(folder: Path, code: str) -> None:
    """Write a user's own module, mine.py, to the folder from which a run is launched."""
    (folder / "mine.py").write_text(f"import os, sys, time\nfrom pathlib import Path\n{code}")


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"__pycache__"}


def events(folder: Path, kind: str) -> int:
    """Count the events of a kind in a run's database."""
    with sqlite3.connect(folder / "orch.db") as database:
        (count,) = database.execute("SELECT count(*) FROM event WHERE kind = ?", (kind,)).fetchone()
    database.close()
    return int(count)


def job_with(method: str) -> str:
    return f"from jobs.digits import Digits\nclass Mine(Digits):\n    {method}\n"
