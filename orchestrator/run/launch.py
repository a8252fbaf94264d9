"""Create a run and queue its workers."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from orchestrator.errors import RunError
from orchestrator.files import fingerprints, permissions
from orchestrator.files.atomic import publish, sync_folder
from orchestrator.files.run_folder import DATA_NAME, FOLDERS, SETTINGS_NAME, is_run, without_its_files
from orchestrator.leaderboard.engine import Database
from orchestrator.leaderboard.leaderboard import Leaderboard
from orchestrator.locking import choice
from orchestrator.run.run import Run
from orchestrator.settings import loading
from orchestrator.settings.settings import Settings, new_schema


def launch(
    settings: Settings,
    runs_dir: Path,
    import_paths: Sequence[str] = (),
    clock: Callable[[], float] = time.time,
    *,
    data_source: Mapping[str, Any] | None = None,
    data_fingerprints: Mapping[str, Any] | None = None,
) -> Run:
    """Create the run's folder and database, and queue its workers. If the jobs are refused, the folder and the database
    are deleted again. data_source: where the job's data come from, as JSON values; kept with the run for its reports.
    data_fingerprints: by name; each job compares its data with them. None: the first job makes them.

    Raises RunError if the folder exists or can't be created, LockError if no lock works on the file system,
    LeaderboardError if the database can't be created, SubmissionError if the jobs are refused.
    """
    folder = (runs_dir / settings.name).absolute()
    if folder.exists():
        raise RunError(
            f"{folder} exists already; launch again to continue it" if is_run(folder) else without_its_files(folder)
        )
    own_schema = settings.uses_server and settings.database_schema is None
    if own_schema:
        settings = settings.model_copy(update={"database_schema": new_schema(settings.name)})
    building = folder.with_name(f".{folder.name}-{os.getpid()}")
    now = clock()
    with ExitStack() as undo:
        undo.callback(shutil.rmtree, building, ignore_errors=True)
        try:
            permissions.make_folder(building, settings.group)
            with permissions.files_of(building):
                for part in FOLDERS:
                    (building / part).mkdir()
                settings = _with_lock(settings, building, undo)
                frozen = loading.freeze(settings)
                publish(building / SETTINGS_NAME, lambda file: file.write(f"{frozen}\n".encode()))
                if data_source:
                    text = json.dumps(data_source, indent=1)
                    publish(building / DATA_NAME, lambda file: file.write(f"{text}\n".encode()))
                for name, facts in (data_fingerprints or {}).items():
                    fingerprints.keep(building, name, facts)
                place = (building, settings.database, settings.database_schema)
                deadline = now + settings.total_lifetime
                Leaderboard.create(*place, settings=settings, import_paths=import_paths, now=now, deadline=deadline)
                undo.callback(Leaderboard.discard, *place, own_schema)
            sync_folder(building)
            building.rename(folder)  # now the run exists, and is complete
            sync_folder(runs_dir)
        except OSError as error:
            if folder.exists():
                raise RunError(f"another launch has just created {folder}; launch again to continue it") from error
            raise RunError(f"{folder} can't be created: {error.strerror or error}") from error
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        run = Run.open(folder)
        run.grow(now)
        undo.pop_all()
    return run


def _with_lock(settings: Settings, building: Path, undo: ExitStack) -> Settings:
    """Choose a lock that works on this file system, write its record beside the database, and add it to the settings.

    Raises LockError, OSError.
    """
    file = Database(settings.database, building).file
    if file is None or file.exists():  # None: a server, with its own locks. Leaderboard.create refuses an existing file
        return settings
    file.parent.mkdir(parents=True, exist_ok=True)
    chosen = choice.choose(file.parent, settings.several_nodes, settings.lock)
    choice.write_record(file, chosen)
    undo.callback(choice.record_path(file).unlink, missing_ok=True)
    return settings.model_copy(update={"lock": chosen.kind})
