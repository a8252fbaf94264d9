"""The training loop: one chunk at a time, from a whole state to a whole state."""

from __future__ import annotations

import errno
import importlib
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from jobs import data
from jobs.data import Feed, hash_seed, make_feed, random_state, seed_all, set_random_state
from jobs.job import Job, JobContext, JobError, Split
from jobs.ranks import ALONE, Alone
from orchestrator.records import EpochResult, Finished, Interrupted, Profile, Work

FORMAT = 1


def find_class(spec: str) -> Any:
    """What "module:Class" names. Raises JobError if the module can't be imported or has no such class."""
    module_name, _, class_name = spec.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except (Exception, SystemExit) as error:  # whatever the user's module does on import
        raise JobError(f"job {spec}: {module_name} can't be imported: {type(error).__name__}: {error}") from error
    if not isinstance(found, type):
        raise JobError(f"job {spec}: {module_name} has no class {class_name}")
    return found


def load_job(settings: Mapping[str, Any], device: torch.device | None = None, cores: int = 1) -> Job:
    """The settings' job as an object. Raises JobError if it can't be imported or is none."""
    found = find_class(settings["job"])
    if not issubclass(found, Job):
        raise JobError(f"job {settings['job']}: its class is not derived from jobs.job.Job")
    job: Job = found(JobContext(settings, device or torch.device("cpu"), cores))
    return job


def open_session(settings: Mapping[str, Any], cores: int, group: Alone = ALONE) -> Session:
    """The settings' job, ready to train in this process. group: those that train together."""
    return Session(load_job(settings, set_up(settings, cores), cores), group)


def set_up(settings: Mapping[str, Any], cores: int) -> torch.device:
    """Set this process up for training: threads and determinism. Returns the device: a GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(max(1, cores))
    if settings["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses (torch's docs)
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    else:
        torch.backends.cudnn.benchmark = True
    return device


class Session:
    """The state of the model that is being trained, and the data, which stays from chunk to chunk."""

    def __init__(self, job: Job, group: Alone = ALONE) -> None:
        self.job = job
        self.group = group
        self.settings = job.context.settings
        self.device = job.context.device
        self.epochs = 0  # of the whole lineage
        self._model: nn.Module | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._cut: dict[str, Any] | None = None  # where an interrupted chunk stopped
        self._feeds: dict[str, Feed] = {}

    # --- one chunk

    def train(
        self, work: Work, should_stop: Callable[[], bool], on_epoch: Callable[[EpochResult], None]
    ) -> Finished | Interrupted:
        """Train work.epochs epochs, validating after each. should_stop is asked before every step.

        After Finished, `save` writes the checkpoint; after Interrupted, the state to go on from.
        """
        cut = self._begin(work)
        results = [EpochResult(r["number"], r["seconds"], r["metrics"]) for r in cut["results"]]
        for _ in range(len(results), work.epochs):
            result = self._train_epoch(cut, should_stop)
            if result is None:
                self._cut = cut | {"results": [_plain(r) for r in results], "rng": random_state()}
                return Interrupted(cut["step"])
            results.append(result)
            on_epoch(result)
            cut = _fresh_cut()
            if not math.isfinite(result.metrics["train_loss"]):
                break  # it can't recover, and can't enter the board
        score = results[-1].metrics[self.settings["metric"]["name"]]
        if not math.isfinite(results[-1].metrics["train_loss"]):
            score = math.nan
        return Finished(score, self.epochs, tuple(results), sum(r.seconds for r in results))

    def _begin(self, work: Work) -> dict[str, Any]:
        self._cut = None
        source = work.suspended or work.parent
        if source is None:
            seed_all(work.seed)
            self.epochs = 0
            self._model = self.group.adopt(self.job.model().to(self.device))
            self._optimizer = self.job.optimizer(self._model, work.profile)
            return _fresh_cut()
        state = read(self.group.fetch(source))
        self._restore(state, work.profile)
        if work.suspended:
            set_random_state(state["cut"]["rng"])
            return dict(state["cut"])
        set_random_state(state["rng"])
        if work.repeat:
            seed_all(hash_seed(int(torch.randint(2**62, ()).item()), work.repeat))
        return _fresh_cut()

    def _restore(self, state: dict[str, Any], profile: Profile) -> None:
        with data.random_state_kept():
            self._model = self.group.adopt(self.job.model().to(self.device))
            self._optimizer = self.job.optimizer(self._model, profile)
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        apply_profile(self._optimizer, profile)
        self.epochs = state["epochs"]

    def _train_epoch(self, cut: dict[str, Any], should_stop: Callable[[], bool]) -> EpochResult | None:
        """One epoch, or the rest of one; None if it was interrupted, with `cut` saying where."""
        assert self._model is not None
        assert self._optimizer is not None
        model, optimizer, job, group = self._model, self._optimizer, self.job, self.group
        feed = self.feed("train")
        if cut["seed"] is None:
            cut["seed"] = group.same(int(torch.randint(2**62, ()).item()))
        started = time.monotonic()
        loss_sum = torch.tensor(cut["loss_sum"], dtype=torch.float64, device=self.device)
        model.train()
        batches = feed.shuffled(cut["seed"], cut["step"])
        while cut["step"] < feed.batches:
            if group.agree(should_stop):
                cut["loss_sum"] = loss_sum.item()
                cut["seconds"] += time.monotonic() - started
                return None
            inputs, targets = next(batches)
            size = len(targets)
            inputs, targets = group.share(inputs, targets)
            group.reseed(cut["seed"], cut["step"])
            optimizer.zero_grad(set_to_none=True)
            loss = job.loss(model(inputs), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            loss = group.merge(loss.detach(), model)
            optimizer.step()
            loss_sum += loss * size
            cut["step"] += 1
        next(batches, None)  # lets the loader see the end of the epoch
        metrics = {"train_loss": loss_sum.item() / feed.count}
        metrics |= self.evaluate("validation" if self.settings["select_on"] == "validation" else "test")
        self.epochs += 1
        return EpochResult(self.epochs, cut["seconds"] + time.monotonic() - started, metrics)

    # --- evaluation

    def evaluate(self, split: Split) -> dict[str, float]:
        """The job's metrics over a split, means over its examples. Raises JobError if the settings' metric
        is not among them."""
        assert self._model is not None
        feed = self.feed(split)
        sums: dict[str, Tensor] = {}
        self._model.eval()
        self.group.align(self._model)
        with torch.inference_mode():
            for inputs, targets in feed.in_order(self.group.rank, self.group.count):
                for name, value in self.job.metrics(self._model(inputs), targets).items():
                    sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64, device=self.device)) + value * len(
                        targets
                    )
        totals = self.group.total({name: value.item() for name, value in sums.items()})
        wanted = self.settings["metric"]["name"]
        if wanted not in totals:
            raise JobError(f"metric.name: {wanted!r} is not among the metrics of the job: {', '.join(sorted(totals))}")
        return {name: value / feed.count for name, value in totals.items()}

    def evaluate_file(self, checkpoint: Path, split: Split) -> dict[str, float]:
        """Metrics of a checkpoint's model."""
        state = read(checkpoint)
        with data.random_state_kept():
            self._model = self.job.model().to(self.device)
        self._model.load_state_dict(state["model"])
        return self.evaluate(split)

    def feed(self, split: Split) -> Feed:
        """The batches of a split; made once, the data stays."""
        if split not in self._feeds:
            # Not the training's random numbers: a process that goes on loads the data again. The same for each split,
            # so that one drawn for "train" is the one drawn for "validation".
            with data.random_state_kept():
                data.seed_cpu(self.settings["seed"])
                source: Dataset[Any] = self.job.data(split)
            size = self.settings["max_batch_size"]
            indices = self._indices(split, source)
            self._feeds[split] = make_feed(source, indices, size, self.device, self.job.context.cores)
        return self._feeds[split]

    def _indices(self, split: Split, source: Dataset[Any]) -> list[int]:
        """Which examples of what the job gives for this split are used."""
        if split == "test" or self.settings["select_on"] == "test":
            return list(range(len(source)))  # type: ignore[arg-type]
        parts = data.split(source, self.settings["validation_fraction"], self.settings["seed"])
        return parts[split == "validation"]

    # --- state

    def save(self, target: IO[bytes]) -> None:
        """The whole training state, to a file that is written from front to back."""
        torch.save(self.state(), target)

    def state(self) -> dict[str, Any]:
        assert self._model is not None
        assert self._optimizer is not None
        return {
            "format": FORMAT,
            "epochs": self.epochs,
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "rng": random_state(),
            "cut": self._cut,
        }


def read(path: Path | IO[bytes]) -> dict[str, Any]:
    """A checkpoint's state, its tensors on the CPU: from there each goes where it belongs, and some belong there
    (random states, the step counts of optimizers). Nothing in the file is executed.

    Raises JobError if it is no checkpoint of this format, OSError if it can't be opened.
    """
    name = path if isinstance(path, Path | str) else "what was received as a checkpoint"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # arbitrary bytes can make the unpickler raise almost anything
        truncated = isinstance(error, OSError) and error.errno == errno.EINVAL  # it seeks to before the start
        if isinstance(error, OSError | MemoryError) and not truncated:
            raise
        raise JobError(f"{name}: not a checkpoint of format {FORMAT}: {_why_unreadable(error)}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        named = isinstance(state, dict) and "format" in state
        found = f"it says {state['format']!r:.40}" if named else "it names no format"
        raise JobError(f"{name}: not a checkpoint of format {FORMAT}: {found}")
    return state


def _why_unreadable(error: Exception) -> str:
    code = re.search(r"Unsupported (?:global|class)\S* \S+( \S+)?", str(error))
    if code:
        return f"it holds more than tensors and plain values, and nothing of that is executed ({code[0]})"
    return f"it is damaged, or no file of torch.save's ({type(error).__name__})"


def apply_profile(optimizer: torch.optim.Optimizer, profile: Profile) -> None:
    """Set what the profile says in every parameter group; momentum buffers and the like stay."""
    for group in optimizer.param_groups:
        group["lr"] = profile.learning_rate
        if "momentum" in group:
            group["momentum"] = profile.momentum
        if "weight_decay" in group:
            group["weight_decay"] = profile.weight_decay


def export(checkpoint: Path, target: IO[bytes]) -> None:
    """Only the model's weights, on the CPU, as `model.load_state_dict(torch.load(file))` takes them."""
    torch.save(read(checkpoint)["model"], target)


def _fresh_cut() -> dict[str, Any]:
    return {"seed": None, "step": 0, "loss_sum": 0.0, "seconds": 0.0, "results": [], "rng": None}


def _plain(result: EpochResult) -> dict[str, Any]:
    return {"number": result.number, "seconds": result.seconds, "metrics": dict(result.metrics)}
