"""orch verify-resume: is interrupted training bit for bit the uninterrupted one, for this job and on this machine?"""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.cli.options import Json, print_json

HELP = (
    "Check that resume is exact for a job, here: interrupted training gives bit for bit the uninterrupted one.\n\n"
    "Trains a few steps in one go, then the same steps with interruptions, each resumed in a fresh process from the "
    "written checkpoint, and compares the whole state: model, optimizer, random states, batches and metrics. All of it "
    "is done in a temporary folder (TMPDIR); no run is touched.\n\n"
    'Exit code: 0 if exact, 1 if not, 2 for errors. With "deterministic": false it is the same: a difference is '
    "measured and reported, with exit code 1. That mode allows it, but the training was not the same."
)


class Device(StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


def register(app: typer.Typer) -> None:
    app.command("verify-resume", help=HELP)(verify_resume)


def verify_resume(
    settings: Annotated[Path, typer.Argument(help="A settings file (JSON).")],
    steps: Annotated[
        int, typer.Option("--steps", min=1, metavar="N", help="Batches of an epoch, at most: a small part of the data.")
    ] = 4,
    chunks: Annotated[
        int, typer.Option("--chunks", min=1, metavar="N", help="Chunks of two epochs, each under the next profile.")
    ] = 2,
    interruptions: Annotated[
        int, typer.Option("--interruptions", min=1, metavar="N", help="How often to interrupt; each costs a process.")
    ] = 4,
    device: Annotated[
        Device, typer.Option("--device", help="auto: a GPU where there is one, as a job of the run does.")
    ] = Device.AUTO,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting.")] = None,
    json: Json = False,
) -> None:
    """Train a little twice, with and without interruptions, and compare."""
    from orchestrator.settings.loading import load
    from orchestrator.worker.user_job import verify_resume as verify

    loaded, notes = load(settings, set_ or [])
    if loaded.gpus_per_worker > 1:
        notes.append(f"gpus_per_worker is {loaded.gpus_per_worker}; one process is checked, on one device")

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    for note in notes:
        say(note)
    found = verify(
        loaded,
        [str(Path.cwd())],
        chunks=chunks,
        steps_per_epoch=steps,
        interruptions=interruptions,
        device=device.value,
        say=say,
    )
    if json:
        print_json(found)
    else:
        _print(found)
    if not found["exact"]:
        raise typer.Exit(1)


def _print(found: dict[str, Any]) -> None:
    breaks = ", ".join(map(str, found["interrupted_after"])) or "none"
    mode = "on" if found["deterministic"] else "off"
    answer = "exact" if found["exact"] else "NOT EXACT"
    print(f"{answer}: {found['job']}, {found['steps']} steps in {found['chunks']} chunks")
    print(f"  interrupted after steps: {breaks}")
    print(
        f"  compared: {found['tensors_compared']} tensors in {found['states_compared']} states, "
        f"{found['batches_compared']} batches"
    )
    threads = f"{found['threads']} thread{'' if found['threads'] == 1 else 's'}"
    print(
        f"  on: {found['device']}, {threads}, torch {found['torch']}, deterministic mode {mode}; {found['seconds']} s"
    )
    if found["inexact"] is not None:
        _print_difference(found["inexact"])
    for line in found["advice"]:
        print(f"  - {line}")


def _print_difference(inexact: dict[str, Any]) -> None:
    first, since = inexact["first"], inexact["interrupted_after"]
    print(
        f"  first difference: {first['path']} ({first['kind']}): expected {first['expected']}, found {first['found']}"
    )
    print(f"  max abs difference: {_size(first['max_abs_difference'])} there, {_size(inexact['largest'])} in all")
    where = f"in the state after {inexact['found_after']} steps"
    print(f"  found: {where}, {f'resumed after step {since}' if since else 'before any interruption'}")
    print(f"  differs in: {', '.join(inexact['parts'])}")
    batch = inexact["first_batch"]
    print(f"  batches: {'all the same' if batch is None else f'other ones from step {batch} on'}")


def _size(value: float | None) -> str:
    return "no finite number" if value is None else f"{value:.3g}"
