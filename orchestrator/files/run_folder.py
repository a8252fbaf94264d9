"""Where runs are: folders below --runs-dir, found by name or path."""

from __future__ import annotations

from pathlib import Path

from orchestrator.errors import RunError

SETTINGS_NAME = "settings.json"
DATABASE_NAME = "orch.db"
CHECKPOINTS, JOBS, LOGS = "checkpoints", "jobs", "logs"  # folders
FOLDERS = (CHECKPOINTS, JOBS, LOGS)
PARTS = (SETTINGS_NAME, DATABASE_NAME, f"{DATABASE_NAME}.lock.json", *FOLDERS)


def all_runs(runs_dir: Path) -> list[Path]:
    """The folders of runs, newest first."""
    try:
        found = [p for p in runs_dir.iterdir() if not p.name.startswith(".") and is_run(p)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:  # a name that is too long, a folder that we may not list
        raise RunError(f"--runs-dir {str(runs_dir)[:100]}: {error.strerror or error}") from error
    return sorted(found, key=lambda p: (p / "logs").stat().st_ctime_ns if (p / "logs").exists() else 0, reverse=True)


def is_run(folder: Path) -> bool:
    return _is_there(folder / SETTINGS_NAME) or _is_there(folder / DATABASE_NAME)


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a name, or not ours to look at
        return False


def find_run(run: str | None, runs_dir: Path) -> Path:
    """A run by name or path; None: the newest. Raises RunError naming those there are."""
    known = all_runs(runs_dir)
    if run is None:
        if not known:
            raise RunError(f"there is no run in {runs_dir}; `orch launch settings/digits.json` makes one")
        return known[0]
    for folder in (runs_dir / run, Path(run)):
        if is_run(folder):
            return folder
    if _is_there(runs_dir / run / "checkpoints"):
        raise RunError(without_its_files(runs_dir / run))
    names = ", ".join(p.name for p in known[:10]) or "none"
    raise RunError(f"there is no run {run[:100]!r} in {runs_dir}; there are: {names}")


def without_its_files(folder: Path) -> str:
    """What to say of a folder that has neither of them."""
    message = f"{folder} is not a run: it has neither {SETTINGS_NAME} nor {DATABASE_NAME}"
    if not any((folder / "checkpoints").glob("*.pt")):
        return f"{message}. Choose another name, or move the folder away"
    return (
        f"{message}, but checkpoints. To get the run back, copy its settings file there as {SETTINGS_NAME}, with what "
        f'--set changed and "name": "{folder.name}", and `orch repair {folder.name}`'
    )
