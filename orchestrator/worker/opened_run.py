"""A run that exists, as a job and a command open it."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from orchestrator.cluster.choose import open_cluster
from orchestrator.cluster.foreign import ForeignCluster
from orchestrator.cluster.protocol import Cluster, JobMain
from orchestrator.errors import RunError, SettingsError
from orchestrator.files import permissions
from orchestrator.files.run_folder import DATABASE_NAME, SETTINGS_NAME, without_its_files
from orchestrator.leaderboard.engine import CONNECT_FOR_S
from orchestrator.leaderboard.leaderboard import Leaderboard
from orchestrator.locking import choice
from orchestrator.settings import loading
from orchestrator.settings.settings import Settings


class OpenedRun:
    """Its settings, its leaderboard and its cluster."""

    def __init__(
        self, folder: Path, settings: Settings, leaderboard: Leaderboard, version: int, job_main: JobMain
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.version = version  # of the settings: each amendment makes a new one
        self.leaderboard = leaderboard
        self.name = settings.name
        self._job_main = job_main
        self._cluster: Cluster | None = None

    @property
    def cluster(self) -> Cluster:
        if self._cluster is None:
            cluster = open_cluster(self.settings.executor or "local", self.settings, self.folder, self._job_main)
            owner = permissions.owner(self.folder)
            self._cluster = cluster if owner is None else ForeignCluster(cluster, owner)
        return self._cluster

    @classmethod
    def opened(cls, folder: Path, job_main: JobMain, connect_for_s: float = CONNECT_FOR_S) -> Self:
        """job_main: what each job of the run executes. connect_for_s: see Database.

        Raises RunError if there is no run in folder or strangers may write to it,
        LeaderboardError if its database can't be used."""
        permissions.check_permissions(folder)
        path = folder / SETTINGS_NAME
        place: tuple[str | None, str | None] = (None, None)
        try:
            written = loading.thaw(path.read_text(encoding="utf-8"))
            place = (written.database, written.database_schema)
        except FileNotFoundError as error:
            if not (folder / DATABASE_NAME).exists():  # which has the settings too
                raise RunError(without_its_files(folder)) from error
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"{folder} is not a run: {path.name}: {getattr(error, 'strerror', '') or error}") from error
        except SettingsError as error:
            advice = f"`orch repair {folder.absolute().name}` writes {path.name} again from the database"
            raise RunError(f"{path}: {error}. {advice}") from error
        leaderboard = Leaderboard.open(folder, *place, connect_for_s)
        if leaderboard.database.file:
            permissions.check_permissions(folder, leaderboard.database.file)
        _refuse_two_locks(leaderboard.settings, leaderboard)
        return cls(folder.absolute(), leaderboard.settings, leaderboard, leaderboard.version, job_main)


def _refuse_two_locks(settings: Settings, leaderboard: Leaderboard) -> None:
    """Raises RunError if this process took another lock than others of the run may take."""
    database = leaderboard.database
    if database.file and database.lock_choice and settings.lock not in ("auto", database.lock_choice.kind):
        record = choice.record_path(database.file)
        raise RunError(
            f"{record} says {database.lock_choice.kind!r}, and the run was launched with the lock {settings.lock!r}: "
            "two kinds at once are none. End all processes of the run, then put "
            f'"kind": "{settings.lock}" into {record}'
        )
