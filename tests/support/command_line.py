"""Helpers to call `orch` as a user does: settings files, a user's own job, the process and its output, the events."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.files import permissions

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


@contextlib.contextmanager
def umask_as_it_was() -> Iterator[None]:
    before = os.umask(0o022)
    os.umask(before)
    try:
        yield
    finally:
        os.umask(before)
        permissions._umask_at_start = None


def orch_here(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `orch` in this process, which has imported torch already: a new process would need seconds for that."""
    from orchestrator.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, umask_as_it_was():
        patch.delenv("ORCH_RUNS_DIR", raising=False)
        patch.setenv("COLUMNS", "200")
        patch.setattr(sys, "argv", ["orch", *arguments])
        patch.setattr(sys, "path", [*sys.path])
        patch.chdir(cwd)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
                main()
        finally:
            for name, module in list(sys.modules.items()):
                if Path(getattr(module, "__file__", None) or "/").parent == cwd:  # the user's own modules
                    del sys.modules[name]
    return subprocess.CompletedProcess(["orch", *arguments], int(end.value.code or 0), out.getvalue(), err.getvalue())


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
