"""The names of the files in a run's folder; functions that find a run by its name or path."""

from __future__ import annotations

import os
from pathlib import Path

from orchestrator.errors import RunError

SETTINGS_NAME = "settings.json"
DATABASE_NAME = "orch.db"
DATA_NAME = "data.json"  # where the training data come from, as far as the job knows
FINGERPRINTS = "fingerprints"  # folder: what the data of each split were when the run began
LOCK_SUFFIX, LOCK_RECORD_SUFFIX = ".lock", ".lock.json"  # appended to the database's name
CHECKPOINTS, JOBS, LOGS = "checkpoints", "jobs", "logs"  # folders
FOLDERS = (CHECKPOINTS, JOBS, LOGS)
PARTS = (SETTINGS_NAME, DATABASE_NAME, DATABASE_NAME + LOCK_RECORD_SUFFIX, *FOLDERS)


def nearest_folder(path: Path) -> Path:
    """Return the path itself if it is a folder, else the nearest existing folder above it, as an absolute path."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def all_runs(runs_dir: Path) -> list[Path]:
    """Return the folders of all runs, newest first. Raises RunError if runs_dir can't be listed."""
    try:
        runs = [p for p in runs_dir.iterdir() if not p.name.startswith(".") and is_run(p)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:  # the name is too long, or the folder is not readable
        raise RunError(f"--runs-dir {str(runs_dir)[:100]}: {error.strerror or error}") from error
    return sorted(runs, key=lambda p: (p / LOGS).stat().st_ctime_ns if (p / LOGS).exists() else 0, reverse=True)


def is_run(folder: Path) -> bool:
    return os.path.exists(folder / SETTINGS_NAME) or os.path.exists(folder / DATABASE_NAME)


def find_run(run: str | None, runs_dir: Path) -> Path:
    """Find a run by name or path; None: the newest run. Raises RunError, whose message names the existing runs."""
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
    """Return the error message for a folder that has neither settings nor a database."""
    message = f"{folder} is not a run: it has neither {SETTINGS_NAME} nor {DATABASE_NAME}"
    if not any((folder / CHECKPOINTS).glob("*.pt")):
        return f"{message}. Choose another name, or move the folder away"
    return (
        f"{message}, but it has checkpoints. To recover the run, copy its settings file there as {SETTINGS_NAME}, "
        f'with the changes made by --set and "name": "{folder.name}", and run `orch repair {folder.name}`'
    )
