"""The long form: a chunk is trained by the job's own loop, between a whole state and a whole state."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import torch

from jobs.data.batches import map_tensors
from jobs.data.feeds import Feed
from jobs.data.randomness import random_state, seed_all
from jobs.data.splits import Split
from jobs.errors import JobError
from jobs.job import ChunkContext, ChunkInterrupted, ChunkResult, Job
from jobs.loggers.observer import Observer, Unobserved
from jobs.training.ranks import ALONE, Alone
from jobs.training.session import Session, resume_random_state
from jobs.training.states import FORMAT, read, why_unreadable
from orchestrator.messages import counted
from orchestrator.records import EpochResult, Finished, Interrupted, Work


def checked_state(state: Any) -> Mapping[str, Any]:
    """Raises JobError for a state that could be saved, but not be read again: `torch.load` executes nothing."""
    if not isinstance(state, Mapping):
        raise JobError(f"train_chunk returned a state that is a {type(state).__name__}; allowed is a dict")
    shape, written = map_tensors(state, lambda tensor: tensor.detach().new_empty(0)), io.BytesIO()
    try:
        torch.save(dict(shape), written)
        written.seek(0)
        torch.load(written, weights_only=True)
    except Exception as error:  # pickle can raise whatever the objects in it raise
        raise JobError(
            f"train_chunk returned a state that can't be kept: {why_unreadable(error)}; allowed are dicts, lists, "
            "tensors and plain values, such as a state_dict()"
        ) from error
    return state


class OwnLoop:
    """A worker.Trainer for a job that overrides train_chunk."""

    def __init__(self, job: Job, group: Alone = ALONE, observer: Observer | None = None) -> None:
        self.job = job
        self.group = group
        self._observer = observer or Unobserved()
        self._metric: str = job.context.settings["metric"]["name"]
        self._epochs = 0  # of the whole lineage
        self._own: Mapping[str, Any] | None = None  # what the job's loop returned
        self._cut: dict[str, Any] | None = None

    def train(
        self, work: Work, should_stop: Callable[[], bool], on_epoch: Callable[[EpochResult], None]
    ) -> Finished | Interrupted:
        """Raises JobError if the loop does not report what it must, and whatever it raises."""
        state, before = self._begin(work)
        results = [EpochResult(r["number"], r["seconds"], r["metrics"]) for r in before["results"]]
        spent = before["seconds"]  # on an epoch that was cut
        started = time.monotonic()
        self._observer.chunk(work)

        def report(metrics: Mapping[str, float]) -> None:
            nonlocal spent, started
            now = time.monotonic()
            self._epochs += 1
            result = EpochResult(self._epochs, spent + now - started, self._checked(metrics))
            spent, started = 0.0, now
            results.append(result)
            self._observer.epoch(result)
            on_epoch(result)

        asked_to_stop = False

        def stops() -> bool:
            nonlocal asked_to_stop
            asked_to_stop = asked_to_stop or should_stop()
            return asked_to_stop

        found = self.job.train_chunk(self._context(work, state, work.epochs - len(results), stops, report))
        if not isinstance(found, ChunkResult | ChunkInterrupted):
            raise JobError(f"train_chunk returned {type(found).__name__}; allowed are ChunkResult and ChunkInterrupted")
        self._own, self._cut = checked_state(found.state), None
        if isinstance(found, ChunkInterrupted):
            if not asked_to_stop and self.group.rank == 0:
                raise JobError("train_chunk returned ChunkInterrupted, but context.should_stop() had not said so")
            plain = [{"number": r.number, "seconds": r.seconds, "metrics": dict(r.metrics)} for r in results]
            seconds = spent + time.monotonic() - started
            self._cut = {"results": plain, "seconds": seconds, "rng": random_state()}
            return Interrupted(found.steps)
        score = results[-1].metrics[self._metric] if results else math.nan
        if len(results) != work.epochs and math.isfinite(score):  # a loop may give up what is lost
            reported = f"{len(results)} of {counted(work.epochs, 'epoch')}"
            raise JobError(f"train_chunk reported {reported}; call context.report(metrics) after each")
        return Finished(score, self._epochs, tuple(results), sum(r.seconds for r in results))

    def _begin(self, work: Work) -> tuple[Mapping[str, Any] | None, dict[str, Any]]:
        """The job's own state to go on from, and what had been reported of this chunk."""
        source = work.suspended or work.parent
        if source is None:
            seed_all(work.seed)
            self._epochs = 0
            return None, _nothing_yet()
        state = read(self.group.fetch(source))
        if "own" not in state:
            raise JobError(f"{source}: it was not made by the job's own loop")
        self._epochs = state["epochs"]
        cut = resume_random_state(state, work)
        return state["own"], cut if work.suspended else _nothing_yet()

    def _context(
        self,
        work: Work,
        state: Mapping[str, Any] | None,
        epochs: int,
        should_stop: Callable[[], bool],
        report: Callable[[Mapping[str, float]], None],
    ) -> ChunkContext:
        return ChunkContext(
            profile=work.profile,
            epochs=epochs,
            seed=work.seed,
            repeat=work.repeat,
            device=self.job.context.device,
            settings=self.job.context.settings,
            state=state,
            resumed=work.suspended is not None,
            should_stop=lambda: self.group.agree(should_stop),
            report=report,
            feed=self.feed,
            rank=self.group.rank,
            ranks=self.group.count,
        )

    def _checked(self, metrics: Mapping[str, float]) -> dict[str, float]:
        if self._metric not in metrics:
            known = ", ".join(sorted(metrics)) or "none"
            raise JobError(f"metric.name: {self._metric!r} is not among the metrics that were reported: {known}")
        return {name: float(value) for name, value in metrics.items()}

    # --- state

    def save(self, target: IO[bytes]) -> None:
        """The whole training state, to a file that is written from front to back."""
        torch.save(self.state(), target)

    def state(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "epochs": self._epochs,
            "own": dict(self._own or {}),
            "rng": random_state(),
            "cut": self._cut,
        }

    def evaluate_file(self, checkpoint: Path, split: Split) -> dict[str, float]:
        """By the job's `model` and `data`, with the weights that the state has under "model"."""
        return self._inner.evaluate_file(checkpoint, split)

    def feed(self, split: Split) -> Feed:
        """The batches of a split of the job's `data`; made once, the data stays."""
        return self._inner.feed(split)

    @cached_property
    def _inner(self) -> Session:
        return Session(self.job, self.group)

    def judged(self, promoted: bool) -> None:
        """What became of the chunk that was finished last."""
        self._observer.judged(promoted)

    def close(self) -> None:
        """The process ends."""
        self._observer.close()


def _nothing_yet() -> dict[str, Any]:
    return {"results": [], "seconds": 0.0}
