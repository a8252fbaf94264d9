"""orch prepare, evaluate, export: the commands that import the job's code, and therefore torch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.options import (
    DEFAULT_RUNS_DIR,
    Json,
    RunArgument,
    RunsDir,
    Set,
    SettingsFile,
    open_run,
    print_json,
)
from orchestrator.messages import counted


def prepare(settings: SettingsFile, set_: Set = None) -> None:
    """Download the weights and data that a job needs, for nodes without internet access."""
    from orchestrator.settings.loading import load
    from orchestrator.worker.user_job import check_job

    loaded, notes = load(settings, set_ or [])
    for line in notes + check_job(loaded, [str(Path.cwd())], download=True):
        print(line)


def evaluate(
    run: RunArgument = None,
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
    json: Json = False,
    again: Annotated[bool, typer.Option("--again", help="Also test entries that have been tested already.")] = False,
) -> None:
    """Evaluate the leaderboard's models on the test set and record the results."""
    from orchestrator.cli import tables
    from orchestrator.run.models import test_models

    opened = open_run(run, runs_dir)
    test_models(opened, again, time.time())
    board = opened.board()
    if json:
        print_json(board)
    else:
        tables.show(tables.board(board))


def export(
    run: RunArgument = None,
    rank: Annotated[int, typer.Option("--rank", min=1, help="1 is the best.")] = 1,
    out: Annotated[Path, typer.Option("--out", help="The file to write; a .json file beside it describes it.")] = Path(
        "best.pt"
    ),
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
) -> None:
    """Write a model's weights to a file for `model.load_state_dict(torch.load(file))`."""
    from orchestrator.files import permissions
    from orchestrator.run.models import export_entry

    opened = open_run(run, runs_dir)
    with permissions.users_umask():
        entry = export_entry(opened, rank, out)
    print(f"{out}: rank {rank}, score {entry['score']:.6g}, {counted(entry['epochs'], 'epoch')}")
    print(f"{out.with_suffix('.json')}: its description")
