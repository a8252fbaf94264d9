"""One link of a check that resume is exact: some steps of a short training, from a file or from the start, to a file.
It runs as a process of its own, which shares only that file with the link before it."""

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
from orchestrator.messages import counted
from orchestrator.records import EpochResult, Interrupted, Work
from orchestrator.rules import claiming
from orchestrator.settings.settings import Settings

REFERENCE, RESUMED = "reference", "resumed"  # folders of states; each file is named after the steps before it
PLAN, RESULT = "plan.json", "link.json"
NO_STOP = -1


@dataclass(frozen=True)
class Trial:
    """A short training: `chunks` chunks, each under the next profile of the cycle, with few batches an epoch."""

    settings: Settings
    import_paths: list[str]
    cores: int
    device: str  # "auto", "cpu" or "cuda"
    chunks: int
    epochs_per_chunk: int
    steps_per_epoch: int  # at most; fewer if there is less data
    interruptions: int


TRIAL = TypeAdapter(Trial)  # as JSON for the processes of the links


class ShortSession(Session):
    """A Session whose epochs have few batches, and which records the content of each."""

    def __init__(self, trial: Trial, device: torch.device) -> None:
        super().__init__(load_job(trial.settings, device, trial.cores))
        if has_own_loop(self.job):
            raise JobError(
                f"job {trial.settings.job}: it has a loop of its own (train_chunk), whose steps orch can't count; "
                "verify-resume is for jobs that orch's loop trains"
            )
        self._steps = trial.steps_per_epoch
        self.batches: list[str] = []  # digests, in the order of training

    def feed(self, split: Split) -> Feed:
        if split == "train" and split not in self._feeds:
            self._feeds[split] = RecordedFeed(super().feed(split), self.batches)
        return super().feed(split)

    def _indices(self, split: Split, source: Dataset[Any]) -> list[int]:
        """Spread over all examples, because data sets are often sorted by class."""
        indices = super()._indices(split, source)
        size = self.settings.max_batch_size
        count = min(len(indices), self._steps * size - size // 4)  # the last batch is smaller, as in most real epochs
        return [indices[i * len(indices) // count] for i in range(count)]


class RecordedFeed(Feed):
    """Another feed. It appends the digest of each batch that is used to a list."""

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
    """Raises JobError if the job can't be opened, or there is no such device."""
    device = set_up(trial.settings, trial.cores)
    if trial.device == "cuda" and device.type != "cuda":
        raise JobError(
            "--device cuda: torch sees no GPU here; run the check where the job will run, for example with "
            "srun --gpus=1 in front of it, or use --device cpu"
        )
    return ShortSession(trial, device)


def break_points(steps_per_epoch: int, epochs_per_chunk: int, chunks: int, wanted: int) -> list[int]:
    """After how many steps to interrupt, ascending. The first interruptions are where they matter most: in the middle
    of the first epoch, between two chunks, before the very last step, and between two epochs. More of them are spread
    between those."""
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
    """Train from step `start` to step `stop` (None: to the end), as a job of a chain does.

    Reads the state `folder/START.pt` unless start is 0. Writes a state at each chunk's end, where it stops, and at
    each of the snapshots, where it does not stop. A stop at a chunk's end is a clean end; any other interrupts the
    chunk. Returns the batches' digests, and metrics by the number of steps before them: at an epoch's end those of the
    epoch, at a chunk's end those of all its epochs. Raises JobError if the loss becomes infinite or NaN.
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
    """Raises JobError if there is no room."""
    try:
        with path.open("wb") as target:
            session.save(target)
    except (OSError, RuntimeError) as error:  # torch's writer may hide the system's error behind one of its own
        reason = str(error).partition("\n")[0]
        raise JobError(
            f"the state can't be written to {path.parent}: {reason}. A few checkpoints need room there; TMPDIR names "
            "another folder"
        ) from error


# --- as a process


def write_plan(trial: Trial, root: Path) -> None:
    (root / PLAN).write_bytes(TRIAL.dump_json(trial))
    for name in (REFERENCE, RESUMED):
        (root / name).mkdir()


def run(trial: Trial, folder: Path, start: int, stop: int | None) -> dict[str, Any]:
    """One link of the trial. Raises whatever the job raises."""
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


def explained(job: str, error: Exception) -> str | None:
    """A message for an error that orch raised, or that names an operation without a deterministic implementation; None
    for any other error of the job's code."""
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
        f'"deterministic": false (--set deterministic=false), with which resume may be inexact'
    )


def main(root: Path, name: str, start: int, stop: int) -> int:
    """Write the result, or {"error": message}, to root/link.json. Returns the exit code."""
    trial = TRIAL.validate_json((root / PLAN).read_bytes())
    result: dict[str, Any]
    try:
        result = run(trial, root / name, start, None if stop == NO_STOP else stop)
    except Exception as error:  # whatever the user's job does
        message = explained(trial.settings.job, error)
        if message is None:  # the traceback says where in the job's code it happened
            traceback.print_exc()
            message = f"job {trial.settings.job}: {type(error).__name__}: {error}"
        result = {"error": message}
    (root / RESULT).write_text(json.dumps(result), encoding="utf-8")
    return int("error" in result)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
