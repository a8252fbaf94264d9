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
    say,
)
from orchestrator.messages import counted


def prepare(
    settings: SettingsFile,
    set_: Set = None,
    from_: Annotated[
        list[Path] | None,
        typer.Option(
            "--from", metavar="FILE", exists=True, dir_okay=False, help="An archive or weights that you carried here."
        ),
    ] = None,
    stand_in: Annotated[
        bool, typer.Option("--stand-in", help="Make a small artificial data set instead; needs no network.")
    ] = False,
    sha256: Annotated[
        str | None, typer.Option("--sha256", metavar="HEX", help="The checksum that the data's archive must have.")
    ] = None,
) -> None:
    """Fetch the weights and data that a job needs, for nodes without internet access.

    An interrupted download continues where it stopped.
    """
    from orchestrator.settings.loading import load
    from orchestrator.worker import user_job

    loaded, notes = load(settings, set_ or [])
    brought = [file.absolute() for file in from_ or []]
    lines = user_job.prepare(loaded, [str(Path.cwd())], brought=brought, stand_in=stand_in, sha256=sha256, say=say)
    for line in notes + (lines or [f"job {loaded.job} needs no files"]):
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
    out: Annotated[
        Path, typer.Option("--out", help="The file to write; its description goes into a .json file of the same name.")
    ] = Path("best.pt"),
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
) -> None:
    """Write a model's weights to a file for `model.load_state_dict(torch.load(file))`.

    An earlier export is replaced, but no file that orch did not write.
    """
    from orchestrator.files import permissions
    from orchestrator.run.models import export_entry

    opened = open_run(run, runs_dir)
    with permissions.users_umask():
        entry = export_entry(opened, rank, out)
    print(f"{out}: rank {rank}, score {entry['score']:.6g}, {counted(entry['epochs'], 'epoch')}")
    print(f"{out.with_suffix('.json')}: its description")
    if (data := opened.data_source()) and data.get("stand_in"):
        print(f"STAND-IN DATA: {data['name']}")
