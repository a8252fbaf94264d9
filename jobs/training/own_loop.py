"""Train a chunk with the job's own loop, which gets a complete state and returns a complete state."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from jobs.data.batches import map_tensors
from jobs.data.feeds import Feed
from jobs.data.randomness import random_state
from jobs.data.splits import Split
from jobs.errors import JobError
from jobs.job import ChunkContext, ChunkInterrupted, ChunkResult
from jobs.training.session import JobTrainer, Session, fresh_cut, resume_random_state
from jobs.training.states import why_unreadable
from orchestrator.messages import counted
from orchestrator.records import EpochResult, Finished, Interrupted, Work


def checked_state(state: Any) -> Mapping[str, Any]:
    """Return `state`. Raises JobError if orch could not load it after saving: orch loads only data, never code."""
    if not isinstance(state, Mapping):
        raise JobError(f"train_chunk returned a state that is a {type(state).__name__}; allowed: a dict")
    shape, written = map_tensors(state, lambda tensor: tensor.detach().new_empty(0)), io.BytesIO()
    try:
        torch.save(dict(shape), written)
        written.seek(0)
        torch.load(written, weights_only=True)
    except Exception as error:  # pickle can raise anything that the pickled objects raise
        raise JobError(
            f"train_chunk returned a state that can't be kept: {why_unreadable(error)}; allowed: dicts, lists, "
            "tensors and plain values, such as a state_dict()"
        ) from error
    return state


class OwnLoop(JobTrainer):
    """Trains a job that overrides train_chunk."""

    _own: Mapping[str, Any] | None = None  # the state returned by the job's loop

    def train(
        self, work: Work, should_stop: Callable[[], bool], on_epoch: Callable[[EpochResult], None]
    ) -> Finished | Interrupted:
        """Train one chunk. Raises JobError if the loop's reports or result are invalid, and any error of the loop."""
        state, cut = self._begin(work)
        results = [EpochResult(**result) for result in cut["results"]]
        spent = cut["seconds"]  # seconds already spent on the interrupted epoch
        started = time.monotonic()
        self._observer.chunk(work)

        def report(metrics: Mapping[str, float]) -> None:
            nonlocal spent, started
            now = time.monotonic()
            self.epochs += 1
            result = EpochResult(self.epochs, spent + now - started, self._checked(metrics))
            spent, started = 0.0, now
            results.append(result)
            self._observer.epoch(result)
            on_epoch(result)

        told_to_stop = False

        def stops() -> bool:
            nonlocal told_to_stop
            told_to_stop = told_to_stop or should_stop()
            return told_to_stop

        context = ChunkContext(
            profile=work.profile,
            epochs=work.epochs - len(results),
            seed=work.seed,
            repeat=work.repeat,
            device=self.device,
            settings=self.settings,
            state=state,
            resumed=work.suspended is not None,
            should_stop=lambda: self.group.agree(stops),
            report=report,
            feed=self.feed,
            rank=self.group.rank,
            ranks=self.group.count,
        )
        outcome = self.job.train_chunk(context)
        if not isinstance(outcome, ChunkResult | ChunkInterrupted):
            kind = type(outcome).__name__
            raise JobError(f"train_chunk returned {kind}; allowed: ChunkResult and ChunkInterrupted")
        self._own = checked_state(outcome.state)
        if isinstance(outcome, ChunkInterrupted):
            if not told_to_stop and self.group.rank == 0:
                raise JobError("train_chunk returned ChunkInterrupted, but context.should_stop() had not returned True")
            seconds = spent + time.monotonic() - started
            self._cut = {"results": [asdict(r) for r in results], "seconds": seconds, "rng": random_state()}
            return Interrupted(outcome.steps)
        score = results[-1].metrics[self.metric.name] if results else math.nan
        if len(results) != work.epochs and math.isfinite(score):  # a loop may stop early when its loss is NaN
            reported = f"{len(results)} of {counted(work.epochs, 'epoch')}"
            raise JobError(f"train_chunk reported {reported}; call context.report(metrics) after each epoch")
        return Finished(score, self.epochs, tuple(results), sum(r.seconds for r in results))

    def _begin(self, work: Work) -> tuple[Mapping[str, Any] | None, dict[str, Any]]:
        """Return the job's own state to continue from (None for a founder), and the chunk's results so far."""
        state = self._load(work)
        if state is None:
            return None, fresh_cut()
        if "own" not in state:
            raise JobError(f"{work.suspended or work.parent}: it was not made by the job's own loop")
        return state["own"], resume_random_state(state, work)

    def _checked(self, metrics: Mapping[str, float]) -> dict[str, float]:
        if self.metric.name not in metrics:
            known = ", ".join(sorted(metrics)) or "none"
            raise JobError(f"metric.name: {self.metric.name!r} is not among the metrics that were reported: {known}")
        return {name: float(value) for name, value in metrics.items()}

    def _state(self) -> dict[str, Any]:
        return {"own": dict(self._own or {})}

    def evaluate_file(self, checkpoint: Path, split: Split) -> dict[str, float]:
        """Compute metrics with the job's `model` and `data`, using the weights stored in the state under "model"."""
        return self._session.evaluate_file(checkpoint, split)

    def feed(self, split: Split) -> Feed:
        """Return the batches of a split of the job's `data`. The feed is created once; the data stay loaded."""
        return self._session.feed(split)

    @cached_property
    def _session(self) -> Session:
        return Session(self.job, self.group)
