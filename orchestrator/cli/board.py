"""orch leaderboard, status, runs: show runs and their state."""

from __future__ import annotations

import contextlib
import time
from typing import Annotated

import typer

from orchestrator.cli.options import DEFAULT_RUNS_DIR, Json, RunArgument, RunsDir, open_run, print_json, say
from orchestrator.errors import LeaderboardError


def leaderboard(
    run: RunArgument = None,
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
    json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every 2 seconds until Ctrl-C.")] = False,
) -> None:
    """Show the best models of a run."""
    from rich.live import Live

    from orchestrator.cli import tables

    opened = open_run(run, runs_dir)
    if json:
        print_json(opened.board())
        return
    if not watch:
        tables.show(tables.board(opened.board()))
        return
    with contextlib.suppress(KeyboardInterrupt), Live(auto_refresh=False) as live:
        while True:
            live.update(tables.board(opened.board()), refresh=True)
            time.sleep(2)


def status(run: RunArgument = None, runs_dir: RunsDir = DEFAULT_RUNS_DIR, json: Json = False) -> None:
    """Show what a run is doing. Also restarts chains that are proven to be broken."""
    from orchestrator.cli import tables

    opened = open_run(run, runs_dir)
    try:
        done = opened.reconcile(time.time())
    except LeaderboardError as error:  # for example because of a full disk; the state can still be shown
        say(f"orch: broken chains could not be mended: {error}")
        done = []
    state = opened.status()
    if json:
        print_json(state | {"mended": done})
        return
    tables.show(tables.status(state), *(f"mended: {line}" for line in done))


def runs(runs_dir: RunsDir = DEFAULT_RUNS_DIR, json: Json = False) -> None:
    """List all runs, newest first."""
    from orchestrator.cli import tables
    from orchestrator.errors import OrchError
    from orchestrator.files import permissions
    from orchestrator.files.run_folder import all_runs
    from orchestrator.run.run import Run

    rows = []
    for folder in all_runs(runs_dir):
        try:
            with permissions.files_of(folder):
                rows.append(Run.open(folder).summary())
        except OrchError as error:  # one damaged run must not hide the others
            rows.append({"run": folder.name, "state": "unreadable", "reason": str(error)})
    if json:
        print_json(rows)
    elif not rows:
        print(f"no runs in {runs_dir}")
    else:
        tables.show(tables.runs(rows))
