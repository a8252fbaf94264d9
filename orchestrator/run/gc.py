"""orch gc: delete files that are no longer needed. This is safe while the run continues: each folder is listed before
the database is read, so files created after the listing are never deleted."""

from __future__ import annotations

import math
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from orchestrator.errors import CheckpointError
from orchestrator.files import checkpoints, disk_budget, run_folder
from orchestrator.files.checkpoint_record import read_record
from orchestrator.files.run_folder import CHECKPOINTS, DATABASE_NAME, JOBS, LOGS
from orchestrator.rules import collecting
from orchestrator.rules.checkpoint_names import generation_of
from orchestrator.run.run import Run

KINDS = ("checkpoints", "temporary files", "job folders", "curves", "dead launches")
ORPHANED_S = 3600.0  # temporary files older than this belong to no running process
CURVES_KEPT_S = 86400.0  # how long the curves of discarded chunks are kept for users
SERIES_FOLDERS = ("tensorboard", "wandb")  # subfolders of logs/ in which loggers make a folder for each chunk
_TEMPORARY = re.compile(r"\.tmp-.+-\d+|\.repair-.+")


@dataclass
class CollectionReport:
    """What was deleted, or would be deleted."""

    run: str
    dry_run: bool
    freed_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    files: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    trouble: list[str] = field(default_factory=list)

    def take(self, kind: str, path: Path) -> None:
        """Delete a file or folder, or in a dry run only count it. Do not count it if it no longer exists."""
        size = disk_budget.used_bytes(path)
        if not self.dry_run:
            try:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            except FileNotFoundError:
                return
            except OSError as error:
                self.trouble.append(f"{path}: {error.strerror or error}")
                return
        self.files[kind].append(path.name)
        self.freed_bytes[kind] += size


def collect(run: Run, dry_run: bool, now: float) -> CollectionReport:
    """Delete files that the run does not need. Raises LeaderboardError if the database can't be read."""
    report = CollectionReport(run.name, dry_run)
    files = run.folder / CHECKPOINTS
    collectable = checkpoints.collectable(files, run.leaderboard.reader.references) if files.is_dir() else []
    for name in collectable:
        report.take("checkpoints" if not name.startswith(".") else "temporary files", files / name)
    for path in (*_listed(run.folder), *_listed(files)):
        temporary = _TEMPORARY.fullmatch(path.name) and generation_of(path.name) is None  # not a claim's file
        if temporary and now - _touched(path) > ORPHANED_S:
            report.take("temporary files", path)
    folders = [path for path in _listed(run.folder / JOBS) if path.is_dir()]
    tokens = run.leaderboard.reader.tokens()
    for name in collecting.old_job_folders({p.name: now - _touched(p) for p in folders}, tokens, ORPHANED_S):
        report.take("job folders", run.folder / JOBS / name)
    _collect_curves(run, report, now)
    for path in _dead_launches(run.folder, now):
        report.take("dead launches", path)
    return report


def _collect_curves(run: Run, report: CollectionReport, now: float) -> None:
    folders = [path for part in SERIES_FOLDERS for path in _listed(run.folder / LOGS / part) if path.is_dir()]
    ages_s = {path.name: now - _touched(path) for path in folders}
    old = set(collecting.old_series(ages_s, (), CURVES_KEPT_S))
    if not old:  # no need to read the records
        return
    try:
        old = set(collecting.old_series(ages_s, _lines(run), CURVES_KEPT_S))
    except CheckpointError as error:
        report.trouble.append(f"curves are not collected: {error}")
        return
    for path in sorted(path for path in folders if path.name in old):
        report.take("curves", path)


def _lines(run: Run) -> set[int]:
    """Return the chunks in the lineages of all checkpoints that are needed now. A checkpoint written later descends
    from one of these or is a new founder.

    Raises CheckpointError if a record can't be read."""
    files = run.leaderboard.reader.references()[0]
    while True:
        try:
            records = [read_record(run.folder / CHECKPOINTS, file) for file in files]
        except CheckpointError:
            before, files = files, run.leaderboard.reader.references()[0]
            if files == before:
                raise
            continue  # the board has changed: the checkpoint without a readable record may have left it
        return {line.chunk for record in records for line in (record, *record.ancestors)}


def _listed(folder: Path) -> list[Path]:
    """Return the paths in the folder; an empty list if the folder does not exist."""
    return list(folder.iterdir()) if folder.is_dir() else []


def _dead_launches(folder: Path, now: float) -> list[Path]:
    """Return the temporary folders of launches that were killed before they finished (see `launch`)."""
    name = re.compile(rf"\.{re.escape(folder.name)}-(\d+)")
    dead = []
    for path in folder.parent.iterdir():
        match = name.fullmatch(path.name)
        if match is None or not path.is_dir() or psutil.pid_exists(int(match[1])):
            continue
        inside = [part.name for part in path.iterdir()]
        is_launch = all(part in run_folder.PARTS or part.startswith(DATABASE_NAME) for part in inside)
        if is_launch and now - _touched(path) > ORPHANED_S:
            dead.append(path)
    return sorted(dead)


def _touched(path: Path) -> float:
    """Return the latest modification time (Unix time) of path and all files in it; inf if path was just deleted."""
    times = []
    for each in (path, *(Path(folder, name) for folder, _, names in os.walk(path) for name in names)):
        try:
            times.append(each.lstat().st_mtime)
        except OSError:
            continue
    return max(times, default=math.inf)
