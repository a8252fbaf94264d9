"""orch gc: delete what nothing refers to any more. Safe while the run goes on, since each folder is listed before the
database is asked: what appears meanwhile is not judged."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from orchestrator.errors import CheckpointError
from orchestrator.files import checkpoints, disk_budget, run_folder
from orchestrator.rules import collecting
from orchestrator.run.run import Run

KINDS = ("checkpoints", "temporary files", "job folders", "curves", "dead launches")
# What nobody has touched for so long, nobody is about to give its final name.
ORPHANED_S = 3600.0
# Curves of chunks that led to nothing stay for a day, for somebody who wants to know why.
CURVES_KEPT_S = 86400.0
SERIES_FOLDERS = ("tensorboard", "wandb")  # of run/logs: the loggers that have a folder for each chunk
_TEMPORARY = re.compile(r"\.tmp-.+-\d+|\.repair-.+")


@dataclass
class CollectionReport:
    """What was deleted, or would be."""

    run: str
    dry_run: bool
    freed_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    files: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    trouble: list[str] = field(default_factory=list)

    def take(self, kind: str, path: Path) -> None:
        """Delete a file or folder, and count it. What has gone by itself counts nothing."""
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
    """Raises LeaderboardError: without the database nothing is known to be unneeded."""
    report = CollectionReport(run.name, dry_run)
    files = run.folder / "checkpoints"
    collectable = checkpoints.collectable(files, run.leaderboard.reader.references) if files.is_dir() else []
    for name in collectable:
        report.take("checkpoints" if not name.startswith(".") else "temporary files", files / name)
    for folder in (run.folder, files):
        for path in _orphans(_listed(folder), now):
            report.take("temporary files", path)
    folders = [path for path in _listed(run.folder / "jobs") if path.is_dir()]
    tokens = run.leaderboard.reader.tokens()
    for name in collecting.old_job_folders({p.name: now - _touched(p) for p in folders}, tokens, ORPHANED_S):
        report.take("job folders", run.folder / "jobs" / name)
    _collect_curves(run, report, now)
    for path in _dead_launches(run.folder, now):
        report.take("dead launches", path)
    return report


def _collect_curves(run: Run, report: CollectionReport, now: float) -> None:
    folders = [path for part in SERIES_FOLDERS for path in _listed(run.folder / "logs" / part) if path.is_dir()]
    ages_s = {path.name: now - _touched(path) for path in folders}
    old = set(collecting.old_series(ages_s, (), CURVES_KEPT_S))
    if not old:  # spares the reading of records
        return
    try:
        lines = _lines(run)
    except CheckpointError as error:
        report.trouble.append(f"curves are not judged: {error}")
        return
    old = set(collecting.old_series(ages_s, lines, CURVES_KEPT_S))
    for path in sorted(path for path in folders if path.name in old):
        report.take("curves", path)


def _lines(run: Run) -> set[int]:
    """The chunks of every checkpoint that stays, and of all that it comes from; what is made later comes from these.

    Raises CheckpointError for a record that can't be read."""
    files = run.leaderboard.reader.references()[0]
    while True:
        try:
            records = [checkpoints.read_record(run.folder / "checkpoints", file) for file in files]
        except CheckpointError:
            before, files = files, run.leaderboard.reader.references()[0]
            if files == before:
                raise
            continue  # the board has moved on, and perhaps what is missing left it
        ancestors = [record.get("ancestors") for record in records]
        lines = [*records, *(one for line in ancestors if isinstance(line, list) for one in line)]
        return {one["chunk"] for one in lines if isinstance(one, dict) and isinstance(one.get("chunk"), int)}


def _listed(folder: Path) -> list[Path]:
    """Empty where somebody has deleted the folder."""
    return list(folder.iterdir()) if folder.is_dir() else []


def _orphans(paths: Iterable[Path], now: float) -> list[Path]:
    """Those of claims are judged by their generation instead, however old they are."""
    found = [p for p in paths if _TEMPORARY.fullmatch(p.name) and collecting.generation_of(p.name) is None]
    return [p for p in found if now - _touched(p) > ORPHANED_S]


def _dead_launches(folder: Path, now: float) -> list[Path]:
    """Folders of launches that were killed before they could give them their name (`Run.launch`)."""
    name = re.compile(rf"\.{re.escape(folder.name)}-(\d+)")
    found = []
    for path in folder.parent.iterdir():
        match = name.fullmatch(path.name)
        if match is None or not path.is_dir() or psutil.pid_exists(int(match[1])):
            continue
        ours = all(inside.name in run_folder.PARTS or inside.name.startswith("orch.db") for inside in path.iterdir())
        if ours and now - _touched(path) > ORPHANED_S:
            found.append(path)
    return sorted(found)


def _touched(path: Path) -> float:
    """When something in it was written last, as a Unix time; now and later for what has just vanished."""
    times = []
    for each in (path, *(Path(folder, name) for folder, _, names in os.walk(path) for name in names)):
        try:
            times.append(each.lstat().st_mtime)
        except OSError:
            continue
    return max(times, default=math.inf)
