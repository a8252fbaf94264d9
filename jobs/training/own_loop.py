"""Train a chunk with the job's own loop, which gets a complete state and returns a complete state."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from jobs.data.randomness import random_state, set_random_state
from jobs.errors import JobError
from jobs.job import ChunkContext, ChunkInterrupted, ChunkResult
from jobs.training.evaluation import undefined
from jobs.training.position import fresh_cut, order_seed, resume_random_state
from jobs.training.session import JobTrainer
from jobs.training.states import check_readable, plain, weights
from orchestrator.messages import counted
from orchestrator.records import EpochResult, Finished, Interrupted, Work


class OwnLoop(JobTrainer):
    """Trains a job that overrides train_chunk."""

    _own: Mapping[str, Any] | None = None  # the state returned by the job's loop
    asked = False  # whether the loop has called should_stop in the last chunk
    steps = 0  # optimizer steps of the whole lineage that the loop has reported

    def train(
        self, work: Work, should_stop: Callable[[], bool], on_epoch: Callable[[EpochResult], None]
    ) -> Finished | Interrupted:
        """Train one chunk. Raises JobError if the loop's reports or result are invalid, and any error of the loop."""
        self._open_data(work)
        state, cut = self._begin(work)
        chunk = _Chunk(self, work, cut, should_stop, on_epoch)
        self._observer.chunk(work)
        start = self._models.start() if state is None else None
        context = ChunkContext(
            profile=self.job.resolved(work.profile),
            epochs=work.epochs - len(chunk.results),
            seed=work.seed,
            repeat=work.repeat,
            device=self.device,
            settings=self.settings,
            state=state,
            resumed=work.suspended is not None,
            should_stop=chunk.should_stop,
            report=chunk.report,
            feed=self.feed,
            batches=chunk.batches,
            stopped=lambda: chunk.ended_early,
            evaluate=chunk.evaluate,
            step=chunk.step,
            start=None if start is None else weights(start),
            rank=self.group.rank,
            ranks=self.group.count,
        )
        outcome = self.job.train_chunk(context)
        self.asked = chunk.asked
        if not isinstance(outcome, ChunkResult | ChunkInterrupted):
            kind = type(outcome).__name__
            raise JobError(f"train_chunk returned {kind}; allowed: ChunkResult and ChunkInterrupted")
        if not isinstance(outcome.state, Mapping):
            kind = type(outcome.state).__name__
            raise JobError(f"train_chunk returned a state that is a {kind}; allowed: a dict")
        self._own = plain(outcome.state)
        check_readable(self._own, "the state returned by train_chunk")
        if isinstance(outcome, ChunkInterrupted):
            if not chunk.told_to_stop and self.group.rank == 0:
                raise JobError("train_chunk returned ChunkInterrupted, but context.should_stop() had not returned True")
            self._cut = chunk.cut()
            return Interrupted(outcome.steps or chunk.position)
        return self._finished(work, chunk.results)

    def _finished(self, work: Work, results: list[EpochResult]) -> Finished:
        score = results[-1].metrics[self.metric.name] if results else math.nan
        if not results or (
            len(results) != work.epochs and math.isfinite(score)
        ):  # a loop may stop early when its loss is NaN
            reported = f"{len(results)} of {counted(work.epochs, 'epoch')}"
            raise JobError(f"train_chunk reported {reported}; call context.report(metrics) after each epoch")
        model = (self._own or {}).get("model")
        finite = not isinstance(model, Mapping) or all(map(_finite, model.values()))
        if results and (undefined(results[-1].metrics) or not finite):
            score = math.nan
        return Finished(score, self.epochs, tuple(results), sum(r.seconds for r in results))

    def _open_data(self, work: Work) -> None:
        """Open the data if the job has any: a loop may be a simulation."""
        if self.has_data:
            super()._open_data(work)
        self.job.profile = work.profile

    def _begin(self, work: Work) -> tuple[Mapping[str, Any] | None, dict[str, Any]]:
        """Return the job's own state to continue from (None for a founder), and the chunk's results so far."""
        state = self._load(work)
        if state is None:
            self.steps = 0
            return None, fresh_cut()
        if "own" not in state:
            raise JobError(f"{work.suspended or work.parent}: it was not made by the job's own loop")
        self.steps = state.get("steps", 0)
        return state["own"], resume_random_state(state, work)

    def checked_report(self, metrics: Mapping[str, float]) -> dict[str, float]:
        if self.metric.name not in metrics:
            known = ", ".join(sorted(metrics)) or "none"
            raise JobError(f"metric.name: {self.metric.name!r} is not among the metrics that were reported: {known}")
        return {name: float(value) for name, value in metrics.items()}

    def evaluate_model(self, model: nn.Module) -> dict[str, float]:
        """Return the job's metrics of a model on the split that models are selected on."""
        feed = self.feed(self.settings.select_on)
        return self._evaluator.evaluate(model, model, feed, nullcontext, lambda batch: batch)

    def report_step(self, loss: Tensor, learning_rate: float) -> None:
        self.steps += 1
        self._observer.step(self.steps, loss.detach(), learning_rate)

    def report_epoch(self, result: EpochResult) -> None:
        self._observer.epoch(result)

    def _state(self) -> dict[str, Any]:
        steps = {"steps": self.steps} if self.steps else {}  # for the curves: epochs are counted instead
        return {**steps, "profile": asdict(self.job.profile), "own": dict(self._own or {})}


class _Chunk:
    """What a loop of the job's own gets from orch during one chunk."""

    def __init__(
        self,
        trainer: OwnLoop,
        work: Work,
        cut: Mapping[str, Any],
        should_stop: Callable[[], bool],
        on_epoch: Callable[[EpochResult], None],
    ) -> None:
        self._trainer = trainer
        self._asked = should_stop
        self._on_epoch = on_epoch
        self.results = [EpochResult(**result) for result in cut["results"]]
        self.asked = False
        self.told_to_stop = False
        self.ended_early = False  # `batches` has ended because of should_stop
        self._seed: int | None = cut["seed"]  # of the current epoch's order
        self.position: int = cut["step"]  # number of the current epoch's batches that were used
        self._random: dict[str, Any] | None = cut["rng"]  # random state of an interrupted epoch
        self._spent: float = cut["seconds"]  # seconds already spent on the interrupted epoch
        self._started = time.monotonic()

    def should_stop(self) -> bool:
        self.asked = True
        return self._trainer.group.agree(self._ask)

    def _ask(self) -> bool:
        self.told_to_stop = self.told_to_stop or self._asked()
        return self.told_to_stop

    def batches(self) -> Iterator[Any]:
        trainer = self._trainer
        if self._random is not None:  # the loop has made a model since, which drew random numbers
            set_random_state(self._random)
            self._random = None
        if self._seed is None:
            self._seed = trainer.group.same(order_seed(trainer.epochs))
        feed = trainer.feed("train")
        batches, total = feed.shuffled(self._seed, self.position, trainer.epochs), feed.batches
        while self.position < total:
            if self.should_stop():
                self.ended_early = True
                return
            yield next(batches)
            self.position += 1
        next(batches, None)  # lets the loader finish the epoch

    def step(self, loss: Tensor, learning_rate: float) -> None:
        self._trainer.report_step(loss, learning_rate)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return self._trainer.evaluate_model(model)

    def report(self, metrics: Mapping[str, float]) -> None:
        now = time.monotonic()
        trainer = self._trainer
        checked = trainer.checked_report(metrics)
        trainer.epochs += 1
        result = EpochResult(trainer.epochs, self._spent + now - self._started, checked)
        self._spent, self._started, self._seed, self._random, self.position = 0.0, now, None, None, 0
        self.results.append(result)
        trainer.report_epoch(result)
        self._on_epoch(result)

    def cut(self) -> dict[str, Any]:
        """Return where the chunk was interrupted."""
        return {
            "results": [asdict(result) for result in self.results],
            "seconds": self._spent + time.monotonic() - self._started,
            "rng": random_state(),
            "seed": self._seed,
            "step": self.position,
        }


def _finite(value: Any) -> bool:
    return not (isinstance(value, Tensor) and value.is_floating_point()) or bool(torch.isfinite(value).all())
