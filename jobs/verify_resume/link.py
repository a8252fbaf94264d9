"""One link of the check that resuming is exact. A link trains some steps, from a saved state or from the start, and
saves its state. It runs in its own process, which shares only files with the other links."""

from __future__ import annotations

import json
import math
import re
import sys
import traceback
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch.utils.data import Dataset

from jobs.data.feeds import Feed
from jobs.data.splits import Split
from jobs.errors import JobError
from jobs.imports import look_first_in
from jobs.training.opening import has_own_loop, load_job, set_up
from jobs.training.session import Session
from jobs.verify_resume.exactness import digest
from orchestrator.messages import counted, described
from orchestrator.records import EpochResult, Interrupted, Work
from orchestrator.rules import claiming
from orchestrator.settings.settings import Settings

REFERENCE, RESUMED = "reference", "resumed"  # folders of states; a file is named after the steps trained so far
PLAN, RESULT = "plan.json", "link.json"
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


class ShortSession(Session):
    """A Session with few batches per epoch, which records a digest of every batch."""

    def __init__(self, trial: Trial, device: torch.device) -> None:
        super().__init__(load_job(trial.settings, device, trial.cores))
        if has_own_loop(self.job):
            raise JobError(
                f"job {trial.settings.job}: it has a loop of its own (train_chunk), whose steps orch can't count; "
                "verify-resume works only for jobs trained by orch's loop"
            )
        self._steps = trial.steps_per_epoch
        self.batches: list[str] = []  # digests, in the order of training

    def feed(self, split: Split) -> Feed:
        if split == "train" and split not in self._feeds:
            self._feeds[split] = RecordedFeed(super().feed(split), self.batches)
        return super().feed(split)

    def _indices(self, split: Split, source: Dataset[Any]) -> list[int]:
        """Return indices spread over all examples, because data sets are often sorted by class."""
        indices = super()._indices(split, source)
        size = self.settings.max_batch_size
        count = min(len(indices), self._steps * size - size // 4)  # the last batch is smaller, as in most real epochs
        return [indices[i * len(indices) // count] for i in range(count)]


class RecordedFeed(Feed):
    """Wraps a feed and appends the digest of each training batch to a list."""

    def __init__(self, feed: Feed, digests: list[str]) -> None:
        super().__init__(feed.batch_size, feed.count)
        self.augmented = feed.augmented
        self._feed = feed
        self._digests = digests

    def shuffled(self, seed: int, first_batch: int = 0, epoch: int = 0) -> Iterator[Any]:
        for batch in self._feed.shuffled(seed, first_batch, epoch):
            self._digests.append(digest(batch))
            yield batch

    def in_order(self, first_batch: int = 0, every: int = 1) -> Iterator[Any]:
        return self._feed.in_order(first_batch, every)

    def instead(self, other: Feed) -> Feed:
        return RecordedFeed(other, self._digests)


def open_short(trial: Trial) -> ShortSession:
    """Open the job of a trial. Raises JobError if the job can't be opened or the device is not available."""
    device = set_up(trial.settings, trial.cores)
    if trial.device == "cuda" and device.type != "cuda":
        raise JobError(
            "--device cuda: torch sees no GPU here; run the check where the job will run, for example with "
            "`srun --gpus=1 orch verify-resume ...`, or use --device cpu"
        )
    return ShortSession(trial, device)


def break_points(steps_per_epoch: int, epochs_per_chunk: int, chunks: int, wanted: int) -> list[int]:
    """Return the steps after which to interrupt, ascending. The first four are where interruptions matter most: in the
    middle of the first epoch, between two chunks, before the very last step, and between two epochs. Further
    interruptions fill the largest gaps."""
    per_chunk = steps_per_epoch * epochs_per_chunk
    total = per_chunk * chunks
    chosen: list[int] = []
    for point in ((steps_per_epoch + 1) // 2, per_chunk, total - 1, total - per_chunk + steps_per_epoch):
        if 0 < point < total and point not in chosen:
            chosen.append(point)
    while len(chosen) < min(wanted, total - 1):
        marks = [0, *sorted(chosen), total]
        after, before = max(pairwise(marks), key=lambda gap: gap[1] - gap[0])
        chosen.append((after + before) // 2)
    return sorted(chosen[:wanted])


def train_link(
    session: ShortSession, trial: Trial, folder: Path, start: int, stop: int | None, snapshots: Collection[int] = ()
) -> dict[str, Any]:
    """Train from step `start` to step `stop` (None: to the end), like a job of a chain.

    Reads the state `folder/START.pt` unless start is 0. Writes a state at the end of each chunk, at `stop`, and
    at each step in `snapshots`, without stopping there. A stop at the end of a chunk finishes the chunk;
    any other interrupts it. Returns the batches' digests, and metrics by step: at the end of an epoch, its metrics; at
    the end of a chunk, those of all its epochs. Raises JobError if the loss becomes infinite or NaN.
    """
    per_chunk = session.feed("train").batches * trial.epochs_per_chunk
    done = start
    metrics: dict[str, list[dict[str, float]]] = {}

    def should_stop() -> bool:
        nonlocal done
        if done == stop:
            return True
        if done in snapshots and done % per_chunk:
            _save(session, folder / f"{done}.pt")
        done += 1
        return False

    def on_epoch(result: EpochResult) -> None:
        metrics[str(done)] = [dict(result.metrics)]

    for chunk in range(start // per_chunk, trial.chunks):
        first, profile = chunk * per_chunk, claiming.profile_at(chunk, trial.settings.training_profiles)
        work = Work(
            profile=profile,
            epochs=trial.epochs_per_chunk,
            seed=trial.settings.seed * 1_000_003 + 1,
            repeat=0,
            parent=folder / f"{first}.pt" if chunk else None,
            suspended=folder / f"{start}.pt" if start > first else None,
        )
        result = session.train(work, should_stop, on_epoch)
        _save(session, folder / f"{done}.pt")
        if isinstance(result, Interrupted):
            break
        if not math.isfinite(result.results[-1].metrics["train_loss"]):
            after = counted(done, "step")
            raise JobError(
                f"the loss is infinite or NaN after {after} under the profile {profile.name!r}: there is nothing "
                "to compare. Give settings that train, for example with --set training_profiles.0.learning_rate=0.001"
            )
        metrics[str(done)] = [dict(epoch.metrics) for epoch in result.results]
        if done == stop:
            break
    return {"batches": list(session.batches), "metrics": metrics}


def _save(session: Session, path: Path) -> None:
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
    batches = session.feed("train").batches
    if not batches:
        raise JobError(f"job {trial.settings.job}: data('train') is empty; there is nothing to train on")
    breaks = break_points(batches, trial.epochs_per_chunk, trial.chunks, trial.interruptions)
    trained = train_link(session, trial, folder, start, stop, snapshots=breaks if folder.name == REFERENCE else ())
    device = torch.cuda.get_device_name(session.device) if session.device.type == "cuda" else "cpu"
    return trained | {
        "steps_per_epoch": batches, "breaks": breaks, "device": device, "threads": torch.get_num_threads(),
    }  # fmt: skip


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
