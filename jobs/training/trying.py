"""Try a job on this machine before it is queued: load the data, train two small batches, evaluate, save and restore.
What fails here would fail in the queue, some hours later and several times."""

from __future__ import annotations

import itertools
import logging
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from jobs.data import fingerprint, randomness
from jobs.data.batches import size_bytes
from jobs.data.fingerprint import Fingerprint
from jobs.data.splits import Split
from jobs.data.streams import BatchStreamFeed
from jobs.errors import JobError
from jobs.job import Job, WatchedParams
from jobs.training import memory, models
from jobs.training.evaluation import undefined
from jobs.training.examples import Examples
from jobs.training.opening import has_own_loop, load_job
from jobs.training.short import ShortOwnLoop, ShortSession
from orchestrator.messages import counted
from orchestrator.profile import Profile
from orchestrator.records import Finished, Interrupted, Work
from orchestrator.settings.settings import Settings

STEPS, BATCH_SIZE = 2, 8  # per profile
OWN_STEPS = 3  # of a job's own loop, before it is told to stop
OTHERS_S = 5.0  # for profiles that differ from others only in numbers
QUICK_S = 2.0  # data that load within this time are loaded a second time, to compare
MODEL_COPIES = 8  # weights, gradients and optimizer state, twice
log = logging.getLogger("orch")


@dataclass(frozen=True)
class Tried:
    """What a trial found."""

    lines: list[str] = field(default_factory=list)  # for the user
    profiles: Mapping[str, str] = field(default_factory=dict)  # by name: the optimizer and the schedule
    fingerprints: Mapping[str, Fingerprint] = field(default_factory=dict)
    channels_last: Literal["auto", True, False] = "auto"  # the setting to launch with


NEVER_ASKED = (
    "train_chunk has not called context.should_stop(); call it before each step, or iterate over context.batches(): "
    "otherwise, a chunk can't be interrupted when the job's time is up"
)


class NotHereError(Exception):
    """This machine can't try the job. The message says why."""


def try_job(settings: Settings) -> Tried:
    """Try the job. Raises JobError if it fails, and any error of the job's code."""
    small = settings.model_copy(update={"compile": False, "precision": "fp32", "gpus_per_worker": 1})
    with _as_it_was():
        try:
            return _tried(small, settings.channels_last)
        except Exception as error:
            if (reason := _why_not_here(error)) is not None:
                return Tried([f"not tried here: {reason}"], channels_last=settings.channels_last)
            if settings.channels_last != "auto":
                raise
            try:
                tried = _tried(small.model_copy(update={"channels_last": False}), False)
            except Exception:
                raise error from None
            line = (
                f"the job fails with the memory layout channels_last ({_first_line(error)}), so this run sets "
                '"channels_last": false; with reshape() instead of view() it could use it'
            )
            return Tried([line, *tried.lines], tried.profiles, tried.fingerprints, False)


def _tried(settings: Settings, channels_last: Literal["auto", True, False]) -> Tried:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    job = load_job(settings, device)
    trainer = (ShortOwnLoop if has_own_loop(job) else ShortSession)(job, STEPS, BATCH_SIZE)
    if isinstance(trainer, ShortSession):
        _check_memory(settings)
    lines = [*_about_data(trainer)] if trainer.has_data else []
    cycle = {profile.name: profile for profile in settings.training_profiles}
    if isinstance(trainer, ShortOwnLoop):
        _try_own_loop(trainer, cycle)
        lines += [] if trainer.asked else [NEVER_ASKED]
        descriptions: dict[str, str] = {}
    else:
        lines += _try_profiles(trainer, cycle)
        descriptions = {name: trainer.description(profile) for name, profile in cycle.items()}
    if isinstance(job.params, WatchedParams) and job.params.unread:
        unread = ", ".join(map(repr, sorted(job.params.unread)))
        lines.append(f"job_params: nothing has read {unread}; is the name right?")
    return Tried(lines, descriptions, trainer.examples.fingerprints(), channels_last)


def _about_data(trainer: ShortSession | ShortOwnLoop) -> Iterator[str]:
    """Load the data. Yields lines that say how many examples and classes there are."""
    job, settings = trainer.job, trainer.settings
    started = time.monotonic()
    train = trainer.examples.open("train")
    other = settings.select_on
    validation = trainer.examples.open(other)
    if time.monotonic() - started < QUICK_S:
        _load_again(settings, job, other, {"train": train.fingerprint, other: validation.fingerprint})
    yield from trainer.examples.notes()
    if train.indices is None or validation.indices is None:
        yield f"data: streams of {len(train.data):,} (training) and {len(validation.data):,} ({other})"
        return
    line = f"data: {len(train.indices):,} training and {len(validation.indices):,} {other} examples"
    if other == "validation" and not trainer.examples.own_validation:
        if train.labels is None or not settings.stratify:
            known = "" if settings.stratify else ' ("stratify": false)'
            line += f", split without regard to classes{known}"
        else:
            line += f", split within each of {counted(len(set(train.labels.tolist())), 'class', 'classes')}"
    yield line
    if trainer.job.context.settings.start_from is None and not has_own_loop(job) and models.equal_for_two_seeds(job):
        yield models.EQUAL_FOUNDERS


def _load_again(settings: Settings, job: Job, other: Split, first: Mapping[Split, Fingerprint]) -> None:
    """Load the data with another object of the job, as another process does. Raises JobError if they differ."""
    again = Examples(load_job(settings, job.context.device))
    for split in ("train", other):
        found = fingerprint.changes(first[split], again.open(split).fingerprint)
        if found:
            raise JobError(
                f"{type(job).__name__}.data({split!r}) differs when it is loaded again: {'; '.join(found)}. It must be "
                "the same in each process: orch seeds the global generators of random, numpy and torch before the call"
            )


def _check_memory(settings: Settings) -> None:
    """Raise NotHereError if the memory that is free is probably too small. The model is made without memory for its
    weights (on torch's meta device); one whose code needs their values is not checked."""
    try:
        with torch.device("meta"), randomness.random_state_kept(), warnings.catch_warnings(action="ignore"):
            model = load_job(settings).model()
    except Exception:  # tried with memory, this may work, or be the error that the user is shown
        return
    need = MODEL_COPIES * size_bytes(list(model.parameters())) if isinstance(model, nn.Module) else 0
    free = memory.free_bytes()
    if need > free:
        raise NotHereError(f"training the model takes about {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")


def _try_profiles(session: ShortSession, cycle: Mapping[str, Profile]) -> Iterator[str]:
    """Train a short chunk under each kind of profile. Yields notes. Raises JobError, and any error of the job's."""
    for work in _works(session, cycle):
        profile = work.profile
        result = session.train(work, lambda: False, lambda _result: None)
        assert isinstance(result, Finished), "nothing interrupts it"
        metrics = result.results[-1].metrics
        if not math.isfinite(metrics["train_loss"]):
            raise JobError(
                f"the training loss is {metrics['train_loss']} in the first steps under the profile {profile.name!r}; "
                "check the loss, the inputs (NaN?) and the learning rate"
            )
        if names := undefined(metrics):
            yield f"{', '.join(names)} is NaN on a few examples; a model with a NaN metric can't enter the board"
        yield from session.check_training()
        session.check_restore()
    _check_batch_sizes(session)


def _check_batch_sizes(session: ShortSession) -> None:
    """Raise JobError if batch_size(batch), with which means are weighted, does not give the number of examples."""
    feed = session.feed(session.settings.select_on)
    if isinstance(feed, BatchStreamFeed):
        return
    found = sum(session.job.batch_size(batch) for batch in feed.in_order())
    if found != feed.count:
        raise JobError(
            f"{type(session.job).__name__}.batch_size(batch) gives {found} examples in all, not {feed.count}; "
            "the default is the length of the first tensor. Override batch_size(batch), or put the examples first"
        )


def _works(trainer: ShortSession | ShortOwnLoop, cycle: Mapping[str, Profile]) -> Iterator[Work]:
    """Yield a chunk of one epoch for each kind of profile, and for the others while there is time."""
    kinds: dict[tuple[str, ...], Profile] = {}
    for profile in cycle.values():
        kinds.setdefault(_kind(profile), profile)
    others = [profile for profile in cycle.values() if profile not in kinds.values()]
    started = time.monotonic()
    for number, profile in enumerate([*kinds.values(), *others]):
        if number >= len(kinds) and time.monotonic() - started > OTHERS_S:
            return  # they differ only in numbers from those that were tried
        yield Work(profile, epochs=1, seed=trainer.settings.seed, repeat=0, parent=None, suspended=None)


def _kind(profile: Profile) -> tuple[str, ...]:
    """Return what decides whether a profile can be trained, apart from its numbers."""
    schedule = profile.schedule or {}
    what = (profile.optimizer, sorted(profile.optimizer_options), schedule.get("name"), profile.params)
    return tuple(map(str, (*what, profile.gradient_clip, profile.accumulate > 1, profile.momentum > 0)))


def _try_own_loop(loop: ShortOwnLoop, cycle: Mapping[str, Profile]) -> None:
    """Train a few steps with the job's own loop under each kind of profile, and go on from the state it returns."""
    for work in _works(loop, cycle):
        result = loop.train(work, _stop_after(OWN_STEPS), lambda _result: None)
        with tempfile.TemporaryDirectory(prefix="orch-try-") as folder:
            state = Path(folder) / "state.pt"
            with state.open("wb") as target:
                loop.save(target)
            stopped = isinstance(result, Interrupted)
            again = replace(work, suspended=state) if stopped else replace(work, parent=state)
            loop.train(again, _stop_after(OWN_STEPS), lambda _result: None)


def _stop_after(steps: int) -> Callable[[], bool]:
    """Return a should_stop that is True from the call after this many on."""
    calls = itertools.count()
    return lambda: next(calls) >= steps


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Restore afterwards what a trial changes in this process."""
    deterministic, cudnn = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    level = log.level
    log.setLevel(logging.ERROR)  # its warnings are for runs
    with randomness.all_random_state_kept():
        try:
            yield
        finally:
            log.setLevel(level)
            torch.use_deterministic_algorithms(deterministic)
            torch.backends.cudnn.benchmark = cudnn


def _why_not_here(error: Exception) -> str | None:
    """Return why this machine can't try the job although another may; None if the job itself fails."""
    if isinstance(error, NotHereError):
        return str(error)
    if isinstance(error, MemoryError):
        return f"there is not enough memory ({_first_line(error)})"
    if "CUDA" in str(error) or "NVIDIA" in str(error):  # torch has no classes for these errors
        return f"the job needs a GPU ({_first_line(error)})"
    return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]
