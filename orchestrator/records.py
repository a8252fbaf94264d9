"""Frozen values exchanged by the rules, the database, the cluster and the jobs.

Times are Unix seconds (UTC). A time of None means that the event has not happened or that its time is not known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, Literal

from orchestrator.profile import Metric, Profile

LockKind = Literal["flock", "soft"]
WantedLock = Literal["auto", "flock", "soft"]  # the setting "lock"


class RunState(StrEnum):
    """The state of a whole run. Only an active run starts chunks and successors."""

    ACTIVE = "active"
    PAUSED = "paused"
    DRAINING = "draining"
    CONVERGED = "converged"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"


class ChunkState(StrEnum):
    """The state of one claim. LIVE and SUSPENDED claims occupy their position in the cycle."""

    LIVE = "live"
    SUSPENDED = "suspended"
    PROMOTED = "promoted"
    DISCARDED = "discarded"
    EXPIRED = "expired"
    FAILED = "failed"


class ExpiredBy(StrEnum):
    """Why a claim was revoked or given back, which frees its position."""

    JOB_SILENT = "job_silent"  # the next link of its chain has started, but its job never reported its end
    JOB_GONE = "job_gone"  # the cluster reports that its job no longer exists
    JOB_ENDED = "job_ended"  # its job ended without recording a result
    LEASE_ENDED = "lease_ended"
    AMENDED = "amended"  # its position now has another profile
    GIVEN_BACK = "given_back"  # its worker could not continue; the chunk's error says why
    PARENT_DAMAGED = "parent_damaged"
    LOST_WITH_DATABASE = "lost_with_database"


class StopKind(StrEnum):
    """Why a chain was stopped although its run continues."""

    SURPLUS = "surplus"  # the run was amended to fewer workers
    FAILURES = "failures"  # too many consecutive failures


class JobState(StrEnum):
    """The state of one link of a chain, as stored in the database."""

    SUBMITTING = "submitting"
    QUEUED = "queued"
    RUNNING = "running"
    ENDED = "ended"
    LOST = "lost"
    CANCELLED = "cancelled"


class Evidence(StrEnum):
    """What a cluster reports about a job. UNKNOWN (no answer, or the job can't be seen from here) proves nothing."""

    QUEUED = "queued"
    RUNNING = "running"
    GONE = "gone"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Entry:
    """A checkpoint that occupies (or occupied) a slot of the leaderboard."""

    entry_id: int
    checkpoint_id: int
    score: float
    start_position: int  # the first position of the cycle that this entry consumes
    floor: int  # all lower positions are consumed, so their chunks need not be read
    worked_on: int  # number of chunks finished on this entry, promoted or not
    founder: bool = False  # trained from initial weights, by a chunk that consumed start_position
    in_progress: int = 0  # number of live or suspended chunks on this entry


@dataclass(frozen=True, slots=True)
class Claim:
    """A worker's lease on one position of the parent's entry. Later writes for this claim must carry its generation."""

    chunk_id: int
    generation: int
    worker_id: int
    position: int
    profile: Profile
    repeat: int  # how many earlier positions of the entry used this profile; 0: continue the parent's RNG state
    parent_file: str | None  # None: a founder, trained from initial weights
    parent_sha256: str | None
    parent_epochs: int
    bar: float | None  # the score to beat on a full board; None while a slot is free
    settings_version: int = 1
    suspended_file: str | None = None  # the state from which an interrupted chunk continues
    suspended_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class EpochResult:
    """The measurements of one epoch."""

    number: int  # counted from 1 over the whole lineage
    seconds: float
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Finished:
    """The result of a trained and validated chunk."""

    score: float
    epochs: int  # total over the whole lineage
    results: tuple[EpochResult, ...]
    train_seconds: float


@dataclass(frozen=True, slots=True)
class Candidate(Finished):
    """A finished chunk with its checkpoint, which the ratchet promotes or discards."""

    file: str | None = None  # None: no checkpoint was written, since the ratchet would discard it
    sha256: str | None = None
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class StopRules:
    """Conditions that end a run before its lifetime is over."""

    stale_chunks: int | None  # end after this number of consecutive chunks without a promotion
    score: float | None  # end once the best entry has reached this score
    epochs: int | None  # end after this number of trained epochs


@dataclass(frozen=True, slots=True)
class Progress:
    """The values that the stop rules check."""

    chunks_since_promotion: int
    best_score: float | None
    epochs: int


@dataclass(frozen=True, slots=True)
class ChainJob:
    """One link of a worker's chain."""

    job_id: int
    worker_id: int
    link: int
    token: str  # unlike cluster_id, never reused
    state: JobState
    cluster_id: str | None = None
    after_job_id: int | None = None
    host: str | None = None
    pid: int | None = None
    pid_created_at: float | None = None
    starts: int = 0  # how many times the job has started; more than 1 if the cluster requeued it
    submitted_at: float | None = None
    started_at: float | None = None
    ended_at: float | None = None
    outcome: str | None = None

    @property
    def open(self) -> bool:
        return self.state in (JobState.SUBMITTING, JobState.QUEUED, JobState.RUNNING)

    @property
    def base(self) -> str:
        """The name of the job's submission and of its folder. (With the local executor, the token names the folder.)"""
        return base_of(self.token)


def base_of(token: str) -> str:
    """Return the part of a token shared by all jobs of a submission: the token without its index."""
    return token.rpartition("-")[0]


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job that the cluster has accepted."""

    job_id: int
    cluster_id: str
    pid: int | None = None  # this and the fields below describe a process of the local executor
    pid_created_at: float | None = None
    host: str | None = None


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker: a chain of jobs."""

    worker_id: int
    device: str | None  # CUDA_VISIBLE_DEVICES on the local executor; None: leave the variable unchanged
    failures: int  # failed jobs and chunks since the worker's last finished chunk
    stopped: str | None  # why this chain ends although the run continues; None: the chain is not stopped


@dataclass(frozen=True, slots=True)
class Policy:
    """The settings that the board needs, and their version."""

    version: int
    metric: Metric
    num_models: int
    cycle: tuple[Profile, ...]
    stop: StopRules
    max_chunk_attempts: int  # failures at one position until the position counts as consumed


@dataclass(frozen=True, slots=True)
class Over:
    """A run that starts no more chunks: the run's state, and the reason for that state."""

    state: RunState
    reason: str


@dataclass(frozen=True, slots=True)
class Started:
    """A job that has started, with its worker."""

    job: ChainJob
    worker: Worker
    successor: ChainJob | None  # the link to submit now, if any


@dataclass(frozen=True, slots=True)
class Work:
    """A chunk as the training code receives it."""

    profile: Profile
    epochs: int
    seed: int  # for a founder's initial weights
    repeat: int
    parent: Path | None
    suspended: Path | None
    in_memory: bool = False  # the parent is the state of the trainer's last snapshot, so its file need not be read
    tentative: bool = False  # not claimed yet: report nothing to loggers before `Trainer.confirmed` is called
    # Only for logs and loggers; training must not depend on the fields below.
    chunk_id: int = 0
    generation: int = 0
    worker_id: int = 0
    position: int = 0
    parent_file: str | None = None  # None: a founder
    parent_epochs: int = 0


@dataclass(frozen=True, slots=True)
class Interrupted:
    """A chunk was interrupted between two steps. It can continue later if the caller saves the trainer's state now."""

    steps: int  # completed in the interrupted epoch


@dataclass(frozen=True, slots=True)
class Kept:
    """A complete state from which a failed chunk can go on, as if it had been interrupted there."""

    steps: int  # completed in the epoch that goes on
    save: Callable[[IO[bytes]], None]  # writes the state to a file
