"""The names in a run's folder, and how a run is found by name or path below --runs-dir."""

from __future__ import annotations

import os
from pathlib import Path

from orchestrator.errors import RunError

SETTINGS_NAME = "settings.json"
DATABASE_NAME = "orch.db"
LOCK_SUFFIX, LOCK_RECORD_SUFFIX = ".lock", ".lock.json"  # after the database's name
CHECKPOINTS, JOBS, LOGS = "checkpoints", "jobs", "logs"  # folders
FOLDERS = (CHECKPOINTS, JOBS, LOGS)
PARTS = (SETTINGS_NAME, DATABASE_NAME, DATABASE_NAME + LOCK_RECORD_SUFFIX, *FOLDERS)


def nearest_folder(path: Path) -> Path:
    """The path itself, or the nearest existing folder above it; absolute."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def all_runs(runs_dir: Path) -> list[Path]:
    """The folders of runs, newest first. Raises RunError where runs_dir can't be listed."""
    try:
        runs = [p for p in runs_dir.iterdir() if not p.name.startswith(".") and is_run(p)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:  # a name that is too long, or no right to list the folder
        raise RunError(f"--runs-dir {str(runs_dir)[:100]}: {error.strerror or error}") from error
    return sorted(runs, key=lambda p: (p / LOGS).stat().st_ctime_ns if (p / LOGS).exists() else 0, reverse=True)


def is_run(folder: Path) -> bool:
    return os.path.exists(folder / SETTINGS_NAME) or os.path.exists(folder / DATABASE_NAME)


def find_run(run: str | None, runs_dir: Path) -> Path:
    """A run by name or path; None: the newest. Raises RunError, which names the runs that exist."""
    known = all_runs(runs_dir)
    if run is None:
        if not known:
            raise RunError(f"there is no run in {runs_dir}; `orch launch settings/digits.json` makes one")
        return known[0]
    for folder in (runs_dir / run, Path(run)):
        if is_run(folder):
            return folder
    if os.path.exists(runs_dir / run / CHECKPOINTS):
        raise RunError(without_its_files(runs_dir / run))
    names = ", ".join(p.name for p in known[:10]) or "none"
    raise RunError(f"there is no run {run[:100]!r} in {runs_dir}; there are: {names}")


def without_its_files(folder: Path) -> str:
    """The message for a folder with neither settings nor a database."""
    message = f"{folder} is not a run: it has neither {SETTINGS_NAME} nor {DATABASE_NAME}"
    if not any((folder / CHECKPOINTS).glob("*.pt")):
        return f"{message}. Choose another name, or move the folder away"
    return (
        f"{message}, but it has checkpoints. To get the run back, copy its settings file there as {SETTINGS_NAME}, "
        f'with the changes made by --set and "name": "{folder.name}", and run `orch repair {folder.name}`'
    )
