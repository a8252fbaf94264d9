"""orch prepare, evaluate, export: what needs the job's own code, and so torch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.options import DEFAULT_RUNS_DIR, Json, RunArgument, RunsDir, open_run, print_json
from orchestrator.messages import counted


def register(app: typer.Typer) -> None:
    app.command()(prepare)
    app.command()(evaluate)
    app.command()(export)


def prepare(
    settings: Annotated[Path, typer.Argument(help="A settings file.")],
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting.")] = None,
) -> None:
    """Fetch what a job needs from the internet (weights, data), for nodes that have none."""
    from orchestrator.settings.loading import load
    from orchestrator.worker.user_job import check_job

    loaded, notes = load(settings, set_ or [])
    for line in notes + check_job(loaded, [str(Path.cwd())], download=True):
        print(line)


def evaluate(
    run: RunArgument = None,
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
    json: Json = False,
    again: Annotated[
        bool, typer.Option("--again", help="Read the test set again for entries that were tested.")
    ] = False,
) -> None:
    """Read the test set for the entries of the board, and record that it was read."""
    from rich.console import Console

    from orchestrator.cli import tables
    from orchestrator.run.models import test_models

    opened = open_run(run, runs_dir)
    test_models(opened, again, time.time())
    board = opened.board()
    if json:
        print_json(board)
    else:
        Console().print(tables.board(board))


def export(
    run: RunArgument = None,
    rank: Annotated[int, typer.Option("--rank", min=1, help="1 is the best.")] = 1,
    out: Annotated[Path, typer.Option("--out", help="The file to write; a .json beside it says what it is.")] = Path(
        "best.pt"
    ),
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
) -> None:
    """Write a model's weights, as `model.load_state_dict(torch.load(file))` takes them."""
    from orchestrator.files import permissions
    from orchestrator.run.models import export_entry

    opened = open_run(run, runs_dir)
    with permissions.users_umask():
        entry = export_entry(opened, rank, out)
    print(f"{out}: rank {rank}, score {entry['score']:.6g}, {counted(entry['epochs'], 'epoch')}")
    print(f"{out.with_suffix('.json')}: what it is and where it comes from")
