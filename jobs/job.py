"""The Job protocol: what a user's own model and data look like to orch.

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


@dataclass(frozen=True)
class Averaging:
    """An exponential moving average of the weights, floating-point buffers included:
    average = decay * average + (1 - decay) * weights, after every so many steps."""

    decay: float
    every_steps: int = 1

    def __post_init__(self) -> None:
        """Raises JobError for what is no average."""
        if not 0 <= self.decay < 1 or self.every_steps < 1:
            raise JobError(f"{self}: decay must be from 0 to below 1, every_steps 1 or more")


@dataclass(frozen=True)
class JobContext:
    """What a job is told about where it runs and what was asked for."""

    settings: Mapping[str, Any]  # the whole settings file, every default spelled out
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    cores: int = 1  # that this worker was given


@dataclass(frozen=True)
class ChunkContext:
    """One chunk to train. Random states (python's, numpy's, torch's, the GPUs') are set before and kept after it."""

    profile: Profile
    epochs: int  # to train now; of a chunk that was interrupted, those that had not been reported
    seed: int  # of a founder's initial weights; torch is seeded with it already
    repeat: int  # how many children the parent has had under this profile; torch is seeded anew for each
    device: torch.device
    settings: Mapping[str, Any]
    state: Mapping[str, Any] | None  # what the parent's chunk, or the interrupted one, returned; None: a founder
    resumed: bool  # the state is that of this very chunk, which was interrupted
    should_stop: Callable[[], bool]  # ask before each step; True: return ChunkInterrupted soon (in seconds)
    report: Callable[[Mapping[str, float]], None]  # after each epoch: its metrics, the settings' metric among them
    feed: Callable[[Split], Feed]  # batches of the job's data on the device: .shuffled(seed) to train, else .in_order()
    rank: int = 0  # of this process, where a worker has several (gpus_per_worker); torch.distributed is set up
    ranks: int = 1


@dataclass(frozen=True)
class ChunkResult:
    """All epochs of the chunk were trained and reported.

    state: everything that is needed to go on, in what torch.load(weights_only=True) takes: tensors, numbers, strings,
    dicts, lists, tuples. `orch evaluate` and `orch export` look for the model's state_dict under "model".
    """

    state: Mapping[str, Any]


@dataclass(frozen=True)
class ChunkInterrupted:
    """The loop was told to stop; from this state it goes on, in another process."""

    state: Mapping[str, Any]
    steps: int = 0  # of the epoch that was cut


class Job:
    """Derive from it. One object serves a whole job of the chain: keep what is dear to load in it."""

    METRICS: ClassVar[tuple[str, ...]] = ("accuracy", "loss")  # of `metrics`, where a class does not override it
    Params: ClassVar[type[BaseModel] | None] = None  # the shape of job_params; None: any, as a plain dict
    default_optimizer: ClassVar[str] = "SGD"  # of profiles that name none: a class of torch.optim's, or "module:Class"

    def __init__(self, context: JobContext) -> None:
        """Raises JobError if job_params are not what Params allows."""
        self.context = context
        self.params: Any = context.settings["job_params"]
        if self.Params is not None:
            try:
                self.params = self.Params.model_validate(self.params)
            except ValidationError as error:
                raise JobError(explain("job_params", error, self.Params)) from error

    def model(self) -> nn.Module:
        """A fresh model with initial weights, on the CPU. torch's random state is seeded for this founder."""
        raise JobError(f"{type(self).__name__} has no model(); it must return a torch.nn.Module")

    def data(self, split: Split) -> Dataset[Any]:
        """A map-style data set of (input, target) pairs, its length known.

        "train" and "validation" must list the same examples in the same order: which of them are trained on
        and which are kept for validation is decided by the run's seed, stratified by class. "train" may
        augment; "validation" should not. "test" is read by `orch evaluate` only.

        What it draws from python's, numpy's and torch's global generators follows from the run's seed alone, the same
        for each split; it is called once in each process.
        """
        raise JobError(f"{type(self).__name__} has no data(split); it must return a torch Dataset")

    def optimizer(self, model: nn.Module, profile: Profile) -> torch.optim.Optimizer:
        """A new optimizer with the profile's numbers; called at the start of each chunk.

        Under the parent's profile the optimizer's whole state is then restored. Under another, what it has gathered
        (momentum and the like) is kept if its class is the same, and the numbers of its parameter groups are those
        that this method gave. A profile that names no optimizer leaves the class to the job.
        """
        return optimizers.make(profile, model.parameters(), self.default_optimizer)

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """The mean loss of a batch, a scalar."""
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs: Any, targets: Any) -> dict[str, Tensor]:
        """Means over a batch of evaluation, scalars by name; the settings' metric must be among them."""
        return {
            "accuracy": (outputs.argmax(dim=1) == targets).float().mean(),
            "loss": self.loss(outputs, targets),
        }

    def predict(self, model: nn.Module, inputs: Any) -> Any:
        """The outputs for a batch of evaluation; test-time augmentation goes here. The model is in eval mode."""
        return model(inputs)

    def training_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of a batch of training, a scalar. To be overridden where a batch is no (inputs, targets)."""
        inputs, targets = batch
        return self.loss(model(inputs), targets)

    def evaluation_metrics(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """`metrics` of a batch of evaluation. To be overridden where a batch is no (inputs, targets)."""
        inputs, targets = batch
        return self.metrics(self.predict(model, inputs), targets)

    def batch_size(self, batch: Any) -> int:
        """How many examples there are in a batch: the length of the first tensor in it, in the order of its keys."""
        size = next((len(tensor) for tensor in tensors(batch) if tensor.ndim), None)
        if size is None:
            raise JobError(f"{type(self).__name__}: no tensor is in a batch; override batch_size(batch)")
        return size

    def averaging(self) -> Averaging | None:
        """The average of the weights that is evaluated and exported instead of the weights; None: there is none."""
        return None

    def frozen_part(self, model: nn.Module) -> nn.Module | None:
        """A first part of the model whose output for an example is always the same: it draws nothing at random, has
        no parameter that is trained, and its input is not augmented. None: there is none."""
        return None

    def train_chunk(self, context: ChunkContext) -> ChunkResult | ChunkInterrupted:
        """The long form: a loop of the job's own. Overriding it replaces all of the above but `model` and `data`,
        which `orch evaluate` and `orch export` use; see docs/your-own-job.md."""
        raise JobError(f"{type(self).__name__} has no loop of its own")

    def prepare(self, download: bool) -> list[str]:
        """Check that everything is there that needs no GPU to check, before anything is queued; fetch it
        first if download. Returns lines to tell the user. Raises JobError saying what is missing."""
        return []


def local_path(value: object, what: str) -> Path:
    """A settings value as a folder that exists. Raises JobError."""
    if not isinstance(value, str) or not value:
        raise JobError(f"{what} is not set; it must name a folder")
    if not Path(value).is_dir():
        raise JobError(f"{what}: {value} is not a folder")
    return Path(value)
