"""orch verify-resume: check that interruptions of a job's training on this machine do not change any bit of its
result."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestrator.cli.options import Json, Set, SettingsFile, print_json, say
from orchestrator.messages import counted


class Device(StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


def verify_resume(
    settings: SettingsFile,
    steps: Annotated[
        int,
        typer.Option("--steps", min=1, metavar="N", help="Limit each epoch to N batches, a small part of the data."),
    ] = 4,
    chunks: Annotated[
        int, typer.Option("--chunks", min=1, metavar="N", help="Number of 2-epoch chunks; each uses the next profile.")
    ] = 2,
    interruptions: Annotated[
        int,
        typer.Option("--interruptions", min=1, metavar="N", help="Number of interruptions; each starts a new process."),
    ] = 4,
    device: Annotated[
        Device, typer.Option("--device", help="auto: a GPU if there is one, as in a run's jobs.")
    ] = Device.AUTO,
    set_: Set = None,
    json: Json = False,
) -> None:
    """Check that a job resumes exactly on this machine.

    Trains a few steps without interruption, then the same steps with interruptions; after each one, a new process
    resumes from the checkpoint. Compares every bit of the model, optimizer, random states, batches and metrics. Works
    in a temporary folder (TMPDIR) and touches no run.

    Exit code: 0 if exact, 1 if not, 2 for errors. A difference gives exit code 1 even with "deterministic": false,
    although that mode allows differences.
    """
    from orchestrator.settings.loading import load
    from orchestrator.worker.user_job import verify_resume as verify

    loaded, notes = load(settings, set_ or [])
    if loaded.gpus_per_worker > 1:
        notes.append(f"gpus_per_worker is {loaded.gpus_per_worker}; the check uses one process on one device")

    for note in notes:
        say(note)
    result = verify(
        loaded,
        [str(Path.cwd())],
        chunks=chunks,
        steps_per_epoch=steps,
        interruptions=interruptions,
        device=device.value,
        say=say,
    )
    if json:
        print_json(result)
    else:
        _print(result)
    if not result["exact"]:
        raise typer.Exit(1)


def _print(result: dict[str, Any]) -> None:
    breaks = ", ".join(map(str, result["interrupted_after"])) or "none"
    mode = "on" if result["deterministic"] else "off"
    answer = "exact" if result["exact"] else "NOT EXACT"
    print(f"{answer}: {result['job']}, {result['steps']} steps in {result['chunks']} chunks")
    print(f"  interrupted after steps: {breaks}")
    print(
        f"  compared: {result['tensors_compared']} tensors in {result['states_compared']} states, "
        f"{result['batches_compared']} batches"
    )
    where = f"{result['device']}, {counted(result['threads'], 'thread')}, torch {result['torch']}"
    print(f"  on: {where}, deterministic mode {mode}; {result['seconds']} s")
    if result["inexact"] is not None:
        _print_difference(result["inexact"])
    for line in result["advice"]:
        print(f"  - {line}")


def _print_difference(inexact: dict[str, Any]) -> None:
    first, since = inexact["first"], inexact["interrupted_after"]
    print(
        f"  first difference: {first['path']} ({first['kind']}): expected {first['expected']}, found {first['found']}"
    )
    print(f"  max abs difference: {_size(first['max_abs_difference'])} there, {_size(inexact['largest'])} overall")
    where = f"in the state after {inexact['found_after']} steps"
    print(f"  found: {where}, {f'resumed after step {since}' if since else 'before any interruption'}")
    print(f"  differs in: {', '.join(inexact['parts'])}")
    batch = inexact["first_batch"]
    print(f"  batches: {'all the same' if batch is None else f'different from step {batch} on'}")


def _size(value: float | None) -> str:
    return "not a finite number" if value is None else f"{value:.3g}"
