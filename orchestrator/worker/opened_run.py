"""Open an existing run, for a job or a command."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Self

from orchestrator.cluster.choose import open_queue
from orchestrator.cluster.foreign import ForeignQueue
from orchestrator.cluster.protocol import JobMain, JobQueue
from orchestrator.errors import RunError, SettingsError
from orchestrator.files import permissions
from orchestrator.files.run_folder import DATABASE_NAME, SETTINGS_NAME, without_its_files
from orchestrator.leaderboard.engine import CONNECT_FOR_S
from orchestrator.leaderboard.leaderboard import Leaderboard
from orchestrator.locking import choice
from orchestrator.settings import loading
from orchestrator.settings.settings import Settings


class OpenedRun:
    """An existing run: its settings, its leaderboard and its job queue."""

    def __init__(self, folder: Path, leaderboard: Leaderboard, job_main: JobMain) -> None:
        self.folder = folder
        self.leaderboard = leaderboard
        self.settings = leaderboard.settings
        self.version = leaderboard.version  # of the settings; each amendment increases it
        self.name = self.settings.name
        self._job_main = job_main
        self._queue: JobQueue | None = None

    @property
    def queue(self) -> JobQueue:
        """The run's queue; a ForeignQueue if another user owns the run."""
        if self._queue is None:
            queue = open_queue(self.settings, self.folder, self._job_main)
            owner = permissions.owner(self.folder)
            self._queue = queue if owner is None else ForeignQueue(queue.name, owner)
        return self._queue

    @cached_property
    def import_paths(self) -> list[str]:
        """The folders to search first for the job's module."""
        return list(self.leaderboard.run_state.row()["import_paths"])

    def refresh(self) -> None:
        """Reload the settings, in case the run was amended."""
        text, version = self.leaderboard.run_state.settings()
        self.use(loading.thaw(text), version)

    def use(self, settings: Settings, version: int) -> None:
        """Replace the settings in memory."""
        settings.came_from(str(self.folder / SETTINGS_NAME))
        self.settings, self.version, self._queue = settings, version, None

    @classmethod
    def opened(cls, folder: Path, job_main: JobMain, connect_for_s: float = CONNECT_FOR_S) -> Self:
        """Open the run in folder. job_main: the function that each job executes. connect_for_s: see Database.

        Raises RunError if folder does not contain a run or other users may write to the folder, LeaderboardError if the
        run's database can't be used.
        """
        permissions.check_permissions(folder)
        path = folder / SETTINGS_NAME
        place: tuple[str | None, str | None] = (None, None)
        try:
            written = loading.thaw(path.read_text(encoding="utf-8"))
            place = (written.database, written.database_schema)
        except FileNotFoundError as error:
            if not (folder / DATABASE_NAME).exists():  # the database also contains the settings
                raise RunError(without_its_files(folder)) from error
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"{folder} is not a run: {path.name}: {getattr(error, 'strerror', '') or error}") from error
        except SettingsError as error:
            advice = f"`orch repair {folder.absolute().name}` restores {path.name} from the database"
            raise RunError(f"{path}: {error}. {advice}") from error
        leaderboard = Leaderboard.open(folder, *place, connect_for_s)
        if leaderboard.database.file:
            permissions.check_permissions(folder, leaderboard.database.file)
        _refuse_two_locks(leaderboard)
        return cls(folder.absolute(), leaderboard, job_main)


def _refuse_two_locks(leaderboard: Leaderboard) -> None:
    """Raise RunError if the recorded kind of lock differs from the one that the run was launched with."""
    database, lock = leaderboard.database, leaderboard.settings.lock
    if database.file and database.lock_choice and lock not in ("auto", database.lock_choice.kind):
        record = choice.record_path(database.file)
        raise RunError(
            f"{record} says {database.lock_choice.kind!r}, but the run was launched with the lock {lock!r}: mixing "
            f'lock kinds gives no protection. End all processes of the run, then put "kind": "{lock}" into {record}'
        )
