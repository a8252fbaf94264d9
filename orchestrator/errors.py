"""Errors that a user can act on. `orch` prints their text without a traceback and exits with 2."""

from __future__ import annotations

from enum import StrEnum


class Refusal(StrEnum):
    """Why a cluster did not take jobs."""

    UNREACHABLE = "unreachable"  # it does not answer; this never means that its jobs are gone
    NO_ROOM = "no room"  # a submit limit; there may be room later
    TOO_MANY_NODES = "too many nodes"  # more nodes than a job may have here
    OTHER = "other"


class OrchError(Exception):
    """Something is wrong that the user can correct; the message says what and how."""


class SettingsError(OrchError):
    """The settings are not valid; one line for each problem."""


class RunError(OrchError):
    """The run is missing, damaged, or in a state that does not allow what was asked."""


class LeaderboardError(OrchError):
    """The leaderboard's database can't be used."""


class LockError(LeaderboardError):
    """No lock can be taken around the database, or none that gives protection."""


class StaleClaimError(OrchError):
    """Another worker has the claim now; nothing was written."""


class CheckpointError(OrchError):
    """A checkpoint is missing or incomplete, or does not match its checksum."""


class DamagedCheckpointError(CheckpointError):
    """The file is missing, or its bytes are not those that were written."""


class NoSpaceError(CheckpointError):
    """The run's disk budget leaves no room for a checkpoint, even after a collection."""


class SubmissionError(OrchError):
    """The cluster did not take the jobs."""

    def __init__(self, message: str, *, refusal: Refusal = Refusal.OTHER) -> None:
        super().__init__(message)
        self.refusal = refusal


class JobSpecError(OrchError):
    """The job (the user's model and data) can't be imported, or lacks something it needs."""
