"""Options shared by several commands, and JSON output."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from orchestrator.run.run import Run

RunArgument = Annotated[
    str | None, typer.Argument(metavar="[RUN]", help="Name or path of a run. Default: the newest.", show_default=False)
]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Name or path of the run.")]
SettingsFile = Annotated[Path, typer.Argument(metavar="SETTINGS", help="A settings file (JSON).")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, such as slurm.nice=5.")
]
RunsDir = Annotated[
    Path, typer.Option("--runs-dir", envvar="ORCH_RUNS_DIR", help="The folder of all runs.", file_okay=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print only JSON on standard output.")]
DEFAULT_RUNS_DIR = Path("runs")


def open_run(run: str | None, runs_dir: Path) -> Run:
    from orchestrator.files import permissions
    from orchestrator.files.run_folder import find_run
    from orchestrator.run.run import Run

    opened = Run.open(find_run(run, runs_dir))
    permissions.use_umask(opened.folder)
    return opened


def say(line: str) -> None:
    """Print on standard error, unbuffered. Standard output is only for results."""
    print(line, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def has_jobs(status: dict[str, Any]) -> bool:
    """Return whether any worker has a job. status: the result of `Run.status`."""
    from orchestrator.rules.succession import WorkerState

    return any(worker["state"] in (WorkerState.QUEUED, WorkerState.RUNNING) for worker in status["workers"])
