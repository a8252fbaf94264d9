"""orch repair, gc: deal with files that are damaged, lost, or no longer needed."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.options import DEFAULT_RUNS_DIR, Json, RunName, RunsDir, open_run, print_json, say
from orchestrator.messages import counted

if TYPE_CHECKING:
    from orchestrator.run.repair import RepairReport


DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done; change nothing.")]


def repair(
    run: RunName,
    runs_dir: RunsDir = DEFAULT_RUNS_DIR,
    dry_run: DryRun = False,
    force: Annotated[
        bool, typer.Option("--force", help="Repair even if jobs of the run may still be running.")
    ] = False,
    json: Json = False,
) -> None:
    """Check a run's database and checkpoints; rebuild a lost or damaged database from the checkpoints' records.

    A healthy database is not changed, except that entries with damaged files leave the board. Damaged files are
    renamed, not deleted. The repair is refused while jobs of the run are alive.
    """
    from orchestrator.files import permissions
    from orchestrator.files.run_folder import find_run
    from orchestrator.run.repair import repair as repaired

    folder = find_run(run, runs_dir)
    permissions.use_umask(folder)
    report = repaired(folder, dry_run, force, time.time())
    if json:
        print_json(asdict(report))
    else:
        _print_repair(report)


def _print_repair(report: RepairReport) -> None:
    print(f"{report.run}: the database is {report.condition}")
    for line in report.problems:
        print(f"  {line}")
    for line in report.done:
        print(f"{'would be done' if report.dry_run else 'done'}: {line}")
    for entry in report.entries:
        print(f"  {entry['file']}: score {entry['score']:.6g}, {counted(entry['epochs'], 'epoch')}")
    for line in report.kept:
        print(f"kept: {line}")
    for line in report.unknown:
        print(f"note: {line}")


def gc(run: RunName, runs_dir: RunsDir = DEFAULT_RUNS_DIR, dry_run: DryRun = False, json: Json = False) -> None:
    """Delete a run's files that are no longer needed. Safe while its jobs are running.

    Deletes checkpoints that no entry and no claim refers to, temporary files, folders of old jobs (except the last
    three of each chain), curves older than a day (except those of chunks that a model on the board or in training
    descends from), and folders of killed launches.
    """
    from orchestrator.messages import gb
    from orchestrator.run.gc import collect

    report = collect(open_run(run, runs_dir), dry_run, time.time())
    if json:
        print_json(asdict(report))
    else:
        for kind, size in report.freed_bytes.items():
            print(f"{kind}: {len(report.files[kind])}, {gb(size)} GB")
        total = gb(sum(report.freed_bytes.values()))
        print(f"{total} GB {'would be freed' if dry_run else 'freed'}")
    for line in report.trouble:
        say(line)
    if report.trouble:
        raise typer.Exit(1)
