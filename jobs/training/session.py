"""The training loop. It trains one chunk at a time, from a complete state to the next complete state."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from jobs.data import randomness
from jobs.data.batches import contents_digest, tensors
from jobs.data.feeds import Feed
from jobs.data.randomness import hash_seed, random_state, seed_all
from jobs.data.splits import Split
from jobs.data.streams import BatchStreamFeed
from jobs.errors import JobError
from jobs.job import PROFILE, Job
from jobs.loggers.observer import Held, Observer
from jobs.training import frozen_file, memory
from jobs.training.checked import checked_values
from jobs.training.evaluation import Evaluator, undefined
from jobs.training.examples import Examples
from jobs.training.frozen import FrozenParts
from jobs.training.learner import Learner, Predictor, described
from jobs.training.models import Models
from jobs.training.position import LossMean, fresh_cut, order_seed, resume_random_state
from jobs.training.precision import Speed
from jobs.training.ranks import ALONE, Alone
from jobs.training.states import FORMAT, Copies, EpochCopy, check_readable, plain, read, unwrapped, weights
from orchestrator.files.run_folder import CHECKPOINTS
from orchestrator.profile import Profile
from orchestrator.records import EpochResult, Finished, Interrupted, Kept, Work

AFTER_MODEL = 3  # hashed with a founder's seed: the random numbers of its training

log = logging.getLogger("orch")


class JobTrainer:
    """The parts of an orchestrator.worker.trainer.Trainer shared by orch's loop and a job's own loop."""

    def __init__(
        self, job: Job, group: Alone = ALONE, observer: Observer | None = None, run_folder: Path | None = None
    ) -> None:
        """run_folder: where the data's fingerprints and the frozen layers are kept; None: nowhere."""
        self.job = job
        self.group = group
        self.settings = job.context.settings
        self.device = job.context.device
        self.metric = self.settings.metric
        self.epochs = 0  # trained in the whole lineage
        self.examples = self._examples(run_folder)
        self._evaluator = Evaluator(job, self.metric, group)
        self._speed = Speed(self.settings, self.device)
        self._frozen = FrozenParts(job, self._speed)
        self._models = Models(job, run_folder)
        self._observer = observer or Observer()
        self._reports: Observer = self._observer  # where the current chunk's reports go
        self._cut: dict[str, Any] | None = None  # where the chunk was interrupted; None if it was not
        self._described: set[str] = set()  # the profiles that were logged
        job.show = self._show

    def _examples(self, run_folder: Path | None) -> Examples:
        return Examples(self.job, self.group, run_folder)

    def _show(self, kind: str, name: str, values: Any) -> None:
        self._reports.show(kind, name, checked_values(kind, name, values))

    @property
    def has_data(self) -> bool:
        """Whether the job defines data(); a loop of its own may be a simulation."""
        return type(self.job).data is not Job.data

    def feed(self, split: Split) -> Feed:
        """Return the batches of a split. The feed is created once; the data stay loaded."""
        return self.examples.feed(split)

    def _open_data(self, work: Work) -> None:
        """Use the chunk's profile, and open the data, before anything else may fail."""
        self.job.profile = work.profile
        train = self.feed("train")
        if work.profile.batch_size is not None and isinstance(train, BatchStreamFeed):
            raise JobError(f"profile {work.profile.name!r}: batch_size: the job's own loader makes the batches")
        train.batch_size = work.profile.batch_size or self.settings.max_batch_size
        self.feed(self.settings.select_on)

    def evaluate_file(self, checkpoint: Path, split: Split) -> dict[str, float]:
        """Return metrics of a checkpoint's model."""
        state = read(checkpoint)
        if "profile" in state:
            self.job.profile = PROFILE.validate_python(state["profile"])
        with randomness.random_state_kept():
            predictor = Predictor(self.job, self._speed, self.group, make=self._models.make)
        predictor.model.load_state_dict(unwrapped(weights(state), predictor.model.state_dict().keys()))
        return self._evaluate(predictor, split)

    def _evaluate(self, predictor: Predictor, split: Split) -> dict[str, float]:
        model, running = predictor.evaluated
        feed = self._batches(predictor, model, split)
        return self._evaluator.evaluate(model, running, feed, self._speed.autocast, predictor.arranged)

    def _batches(self, predictor: Predictor, model: nn.Module, split: Split) -> Feed:
        """Return the batches to call this model with from now on."""
        return self._frozen.feed(model, split, self.feed(split), predictor.arranged)

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
        state: dict[str, Any] = plain({**head, **self._state(), "rng": random_state(), "cut": self._cut})
        return state

    def _state(self) -> dict[str, Any]:
        raise NotImplementedError

    def save(self, target: IO[bytes]) -> None:
        """Write the complete training state to a file, sequentially (without seeking). Raises JobError, and writes
        nothing, if it could not be read back."""
        self._writer(self.state())(target)

    def _writer(self, state: dict[str, Any]) -> Callable[[IO[bytes]], None]:
        """Return a function that writes the state to a file. Raises JobError if it could not be read back."""
        check_readable(state, "the training state")
        return lambda target: torch.save(state, target)

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
        self, job: Job, group: Alone = ALONE, observer: Observer | None = None, run_folder: Path | None = None
    ) -> None:
        super().__init__(job, group, observer, run_folder)
        # Followers get the bytes of a checkpoint, and no folder: then every checkpoint contains the frozen layers.
        self._folder = run_folder / CHECKPOINTS if run_folder and group.count == 1 else None
        self._learner: Learner | None = None
        self._copies = Copies()
        self._last: dict[str, Any] | None = None  # the state of the last snapshot: not a copy, but the tensors in use
        self._epoch = EpochCopy()  # the chunk's state at the end of an epoch, in case a later one fails

    def train(
        self, work: Work, should_stop: Callable[[], bool], on_epoch: Callable[[EpochResult], None]
    ) -> Finished | Interrupted:
        """Train work.epochs epochs and validate them. should_stop is called before every step."""
        self._cut = None
        self._epoch.forget()
        learner, cut = self._begin(work)
        self._reports = Held() if work.tentative else self._observer
        self._reports.chunk(work)
        results = [EpochResult(**result) for result in cut["results"]]
        lost = False
        while len(results) < work.epochs and not lost:
            last = len(results) + 1 == work.epochs
            result = self._train_epoch(learner, cut, should_stop, last)
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
        score = math.nan if lost or self._unfit(learner, results[-1]) else results[-1].metrics[self.metric.name]
        return Finished(score, self.epochs, tuple(results), sum(r.seconds for r in results))

    def _unfit(self, learner: Learner, result: EpochResult) -> bool:
        """Return whether a model must not enter the board, whatever its score."""
        bad = [f"the metric {name!r} is NaN" for name in undefined(result.metrics)]
        bad += [] if learner.finite() else ["its weights are not all finite numbers"]
        if bad:
            log.warning("the model can't enter the board: %s", "; ".join(bad))
        return bool(bad)

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
        copied = [] if state is None else [Kept(0, lambda target: self._writer(state)(target))]
        return before_validation + copied

    def _writer(self, state: dict[str, Any]) -> Callable[[IO[bytes]], None]:
        assert self._learner is not None
        folder, frozen = self._folder, frozen_file.frozen_names(self._learner.model)
        if folder is None or not frozen:
            return super()._writer(state)
        check_readable(state, "the training state")
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
        self._open_data(work)
        profile = self.job.resolved(work.profile)
        steps = -(-self.feed("train").batches // profile.accumulate)
        state = self._load(work)
        model = self._reusable_model(profile) if work.in_memory else None
        with randomness.random_state_kept() if state else nullcontext():  # a founder draws its initial weights
            make = self._models.make if state else self._models.make_founder
            about = (self.job, profile, self._speed, self.group, steps, self.metric)
            self._learner = learner = Learner(*about, state, model, make)
        if profile.name not in self._described:
            self._described.add(profile.name)
            log.info("profile %s: %s", profile.name, learner.description)
        if state:
            return learner, resume_random_state(state, work)
        start = self._models.start()
        if start is not None and self.settings.start_from and self.settings.start_from.optimizer:
            learner.take_optimizer(start)
        seed_all(hash_seed(work.seed, AFTER_MODEL))  # whatever the job's model() did to the random state
        return learner, fresh_cut()

    def _reusable_model(self, profile: Profile) -> nn.Module | None:
        assert self._learner is not None, "a chunk in memory continues the last one"
        self._frozen.undo(self._learner.model)
        same = self._learner.profile.params == profile.params  # the job may make another model for other params
        return self._learner.model if same and self._learner.reusable else None

    def _train_epoch(
        self, learner: Learner, cut: dict[str, Any], should_stop: Callable[[], bool], last: bool
    ) -> EpochResult | None:
        """Train an epoch from position `cut` to its end. If interrupted, updates `cut` and returns None. last: of the
        chunk, so that the epoch must be validated."""
        started = time.monotonic()
        feed, group = self._batches(learner, learner.model, "train"), self.group
        if cut["seed"] is None:
            cut["seed"] = group.same(order_seed(self.epochs))
        mean = LossMean(cut["loss_sum"], cut["loss_count"], learner.scales_loss, self.device)
        learner.running.train()
        batches, total = feed.shuffled(cut["seed"], cut["step"], self.epochs), feed.batches
        while cut["step"] < total:
            if group.agree(should_stop):
                cut["loss_sum"], cut["loss_count"] = mean.totals()
                cut["seconds"] += time.monotonic() - started
                return None
            group.reseed(cut["seed"], cut["step"])
            rate = learner.learning_rate
            some = [next(batches) for _ in range(min(learner.profile.accumulate, total - cut["step"]))]
            loss, size = learner.step(some)
            mean.add(loss, size)
            cut["step"] += len(some)
            self._reports.step(learner.steps, loss, rate)
            self._evaluate_between(learner)
        next(batches, None)  # lets the loader finish the epoch
        totals = dict(zip(("loss_sum", "loss_count"), mean.totals(), strict=True))
        cut |= totals | {"seconds": cut["seconds"] + time.monotonic() - started}
        started = time.monotonic()
        metrics = {"train_loss": mean.mean()}
        if last or (self.epochs + 1) % self.settings.evaluate_every == 0:
            self._cut = cut | {"rng": random_state()}  # from here a chunk can go on whose validation fails
            metrics |= self._evaluate(learner, self.settings.select_on)
            self._cut = None
        learner.after_epoch(metrics)
        self.epochs += 1
        return EpochResult(self.epochs, cut["seconds"] + time.monotonic() - started, metrics)

    def _evaluate_between(self, learner: Learner) -> None:
        """Validate within an epoch, for the curves, if the settings say so."""
        every = self.settings.evaluate_every_steps
        if every is not None and learner.steps % every == 0:
            metrics = self._evaluate(learner, self.settings.select_on)
            self._batches(learner, learner.model, "train")
            self._reports.metrics(metrics)

    def evaluate(self, split: Split) -> dict[str, float]:
        """Return metrics of the model in training."""
        assert self._learner is not None
        return self._evaluate(self._learner, split)

    def check_restore(self) -> None:
        """Restore the state of the model in training into a new one, as the next job does. Raises JobError, and any
        error of the job's classes."""
        old = self._learner
        assert old is not None
        state = self.state()
        check_readable(state, "the training state")
        with randomness.random_state_kept():
            about = (self.job, old.profile, self._speed, self.group, 1, self.metric)
            restored = Learner(*about, state, None, self._models.make)
        expected, again, found = (self._evaluate(one, self.settings.select_on) for one in (old, old, restored))
        differs = [
            name for name in expected if not math.isclose(found[name], expected[name], rel_tol=1e-3, abs_tol=1e-5)
        ]
        if expected == again and differs:  # otherwise, the metrics depend on something else too
            raise JobError(
                f"a model that was restored from its checkpoint has another {differs[0]!r}: {found[differs[0]]:.6g} "
                f"instead of {expected[differs[0]]:.6g}. A checkpoint has only what model.state_dict() returns: no "
                "layers in a plain list (use nn.ModuleList), no buffers with persistent=False, nothing kept in the job"
            )

    def check_training(self) -> list[str]:
        """Return notes about the parameters of the model in training after a step. Raises JobError if no parameter is
        trained, or if an evaluation changes the model."""
        assert self._learner is not None
        idle = self._learner.untrained()
        trained = sum(parameter.requires_grad for parameter in self._learner.model.parameters())
        if len(idle) == trained:
            raise JobError(
                "no parameter of the model is trained: none has a gradient, or none is in the optimizer; compute the "
                "loss from the model's outputs, and pass its parameters to the optimizer"
            )
        before = contents_digest(tensors(self._learner.model.state_dict()))
        self._evaluate(self._learner, self.settings.select_on)
        if contents_digest(tensors(self._learner.model.state_dict())) != before:
            raise JobError(
                "an evaluation changes the model's weights or buffers; predict() and metrics() must leave the model as "
                "it is, and in eval mode"
            )
        return [f"not trained, without a gradient or not in the optimizer: {', '.join(idle[:5])}"] if idle else []

    def description(self, profile: Profile) -> str:
        """Return the optimizer and the schedule that a profile gets for the model in training. Raises JobError."""
        assert self._learner is not None
        return described(self.job, self._learner.model, self.job.resolved(profile))

    def _state(self) -> dict[str, Any]:
        assert self._learner is not None
        return self._learner.state()
