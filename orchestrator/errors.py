"""Errors that a user can act on. Their text is the whole message; the CLI prints it without a traceback.

OrchError                       what every caller may catch; `orch` prints it and exits with 2
├── SettingsError               the settings are not valid
├── RunError                    the run is missing, damaged, or in a state that does not allow the request
├── LeaderboardError            the database can't be used
│   └── LockError               no lock around the database can be taken, or none gives protection
├── StaleClaimError             another worker has the claim now
├── CheckpointError             a checkpoint can't be used or written
│   ├── DamagedCheckpointError  the file is missing or its bytes have changed
│   └── NoSpaceError            the run's disk budget has no room for it
├── SubmissionError             the cluster did not take the jobs; its `refusal` gives the reason
└── JobSpecError                the user's job class can't be imported or lacks something
"""

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
