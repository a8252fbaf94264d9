"""orch cancel: what changes a run that exists."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from orchestrator.cli.options import DEFAULT_RUNS_DIR, RunsDir, open_run


def register(app: typer.Typer) -> None:
    app.command()(cancel)


def cancel(
    run: Annotated[str, typer.Argument(help="Name or path of the run.")],
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
    now: Annotated[
        bool, typer.Option("--now", help="Kill the jobs instead of letting them suspend their chunk.")
    ] = False,
) -> None:
    """End a run and its jobs. `orch launch` of the same settings goes on with it."""
    opened = open_run(run, runs_dir)
    trouble = opened.cancel(at_once=now, now=time.time())
    print(f"{opened.name} is cancelled; its board stays as it is")
    for line in trouble:
        print(line, file=sys.stderr)
    if trouble:
        raise typer.Exit(1)
