"""Launch runs on the test cluster, wait for them, and read their state."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.run.launch import launch as launch_run
from orchestrator.run.run import Run
from orchestrator.settings.settings import Settings

ROOT = Path(__file__).parents[2]
QUICK: dict[str, Any] = {
    "job": "tests.support.quick_job:Quick",
    "executor": "slurm",
    "num_models": 4,
    "training_profiles": [
        {"name": name, "learning_rate": rate} for name, rate in (("a", 0.1), ("b", 0.01), ("c", 0.1))
    ],
    "stop_after_stale_cycles": None,
    "total_lifetime": 600,
    "eon_lifetime": 4,
    "slurm": {"gpus": 1, "cpus": 1, "mem_gb": 0.5},
}


def settings(name: str, **changes: Any) -> Settings:
    return Settings.model_validate(QUICK | {"name": name} | changes)


def launch(wanted: Settings, folder: Path) -> Run:
    return launch_run(wanted, folder / "runs", [str(ROOT)])


def until(what: str, condition: Callable[[], Any], timeout_s: float = 60, every_s: float = 0.1) -> Any:
    """Wait until the condition is true, and return its value."""
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {timeout_s} s for: {what}"
        time.sleep(every_s)
    return value


def over(run: Run) -> bool:
    """Return whether the run has ended with no job left. First restarts broken chains, as `orch status` does."""
    run.reconcile(time.time())
    snapshot = run.leaderboard.run_state.snapshot()
    return snapshot.state not in ("active", "draining") and not snapshot.open_jobs


def jobs(run: Run, *states: str) -> list[dict[str, Any]]:
    return [j for j in run.leaderboard.reader.rows("job") if not states or j["state"] in states]


def epochs(run: Run) -> int:
    return int(run.leaderboard.reader.counts()["epochs"])


def worked(run: Run) -> list[dict[str, Any]]:
    return [j for j in jobs(run) if j["started_at"] is not None]
