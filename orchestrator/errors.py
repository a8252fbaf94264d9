"""Errors that a user can act on. Their text is the whole message; the CLI prints it without a traceback."""

from __future__ import annotations


class OrchError(Exception):
    """Something is wrong that the user can mend; the message says what and how. `orch` exits with 2."""


class SettingsError(OrchError):
    """The settings are not valid; one line for each problem."""


class RunError(OrchError):
    """The run is missing, damaged, or in a state that does not allow what was asked."""


class LeaderboardError(OrchError):
    """The leaderboard's database can't be used."""


class LockError(LeaderboardError):
    """No lock can be taken around the database, or none that holds."""


class StaleClaimError(OrchError):
    """The claim was given to somebody else; nothing was written."""


class CheckpointError(OrchError):
    """A checkpoint is missing, incomplete or not what its checksum says."""


class DamagedCheckpointError(CheckpointError):
    """The file is missing, or its bytes are not those that were written."""


class NoSpaceError(CheckpointError):
    """The run's disk budget leaves no room for a checkpoint, even after a collection."""


class SubmissionError(OrchError):
    """The cluster did not take the jobs."""


class NoRoomError(SubmissionError):
    """A submit limit leaves no room for more jobs just now."""


class ClusterUnreachableError(SubmissionError):
    """The cluster does not answer. This never means that its jobs are gone."""


class JobSpecError(OrchError):
    """The job (the user's model and data) can't be imported, or lacks something it needs."""
