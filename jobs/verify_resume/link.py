"""One link of the check that resuming is exact. A link trains some steps, from a saved state or from the start, and
saves its state. It runs in its own process, which shares only files with the other links."""

from __future__ import annotations

import json
import math
import re
import sys
import traceback
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from jobs.data.feeds import Feed
from jobs.data.splits import Split
from jobs.errors import JobError
from jobs.imports import look_first_in
from jobs.job import Job
from jobs.training.examples import Opened
from jobs.training.opening import has_own_loop, load_job, set_up
from jobs.training.short import Short, ShortExamples, ShortOwnLoop, ShortSession
from jobs.verify_resume.exactness import digest
from orchestrator.messages import counted, described
from orchestrator.profile import Profile
from orchestrator.records import EpochResult, Finished, Interrupted, Work
from orchestrator.rules import claiming
from orchestrator.settings.settings import Settings

REFERENCE, RESUMED = "reference", "resumed"  # folders of states; a file is named after the steps trained so far
PLAN, RESULT, ENDS = "plan.json", "link.json", "ends.json"
NO_STOP = -1


@dataclass(frozen=True)
class Trial:
    """A short training of `chunks` chunks, each under the next profile of the cycle, with few batches per epoch."""

    settings: Settings
    import_paths: list[str]
    cores: int
    device: str  # "auto", "cpu" or "cuda"
    chunks: int
    epochs_per_chunk: int
    steps_per_epoch: int  # maximum; fewer if there is less data
    interruptions: int


TRIAL = TypeAdapter(Trial)  # converts to and from JSON, for the links' processes


class _Recording(Short):
    """A short trainer that records the training batches."""

    def __init__(self, trial: Trial, device: torch.device, job: Job | None = None) -> None:
        self.recorded = Recorded()
        super().__init__(job or load_job(trial.settings, device, trial.cores), trial.steps_per_epoch)

    def _examples(self, run_folder: Path | None) -> ShortExamples:
        return _RecordedExamples(self.job, self._steps, self.settings.max_batch_size, self.recorded)


class _RecordedExamples(ShortExamples):
    def __init__(self, job: Job, steps: int, batch_size: int, recorded: Recorded) -> None:
        super().__init__(job, steps, batch_size)
        self._recorded = recorded

    def _feed_of(self, split: Split, opened: Opened) -> Feed:
        feed = super()._feed_of(split, opened)
        return RecordedFeed(feed, self._recorded) if split == "train" else feed


class RecordingSession(_Recording, ShortSession):
    """Orch's loop with few batches per epoch, which are recorded."""


class RecordingOwnLoop(_Recording, ShortOwnLoop):
    """A loop of the job's own with few batches per epoch, which are recorded."""


Recording = RecordingSession | RecordingOwnLoop


class Recorded:
    """Digests of the training batches, by step."""

    def __init__(self) -> None:
        self.step = 0  # the one in training, counted from 1
        self._digests: dict[int, str] = {}

    def add(self, batch: Any) -> None:
        self._digests[self.step] = self._digests.get(self.step, "") + digest(batch)

    def between(self, start: int, stop: int) -> list[str]:
        return [self._digests.get(step, "") for step in range(start + 1, stop + 1)]


class RecordedFeed(Feed):
    """Wraps a feed and records the digest of each training batch."""

    def __init__(self, feed: Feed, recorded: Recorded) -> None:
        super().__init__(feed.batch_size, feed.count)
        self.like(feed)
        self.augmented = feed.augmented
        self._feed = feed
        self._recorded = recorded

    @property
    def batches(self) -> int:
        self._feed.like(self)
        return self._feed.batches

    def shuffled(self, seed: int, first_batch: int = 0, epoch: int = 0) -> Iterator[Any]:
        self._feed.like(self)
        for batch in self._feed.shuffled(seed, first_batch, epoch):
            self._recorded.add(batch)
            yield batch

    def in_order(self, first_batch: int = 0, every: int = 1) -> Iterator[Any]:
        self._feed.like(self)
        return self._feed.in_order(first_batch, every)

    def instead(self, other: Feed) -> Feed:
        return RecordedFeed(other, self._recorded)


def open_short(trial: Trial) -> Recording:
    """Open the job of a trial. Raises JobError if the job can't be opened or the device is not available."""
    device = set_up(trial.settings, trial.cores)
    if trial.device == "cuda" and device.type != "cuda":
        raise JobError(
            "--device cuda: torch sees no GPU here; run the check where the job will run, for example with "
            "`srun --gpus=1 orch verify-resume ...`, or use --device cpu"
        )
    job = load_job(trial.settings, device, trial.cores)
    return RecordingOwnLoop(trial, device, job) if has_own_loop(job) else RecordingSession(trial, device, job)


Ends = Sequence[Sequence[int]]  # for each chunk, the steps trained at the end of each epoch, counted over all chunks


def planned_ends(session: Recording, trial: Trial) -> Ends | None:
    """Return where the epochs end; None if only the job's own loop knows."""
    if isinstance(session, RecordingOwnLoop):
        return None
    ends, done = [], 0
    for chunk in range(trial.chunks):
        profile = _profile(trial, chunk)
        session.job.profile = profile
        feed = session.feed("train")
        feed.batch_size = profile.batch_size or trial.settings.max_batch_size
        steps = -(-feed.batches // profile.accumulate)
        ends.append([done + steps * epoch for epoch in range(1, trial.epochs_per_chunk + 1)])
        done = ends[-1][-1]
    return ends


def break_points(ends: Ends, wanted: int) -> list[int]:
    """Return the steps after which to interrupt, ascending. The first four are where interruptions matter most: in the
    middle of the first epoch, between two chunks, before the very last step, and between two epochs. Further
    interruptions fill the largest gaps."""
    total = ends[-1][-1]
    chosen: list[int] = []
    for point in ((ends[0][0] + 1) // 2, ends[0][-1], total - 1, ends[-1][0]):
        if 0 < point < total and point not in chosen:
            chosen.append(point)
    while len(chosen) < min(wanted, total - 1):
        marks = [0, *sorted(chosen), total]
        after, before = max(pairwise(marks), key=lambda gap: gap[1] - gap[0])
        chosen.append((after + before) // 2)
    return sorted(chosen[:wanted])


def train_link(
    session: Recording,
    trial: Trial,
    folder: Path,
    start: int,
    stop: int | None,
    snapshots: Collection[int] = (),
    ends: Ends | None = None,
) -> dict[str, Any]:
    """Train from step `start` to step `stop` (None: to the end), like a job of a chain.

    Reads the state `folder/START.pt` unless start is 0. Writes a state at the end of each chunk, at `stop`, and
    at each step in `snapshots`, without stopping there. A stop at the end of a chunk finishes the chunk;
    any other interrupts it. ends: where the epochs end; None: as planned, or not known in a loop of the job's own that
    starts at step 0. Returns the batches' digests by step, the ends, and metrics by step: at the end of an epoch, its
    metrics; at the end of a chunk, those of all its epochs. Raises JobError if the loss becomes infinite or NaN.
    """
    ends = ends or planned_ends(session, trial)
    done = start
    metrics: dict[str, list[dict[str, float]]] = {}
    found: list[list[int]] = []

    def should_stop() -> bool:
        nonlocal done
        if done == stop:
            return True
        if done in snapshots and done not in chunk_ends:
            _save(session, folder / f"{done}.pt")
        done += 1
        session.recorded.step = done
        return False

    def on_epoch(result: EpochResult) -> None:
        metrics[str(done)] = [dict(result.metrics)]
        found[-1].append(done)

    chunk_ends = [0, *(epochs[-1] for epochs in ends or ())]
    first_chunk = sum(1 for end in chunk_ends[1:] if end <= start)
    for chunk in range(first_chunk, trial.chunks):
        first, profile = done if chunk > first_chunk else chunk_ends[chunk], _profile(trial, chunk)
        found.append([])
        work = Work(
            profile=profile,
            epochs=trial.epochs_per_chunk,
            seed=trial.settings.seed * 1_000_003 + 1,
            repeat=0,
            parent=folder / f"{first}.pt" if chunk else None,
            suspended=folder / f"{start}.pt" if start > first else None,
        )
        result = session.train(work, should_stop, on_epoch)
        if done == start and not isinstance(result, Interrupted):
            raise JobError(f"job {trial.settings.job}: its loop can't be interrupted: it has not called should_stop()")
        _save(session, folder / f"{done}.pt")
        if isinstance(result, Interrupted):
            break
        _refuse_divergence(result, done, profile)
        metrics[str(done)] = [dict(epoch.metrics) for epoch in result.results]
        if done == stop:
            break
    return {"batches": session.recorded.between(start, done), "metrics": metrics, "ends": ends or found}


def _refuse_divergence(result: Finished, steps: int, profile: Profile) -> None:
    if not math.isfinite(result.results[-1].metrics.get("train_loss", 0.0)):
        after = counted(steps, "step")
        raise JobError(
            f"the loss is infinite or NaN after {after} under the profile {profile.name!r}: there is nothing to "
            "compare. Give settings that train, for example with --set training_profiles.0.learning_rate=0.001"
        )


def _profile(trial: Trial, chunk: int) -> Profile:
    return claiming.profile_at(chunk, trial.settings.training_profiles)


def _save(session: Recording, path: Path) -> None:
    """Save the state to a file. Raises JobError if it can't be written."""
    try:
        with path.open("wb") as target:
            session.save(target)
    except (OSError, RuntimeError) as error:  # torch's writer may replace the system's error with its own
        reason = str(error).partition("\n")[0]
        raise JobError(
            f"the state can't be written to {path.parent}: {reason}. That folder needs room for a few checkpoints; "
            "set TMPDIR to use another folder"
        ) from error


# --- the process of a link


def write_plan(trial: Trial, root: Path) -> None:
    (root / PLAN).write_bytes(TRIAL.dump_json(trial))
    for name in (REFERENCE, RESUMED):
        (root / name).mkdir()


def run(trial: Trial, folder: Path, start: int, stop: int | None) -> dict[str, Any]:
    """Run one link of the trial. Raises any error of the job."""
    look_first_in(trial.import_paths)
    session = open_short(trial)
    reference = folder.name == REFERENCE
    kept = folder.parent / ENDS  # where the epochs of the reference ended
    ends = planned_ends(session, trial) if reference else json.loads(kept.read_text(encoding="utf-8"))
    breaks = break_points(ends, trial.interruptions) if ends and reference else []
    trained = train_link(session, trial, folder, start, stop, snapshots=breaks, ends=ends)
    if reference:
        kept.write_text(json.dumps(trained["ends"]), encoding="utf-8")
        breaks = breaks or break_points(trained["ends"], trial.interruptions)
    device = torch.cuda.get_device_name(session.device) if session.device.type == "cuda" else "cpu"
    planned = planned_ends(session, trial)
    return trained | {
        "steps_per_epoch": (planned or trained["ends"])[0][0],
        "own_loop": planned is None,  # then the reference has states only at the ends of chunks
        "breaks": breaks,
        "device": device,
        "threads": torch.get_num_threads(),
    }


def explained(job: str, error: BaseException) -> str | None:
    """Return a message for an error raised by orch, or by torch for an operation without a deterministic
    implementation; None for any other error."""
    if isinstance(error, JobError):
        return str(error)
    text = str(error)
    named = re.match(r"(.+?) does not have a deterministic implementation", text)
    operation = named[1] if named else "a matrix product of cuBLAS" if "CUBLAS_WORKSPACE_CONFIG" in text else None
    if operation is None:
        return None
    return (
        f"job {job}: {operation} has no deterministic implementation on this device, and the settings say "
        f'"deterministic": true. Use another operation in the model, loss or metrics, or set '
        f'"deterministic": false (--set deterministic=false); resuming may then be inexact'
    )


def main(root: Path, name: str, start: int, stop: int) -> int:
    """Run a link and write its result, or {"error": message}, to root/link.json. Returns the exit code."""
    trial = TRIAL.validate_json((root / PLAN).read_bytes())
    result: dict[str, Any]
    try:
        result = run(trial, root / name, start, None if stop == NO_STOP else stop)
    except BaseException as error:  # anything the user's job raises, also by sys.exit()
        message = explained(trial.settings.job, error)
        if message is None:  # the traceback shows where in the job's code the error occurred
            traceback.print_exc()
            message = f"job {trial.settings.job}: {described(error)}"
        result = {"error": message}
    (root / RESULT).write_text(json.dumps(result), encoding="utf-8")
    return int("error" in result)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
