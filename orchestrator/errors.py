"""Errors that a user can correct. `orch` prints their message without a traceback and exits with code 2."""

from __future__ import annotations

from enum import StrEnum


class Refusal(StrEnum):
    """Why a cluster refused jobs."""

    UNREACHABLE = "unreachable"  # the cluster does not answer; its jobs may still be running
    NO_ROOM = "no room"  # a submit limit is reached; a later submission may succeed
    TOO_MANY_NODES = "too many nodes"  # more nodes than the cluster allows for a job
    OTHER = "other"


class OrchError(Exception):
    """An error that the user can correct; the message says what is wrong and how to correct it."""


class SettingsError(OrchError):
    """The settings are not valid; the message has one line for each problem."""


class RunError(OrchError):
    """The run is missing, damaged, or in a state that does not allow the operation."""


class LeaderboardError(OrchError):
    """The leaderboard's database can't be used."""


class LockError(LeaderboardError):
    """The database can't be locked, or the lock gives no protection."""


class StaleClaimError(OrchError):
    """The claim, the job or the checkpoint has been replaced meanwhile. Nothing was written."""


class CheckpointError(OrchError):
    """A checkpoint or its record can't be read, written or used."""


class DamagedCheckpointError(CheckpointError):
    """The checkpoint's file is missing or its content has changed."""


class NoSpaceError(CheckpointError):
    """The run's disk budget has no room for a checkpoint, even after unneeded files were deleted."""


class SubmissionError(OrchError):
    """The cluster did not accept the jobs."""

    def __init__(self, message: str, *, refusal: Refusal = Refusal.OTHER) -> None:
        super().__init__(message)
        self.refusal = refusal


class JobSpecError(OrchError):
    """The job (the user's model and data) can't be imported, or lacks something it needs."""
