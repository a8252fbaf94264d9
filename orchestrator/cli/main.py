"""The entry point of `orch`. Each group of commands has a module. Commands import slow modules only when they are
called, so that `orch --help` is fast."""

from __future__ import annotations

import io
import os
import sys

import typer

from orchestrator.cli.board import leaderboard, runs, status
from orchestrator.cli.control import amend, cancel, drain, keep, pause, resume
from orchestrator.cli.doctor import doctor
from orchestrator.cli.launch import launch
from orchestrator.cli.models import evaluate, export, prepare
from orchestrator.cli.recovery import gc, repair
from orchestrator.cli.verify import verify_resume
from orchestrator.errors import OrchError

COMMANDS = (  # in the order of `orch --help`
    launch, leaderboard, status, runs, pause, resume, drain, cancel, amend, keep, prepare, evaluate, export, repair, gc,
    verify_resume, doctor,
)  # fmt: skip
app = typer.Typer(
    help="Train a population of models on Slurm: chains of jobs, a leaderboard that never gets worse, no coordinator.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in COMMANDS:
    app.command()(command)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True)) -> None:
    if version:
        from orchestrator import __version__

        print(f"orch {__version__}")
        raise typer.Exit


# These commands load the job's data, which must be the same as in its jobs: sets of strings must have the same order.
LOADS_DATA = ("launch", "evaluate", "prepare", "amend", "verify-resume")


def _with_the_jobs_hash_seed() -> None:
    """Start this program again with the hash seed of all jobs, if it is `orch` with a command that loads data."""
    script = sys.orig_argv[1:2] and os.path.basename(sys.orig_argv[1]) == "orch"
    if script and set(LOADS_DATA) & set(sys.argv[1:2]) and os.environ.get("PYTHONHASHSEED") != "0":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"PYTHONHASHSEED": "0"})


def main() -> None:
    """Run `orch`. An error that the user can correct gives a message and exit code 2, not a traceback."""
    _with_the_jobs_hash_seed()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may have bytes that can't be decoded
    try:
        app()
    except OrchError as error:
        print(f"orch: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the program that reads the output has ended, as in `orch runs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
