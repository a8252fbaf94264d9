"""Frozen values exchanged by the rules, the database, the cluster and the jobs.

Times are Unix seconds (UTC). A time of None means that the event has not happened or that its time is not known.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import IO, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from orchestrator.messages import one_line, shown

# A torch class such as "SGD", or a class to import such as "package.module:Class".
CLASS = re.compile(r"[A-Za-z_]\w*|[A-Za-z_][\w.]*:[A-Za-z_]\w*")
OWN_KEYS = {"lr": "learning_rate", "momentum": "momentum", "weight_decay": "weight_decay"}

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


def _not_a_bool(value: Any) -> Any:
    """Reject true and false, which Python and pydantic would accept as 1 and 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("bool_for_number", "input should be a number")
    return value


Number = Annotated[float, BeforeValidator(_not_a_bool)]
Line = Annotated[str, AfterValidator(one_line), Field(min_length=1, max_length=100)]


Times = Annotated[int, BeforeValidator(_not_a_bool), Field(ge=1, le=10**9)]


@dataclass(frozen=True, slots=True)
class GradientClip:
    """A limit for the gradients of a step: of their norm over all parameters, or of each value."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    norm: Annotated[Number, Field(gt=0, allow_inf_nan=False)] | None = None
    value: Annotated[Number, Field(gt=0, allow_inf_nan=False)] | None = None

    def __post_init__(self) -> None:
        if (self.norm is None) == (self.value is None):
            raise ValueError('give one of "norm" and "value", such as {"norm": 1.0}')


def _as_norm(clip: Any) -> Any:
    """Convert a number, as users write it, to the limit of the norm."""
    return {"norm": clip} if isinstance(clip, int | float) and not isinstance(clip, bool) else clip


@dataclass(frozen=True, slots=True)
class Profile:
    """One item of the cycle: the hyperparameters of a chunk. The launch checks the values that only torch can check."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Line
    learning_rate: Annotated[Number, Field(gt=0, allow_inf_nan=False)]
    momentum: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[Number, Field(ge=0, allow_inf_nan=False)] = 0.0
    optimizer: str | None = None  # None: the job's default
    optimizer_options: dict[str, Any] = field(default_factory=dict, hash=False)
    schedule: dict[str, Any] | None = field(default=None, hash=False)  # None: a constant learning rate
    gradient_clip: Annotated[GradientClip | None, BeforeValidator(_as_norm)] = None
    accumulate: Times = 1  # batches whose gradients are averaged for one optimizer step
    batch_size: Times | None = None  # None: max_batch_size
    epochs: Times | None = None  # of a chunk; None: epochs_per_chunk
    params: dict[str, Any] = field(default_factory=dict, hash=False)  # the job's own, as Job.profile.params

    @field_validator("optimizer")
    @classmethod
    def _check_optimizer(cls, name: str | None) -> str | None:
        return None if name is None else checked_class(name, '"SGD", "Adam", "AdamW"')

    @field_validator("optimizer_options")
    @classmethod
    def _check_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        for option, key in OWN_KEYS.items():
            if option in options:
                raise ValueError(f"{option!r} is the profile's own {key!r}; give it there")
        return options

    @field_validator("schedule")
    @classmethod
    def _check_schedule(cls, schedule: dict[str, Any] | None) -> dict[str, Any] | None:
        if schedule is None:
            return None
        _check_warmup(schedule.get("warmup"))
        if "name" not in schedule:
            if set(schedule) == {"warmup"}:  # then the learning rate stays constant
                return schedule
            raise ValueError('"name" is missing; it says which schedule, e.g. {"name": "StepLR", "step_size": 5}')
        checked_class(schedule["name"], '"StepLR", "OneCycleLR", "PiecewiseLinear"')
        if schedule.get("every", "step") not in ("step", "epoch"):
            raise ValueError(f'every: {shown(repr(schedule["every"]))}; allowed: "step" and "epoch"')
        _check_epochs(schedule.get("epochs"))
        return schedule


def checked_class(name: Any, examples: str) -> str:
    """Return `name` if it is a torch class name or "package.module:Class"; otherwise raise ValueError."""
    if not isinstance(name, str) or len(name) > 300 or not CLASS.fullmatch(name):
        raise ValueError(
            f'{shown(repr(name))} is not the name of a class; allowed: {examples}, ... and "package.module:Class"'
        )
    return name


def _check_epochs(epochs: Any) -> None:
    """Raise ValueError unless `epochs` is None, a positive number or, for PiecewiseLinear, an increasing list."""
    numbers = epochs if isinstance(epochs, list) else [] if epochs is None else [0, epochs]
    plain = all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers)
    if not plain or any(a >= b for a, b in pairwise(numbers)):
        allowed = "a number above 0, or an increasing list of numbers (PiecewiseLinear)"
        raise ValueError(f"epochs: {shown(repr(epochs))}; allowed: {allowed}")


def _check_warmup(warmup: Any) -> None:
    """Raise ValueError unless `warmup` is None, a number of epochs above 0, or {"steps": a whole number above 0}."""
    if warmup is None:
        return
    steps = isinstance(warmup, dict) and set(warmup) == {"steps"}
    value = warmup["steps"] if steps else warmup
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value <= 0 or (steps and not isinstance(value, int)):
        raise ValueError(
            f'warmup: {shown(repr(warmup))}; allowed: a number of epochs above 0, such as 0.5, and {{"steps": 100}}'
        )


MODES: Mapping[str, Literal["max", "min"]] = {"accuracy": "max", "loss": "min"}


@dataclass(frozen=True, slots=True)
class Metric:
    """The metric that ranks the entries of the board. Raises ValueError if it has no mode and none is known for it."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Line = "accuracy"
    mode: Literal["max", "min"] = None  # type: ignore[assignment]  # filled in below; None is never left

    def __post_init__(self) -> None:
        if self.mode is None:
            if self.name not in MODES:
                raise ValueError(
                    f'the metric {shown(json.dumps(self.name))} has no "mode"; add "mode": "min" if a lower value is '
                    'better, "max" if a higher one is'
                )
            object.__setattr__(self, "mode", MODES[self.name])

    def key(self, score: float | None) -> float:
        """Convert a score so that higher is better; -inf for a score that is None or not finite."""
        if score is None or not math.isfinite(score):
            return -math.inf
        return score if self.mode == "max" else -score

    def better(self, score: float | None, than: float | None) -> bool:
        """Is the score strictly better? A tie is not an improvement."""
        return self.key(score) > self.key(than)


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
