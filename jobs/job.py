"""The Job protocol: what orch asks of a user's own model and data.

The short form gives `model` and `data`; everything else has a default that suits classification:

    class Mine(Job):
        def model(self): return torch.nn.Linear(784, 10)
        def data(self, split): return my_test_set if split == "test" else my_training_set

and a settings file names it: "job": "my_module:Mine".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn
from torch.utils.data import Dataset

from jobs.data.batches import tensors
from jobs.data.feeds import Feed
from jobs.data.splits import Split
from jobs.errors import JobError
from jobs.optim import optimizers
from orchestrator.records import Profile
from orchestrator.settings.explain import explain
from orchestrator.settings.settings import Settings


@dataclass(frozen=True)
class Averaging:
    """An exponential moving average of the weights, floating-point buffers included: every `every_steps` steps,
    average = decay * average + (1 - decay) * weights."""

    decay: float  # from 0 to below 1
    every_steps: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1 or self.every_steps < 1:
            raise JobError(f"{self}: decay must be from 0 to below 1, every_steps 1 or more")


@dataclass(frozen=True)
class JobContext:
    """What a job is told about where it runs and what was asked for."""

    settings: Settings  # all of the run's, job_params included
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    cores: int = 1  # CPU cores that this worker may use


@dataclass(frozen=True)
class ChunkContext:
    """One chunk to train. orch restores the random state (Python, NumPy, torch, GPUs) before it and saves it after."""

    profile: Profile
    epochs: int  # to train now; after an interruption, those that were not reported yet
    seed: int  # of a founder's initial weights; torch is seeded with it already
    repeat: int  # how many children the parent has had under this profile; torch is seeded anew for each
    device: torch.device
    settings: Settings
    state: Mapping[str, Any] | None  # returned by the parent's chunk, or by this one before; None: a founder
    resumed: bool  # the state is from this very chunk, which was interrupted
    should_stop: Callable[[], bool]  # ask before each step; if True, return ChunkInterrupted within seconds
    report: Callable[[Mapping[str, float]], None]  # call after each epoch with its metrics, the settings' one included
    feed: Callable[[Split], Feed]  # batches of the job's data on the device: .shuffled(seed) to train, else .in_order()
    rank: int = 0  # of this process, where a worker has several (gpus_per_worker); torch.distributed is set up
    ranks: int = 1


@dataclass(frozen=True)
class ChunkResult:
    """All epochs of the chunk were trained and reported.

    state: everything needed to go on, in types that torch.load(weights_only=True) reads: tensors, numbers, strings,
    dicts, lists, tuples. `orch evaluate` and `orch export` look for the model's state_dict under "model".
    """

    state: Mapping[str, Any]


@dataclass(frozen=True)
class ChunkInterrupted:
    """The loop was told to stop. Another process goes on from this state."""

    state: Mapping[str, Any]
    steps: int = 0  # done in the epoch that was interrupted


class Job:
    """The base class of every job. One object serves a whole Slurm job, so keep in it what is slow to load."""

    METRICS: ClassVar[tuple[str, ...]] = ("accuracy", "loss")  # of `metrics`, unless it is overridden
    Params: ClassVar[type[BaseModel] | None] = None  # the model of job_params; None: any keys, as a plain dict
    default_optimizer: ClassVar[str] = "SGD"  # for profiles without one: a class of torch.optim, or "module:Class"

    def __init__(self, context: JobContext) -> None:
        """Raises JobError if job_params are not what Params allows."""
        self.context = context
        self.params: Any = context.settings.job_params
        if self.Params is not None:
            try:
                self.params = self.Params.model_validate(self.params)
            except ValidationError as error:
                raise JobError(explain("job_params", error, self.Params)) from error

    def model(self) -> nn.Module:
        """A new model with initial weights, on the CPU. torch is seeded for this founder before the call."""
        raise JobError(f"{type(self).__name__} has no model(); it must return a torch.nn.Module")

    def data(self, split: Split) -> Dataset[Any]:
        """A map-style data set of (input, target) pairs with a length. Called once per split in each process.

        "train" and "validation" must list the same examples in the same order: the run's seed decides which of them
        are trained on and which are kept for validation, stratified by class. "train" may augment; "validation" should
        not. Only `orch evaluate` reads "test".

        The global generators of Python, NumPy and torch are seeded before the call, by the run's seed alone and
        equally for each split.
        """
        raise JobError(f"{type(self).__name__} has no data(split); it must return a torch Dataset")

    def optimizer(self, model: nn.Module, profile: Profile) -> torch.optim.Optimizer:
        """A new optimizer with the profile's numbers; called at the start of each chunk.

        Under the parent's profile orch then restores the optimizer's whole state. Under another profile it keeps the
        per-parameter state (momentum and the like) if the class is the same, and the parameter groups keep the numbers
        that this method gave them.
        """
        return optimizers.make(profile, model.parameters(), self.default_optimizer)

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """The mean loss of a batch, a scalar."""
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs: Any, targets: Any) -> dict[str, Tensor]:
        """Means over a batch of evaluation, scalars by name; the settings' metric must be among them."""
        return {"accuracy": (outputs.argmax(dim=1) == targets).float().mean(), "loss": self.loss(outputs, targets)}

    def predict(self, model: nn.Module, inputs: Any) -> Any:
        """The outputs for a batch of evaluation; test-time augmentation goes here. The model is in eval mode."""
        return model(inputs)

    def training_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of a batch of training, a scalar. Override it if a batch is not (inputs, targets)."""
        inputs, targets = batch
        return self.loss(model(inputs), targets)

    def evaluation_metrics(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """`metrics` of a batch of evaluation. Override it if a batch is not (inputs, targets)."""
        inputs, targets = batch
        return self.metrics(self.predict(model, inputs), targets)

    def batch_size(self, batch: Any) -> int:
        """The number of examples in a batch: the length of its first tensor that is not a scalar."""
        size = next((len(tensor) for tensor in tensors(batch) if tensor.ndim), None)
        if size is None:
            raise JobError(f"{type(self).__name__}: no tensor is in a batch; override batch_size(batch)")
        return size

    def averaging(self) -> Averaging | None:
        """How to average the weights; the average is then evaluated and exported instead of the weights."""
        return None

    def frozen_part(self, model: nn.Module) -> nn.Module | None:
        """The first part of the model, if its output for an example never changes: no random layers, no trained
        parameters, no augmented input."""
        return None

    def train_chunk(self, context: ChunkContext) -> ChunkResult | ChunkInterrupted:
        """The long form: the job's own training loop. Overriding it replaces everything above but `model` and `data`,
        which `orch evaluate` and `orch export` use; see docs/your-own-job.md."""
        raise JobError(f"{type(self).__name__} has no loop of its own")

    def prepare(self, download: bool) -> list[str]:
        """Check before a launch what needs no GPU; with download, fetch what is missing first. Returns lines for the
        user. Raises JobError."""
        return []


def local_path(value: str | None, setting: str) -> Path:
    """The folder that a setting names. Raises JobError, naming the setting, unless the folder exists."""
    if not value:
        raise JobError(f"{setting} is not set; it must name a folder")
    if not Path(value).is_dir():
        raise JobError(f"{setting}: {value} is not a folder")
    return Path(value)
