"""The training loop. It trains one chunk at a time, from a complete state to the next complete state."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from jobs.data import randomness, splits
from jobs.data.feeds import Feed, make_feed
from jobs.data.randomness import hash_seed, random_state, seed_all, set_random_state
from jobs.data.splits import Split
from jobs.errors import JobError
from jobs.job import Job
from jobs.loggers.observer import Held, Observer
from jobs.training import frozen_file, memory
from jobs.training.checked import checked_data, checked_metrics
from jobs.training.frozen import FrozenParts
from jobs.training.learner import Learner, Predictor
from jobs.training.precision import Speed
from jobs.training.ranks import ALONE, Alone
from jobs.training.states import FORMAT, Copies, EpochCopy, read, weights
from orchestrator.records import EpochResult, Finished, Interrupted, Kept, Work


class JobTrainer:
    """The parts of an orchestrator.worker.trainer.Trainer shared by orch's loop and a job's own loop."""

    def __init__(self, job: Job, group: Alone = ALONE, observer: Observer | None = None) -> None:
        self.job = job
        self.group = group
        self.settings = job.context.settings
        self.device = job.context.device
        self.metric = self.settings.metric
        self.epochs = 0  # trained in the whole lineage
        self._observer = observer or Observer()
        self._reports: Observer = self._observer  # where the current chunk's reports go
        self._cut: dict[str, Any] | None = None  # where the chunk was interrupted; None if it was not

    def _load(self, work: Work) -> dict[str, Any] | None:
        """Return the state to continue from. For a founder, seed the random generators and return None."""
        self._cut = None
        source = work.suspended or work.parent
        if source is None:
            seed_all(work.seed)
            self.epochs = 0
            return None
        state = read(self.group.fetch(source))
        self.epochs = state["epochs"]
        return state

    def state(self) -> dict[str, Any]:
        """Return the complete training state. Its tensors are the ones in use, not copies."""
        head = {"format": FORMAT, "epochs": self.epochs}
        return {**head, **self._state(), "rng": random_state(), "cut": self._cut}

    def _state(self) -> dict[str, Any]:
        raise NotImplementedError

    def save(self, target: IO[bytes]) -> None:
        """Write the complete training state to a file, sequentially (without seeking)."""
        torch.save(self.state(), target)

    def snapshot(self) -> Callable[[IO[bytes]], None] | None:
        return None

    def kept(self) -> Sequence[Kept]:
        return ()

    def confirmed(self, work: Work) -> None:
        if isinstance(self._reports, Held):
            held, self._reports = self._reports, self._observer
            held.release(self._observer, work)

    def judged(self, promoted: bool) -> None:
        self._observer.judged(promoted)

    def close(self) -> None:
        self._observer.close()


class Session(JobTrainer):
    """Orch's training loop. Keeps the model in training, and keeps the data loaded between chunks."""

    def __init__(
        self, job: Job, group: Alone = ALONE, observer: Observer | None = None, folder: Path | None = None
    ) -> None:
        """folder: the checkpoints' folder, where frozen layers are kept once; None: in every checkpoint."""
        super().__init__(job, group, observer)
        self._folder = folder if group.count == 1 else None  # followers get the bytes of a checkpoint, and no folder
        self._speed = Speed(self.settings, self.device)
        self._frozen = FrozenParts(job, self._speed)
        self._learner: Learner | None = None
        self._copies = Copies()
        self._last: dict[str, Any] | None = None  # the state of the last snapshot: not a copy, but the tensors in use
        self._feeds: dict[str, Feed] = {}
        self._epoch = EpochCopy()  # the chunk's state at the end of an epoch, in case a later one fails

    def train(
        self, work: Work, should_stop: Callable[[], bool], on_epoch: Callable[[EpochResult], None]
    ) -> Finished | Interrupted:
        """Train work.epochs epochs and validate after each. should_stop is called before every step."""
        self._cut = None
        self._epoch.forget()
        learner, cut = self._begin(work)
        self._reports = Held() if work.tentative else self._observer
        self._reports.chunk(work)
        results = [EpochResult(**result) for result in cut["results"]]
        lost = False
        while len(results) < work.epochs and not lost:
            result = self._train_epoch(learner, cut, should_stop)
            if result is None:
                self._cut = cut | {"rng": random_state()}
                return Interrupted(cut["step"])
            results.append(result)
            self._reports.epoch(result)
            on_epoch(result)
            cut = fresh_cut() | {"results": [asdict(r) for r in results]}
            lost = not math.isfinite(result.metrics["train_loss"])  # training can't recover from a NaN loss
            if len(results) < work.epochs and not lost:
                self._copy_epoch(cut, result.seconds)
        score = math.nan if lost else results[-1].metrics[self.metric.name]  # NaN is never admitted to the board
        return Finished(score, self.epochs, tuple(results), sum(r.seconds for r in results))

    def snapshot(self) -> Callable[[IO[bytes]], None] | None:
        """Copy the state to host memory. None if that would take more than half of what is free, and for several ranks,
        whose followers would not hold the state."""
        if self.group.count > 1:
            return None
        state = self.state()
        if self._copies.needed_bytes(state) > memory.free_bytes() / 2:
            return None
        self._last = state
        return self._writer(self._copies.copy(state))

    def save(self, target: IO[bytes]) -> None:
        self._writer(self.state())(target)

    def _copy_epoch(self, cut: dict[str, Any], trained_s: float) -> None:
        """Copy the state at the end of an epoch, for `kept`. cut: where the chunk would go on."""
        if self.group.count == 1:
            self._epoch.copy(lambda: self.state() | {"cut": cut | {"rng": random_state()}}, trained_s)

    def kept(self) -> Sequence[Kept]:
        """If the validation has failed, the state before it is complete and still in use. Else, or if it can't be read
        any more (after an error of the GPU), there may be a copy from the end of an earlier epoch."""
        if self.group.count > 1:  # the followers would not continue from there
            return ()
        before_validation = [Kept(self._cut["step"], self.save)] if self._cut is not None else []
        state = self._epoch.state
        return [*before_validation, *([Kept(0, self._writer(state))] if state is not None else [])]

    def _writer(self, state: dict[str, Any]) -> Callable[[IO[bytes]], None]:
        """Return a function that writes the state to a file."""
        assert self._learner is not None
        folder, frozen = self._folder, frozen_file.frozen_names(self._learner.model)
        if folder is None or not frozen:
            return lambda target: torch.save(state, target)
        return lambda target: torch.save(frozen_file.leave_out(state, frozen, folder), target)

    def _load(self, work: Work) -> dict[str, Any] | None:
        last, self._last = self._last, None
        if not work.in_memory:
            return super()._load(work)
        assert last is not None, "a chunk starts in memory only right after a snapshot"
        self._cut, self.epochs = None, last["epochs"]
        return last

    def _begin(self, work: Work) -> tuple[Learner, dict[str, Any]]:
        """Return the learner, ready to start or continue the chunk, and the position in the current epoch."""
        batches = self.feed("train").batches
        state = self._load(work)
        model = self._reusable_model() if work.in_memory else None
        with randomness.random_state_kept() if state else nullcontext():  # a founder draws its initial weights
            about = (self.job, work.profile, self._speed, self.group, batches, self.metric)
            self._learner = learner = Learner(*about, state, model)
        return learner, resume_random_state(state, work) if state else fresh_cut()

    def _reusable_model(self) -> nn.Module | None:
        assert self._learner is not None, "a chunk in memory continues the last one"
        self._frozen.undo(self._learner.model)
        return self._learner.model if self._learner.reusable else None

    def _train_epoch(
        self, learner: Learner, cut: dict[str, Any], should_stop: Callable[[], bool]
    ) -> EpochResult | None:
        """Train an epoch from position `cut` to its end. If interrupted, updates `cut` and returns None."""
        started = time.monotonic()
        feed, group = self._batches(learner, learner.model, "train"), self.group
        if cut["seed"] is None:
            cut["seed"] = group.same(int(torch.randint(2**62, ()).item()))
        loss_sum = torch.tensor(cut["loss_sum"], dtype=torch.float64, device=self.device)
        learner.running.train()
        batches = feed.shuffled(cut["seed"], cut["step"], self.epochs)
        while cut["step"] < feed.batches:
            if group.agree(should_stop):
                cut["loss_sum"] = loss_sum.item()
                cut["seconds"] += time.monotonic() - started
                return None
            batch = next(batches)
            size = self.job.batch_size(batch)
            group.reseed(cut["seed"], cut["step"])
            rate = learner.learning_rate
            loss = learner.step(group.share(batch, size))
            loss_sum.add_(loss, alpha=size)
            cut["step"] += 1
            self._reports.step(learner.steps, loss, rate)
        next(batches, None)  # lets the loader finish the epoch
        cut |= {"loss_sum": loss_sum.item(), "seconds": cut["seconds"] + time.monotonic() - started}
        started = time.monotonic()
        metrics = {"train_loss": cut["loss_sum"] / feed.count}
        self._cut = cut | {"rng": random_state()}  # from here a chunk can go on whose validation fails
        metrics |= self._evaluate(learner, self.settings.select_on)
        self._cut = None
        learner.after_epoch(metrics)
        self.epochs += 1
        return EpochResult(self.epochs, cut["seconds"] + time.monotonic() - started, metrics)

    def evaluate(self, split: Split) -> dict[str, float]:
        """Return metrics of the model in training."""
        assert self._learner is not None
        return self._evaluate(self._learner, split)

    def _evaluate(self, predictor: Predictor, split: Split) -> dict[str, float]:
        """Return the job's metrics, each a mean over the split's examples. Raises JobError if the metric chosen in the
        settings is not among them."""
        model, running = predictor.evaluated
        feed, job = self._batches(predictor, model, split), self.job
        sums: dict[str, Tensor] = {}
        running.eval()
        self.group.align(model)
        with torch.inference_mode():
            for batch in feed.in_order(self.group.rank, self.group.count):
                with self._speed.autocast():
                    metrics = checked_metrics(job, job.evaluation_metrics(running, predictor.arranged(batch)))
                size = job.batch_size(batch)
                for name, value in metrics.items():
                    weighted = torch.as_tensor(value, dtype=torch.float64, device=self.device) * size
                    sums[name] = sums[name] + weighted if name in sums else weighted
        totals = self.group.total({name: value.item() for name, value in sums.items()})
        if self.metric.name not in totals:
            known = ", ".join(sorted(totals))
            raise JobError(f"metric.name: {self.metric.name!r} is not among the metrics of the job: {known}")
        return {name: value / feed.count for name, value in totals.items()}

    def evaluate_file(self, checkpoint: Path, split: Split) -> dict[str, float]:
        """Return metrics of a checkpoint's model."""
        state = read(checkpoint)
        with randomness.random_state_kept():
            predictor = Predictor(self.job, self._speed, self.group)
        predictor.model.load_state_dict(weights(state))
        return self._evaluate(predictor, split)

    def _batches(self, predictor: Predictor, model: nn.Module, split: Split) -> Feed:
        """Return the batches to call this model with from now on."""
        return self._frozen.feed(model, split, self.feed(split), predictor.arranged)

    def feed(self, split: Split) -> Feed:
        """Return the batches of a split. The feed is created once; the data stay loaded."""
        if split not in self._feeds:
            # Loading must not change the training's random state, because each process that resumes a chunk loads the
            # data again. All splits have the same seed, so that a job that generates its data returns the same examples
            # for "train" and "validation".
            with randomness.random_state_kept():
                randomness.seed_cpu(self.settings.seed)
                source = checked_data(self.job, self.job.data(split), split)
            indices = self._indices(split, source)
            size = self.settings.max_batch_size
            self._feeds[split] = make_feed(source, indices, size, self.device, self.job.context.cores)
        return self._feeds[split]

    def _indices(self, split: Split, source: Dataset[Any]) -> list[int]:
        """Return the indices of this split's examples in `source`, the data set that the job returned for it."""
        if split == "test" or self.settings.select_on == "test":
            return list(range(len(source)))  # type: ignore[arg-type]  # checked_data made sure that it has a length
        parts = splits.split(source, self.settings.validation_fraction, self.settings.seed)
        return parts[split == "validation"]

    def _state(self) -> dict[str, Any]:
        assert self._learner is not None
        return self._learner.state()


def resume_random_state(state: Mapping[str, Any], work: Work) -> dict[str, Any]:
    """Set the random state with which the chunk starts or continues. If work.repeat is not 0, a chunk that starts gets
    new random numbers instead of the parent's. Returns the position in the current epoch."""
    if work.suspended:
        set_random_state(state["cut"]["rng"])
        return dict(state["cut"])
    set_random_state(state["rng"])
    if work.repeat:
        seed_all(hash_seed(int(torch.randint(2**62, ()).item()), work.repeat))
    return fresh_cut()


def fresh_cut() -> dict[str, Any]:
    """Return the position of a chunk that has not started."""
    return {"seed": None, "step": 0, "loss_sum": 0.0, "seconds": 0.0, "results": [], "rng": None}
