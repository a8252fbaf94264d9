"""The Job protocol: how a user's own model and data plug into orch.

The short form defines `model` and `data`; everything else has a default that suits classification:

    class Mine(Job):
        def model(self): return torch.nn.Linear(784, 10)
        def data(self, split): return my_test_set if split == "test" else my_training_set

Select the job in a settings file with "job": "my_module:Mine".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from jobs.data.batches import tensors
from jobs.data.download import Fetch
from jobs.data.feeds import Feed
from jobs.data.splits import Split, labels_of
from jobs.errors import JobError
from jobs.optim import optimizers
from orchestrator.profile import Profile
from orchestrator.settings.explain import explain
from orchestrator.settings.settings import Settings

PROFILE = TypeAdapter(Profile)


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
    """The run's settings, and the hardware that the job runs on."""

    settings: Settings  # all settings of the run, including job_params
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    cores: int = 1  # CPU cores that this worker may use
    run_folder: Path | None = None  # None outside a run: before a launch, in `orch prepare` and `orch verify-resume`


@dataclass(frozen=True)
class ChunkContext:
    """One chunk to train. orch restores the random states (Python, NumPy, torch, GPUs) before it calls train_chunk,
    again at the first `batches` of an interrupted epoch (a new model has drawn numbers since), and saves them
    afterwards."""

    profile: Profile
    epochs: int  # number of epochs to train now; after an interruption, only the epochs not yet reported
    seed: int  # seed of a founder's initial weights; torch has already been seeded with it
    repeat: int  # number of earlier children of this parent under this profile; if above 0, the random seed is new
    device: torch.device
    settings: Settings
    state: Mapping[str, Any] | None  # as returned by the parent's chunk, or by this chunk if resumed; None: founder
    resumed: bool  # this chunk was interrupted earlier, and `state` is its own
    should_stop: Callable[[], bool]  # call before each step; if True, return ChunkInterrupted within seconds
    report: Callable[[Mapping[str, float]], None]  # call after each epoch; must include the metric named in settings
    feed: Callable[[Split], Feed]  # batches on the device: .shuffled(seed) for training, .in_order() for evaluation
    # The training batches of the current epoch, shuffled, from where an interrupted chunk goes on. They end early if
    # should_stop returns True; then return ChunkInterrupted.
    batches: Callable[[], Iterator[Any]]
    stopped: Callable[[], bool]  # did `batches` end early?
    evaluate: Callable[[nn.Module], dict[str, float]]  # the job's metrics on the split that models are selected on
    step: Callable[[Tensor, float], None]  # a step's loss (a scalar on the device) and learning rate, for the curves
    start: Mapping[str, Tensor] | None = None  # the weights of the setting "start_from", for a founder
    rank: int = 0  # rank of this process, if a worker has several GPUs; torch.distributed is already initialised
    ranks: int = 1  # number of processes of the worker (gpus_per_worker)


@dataclass(frozen=True)
class ChunkResult:
    """Returned by train_chunk when all epochs of the chunk were trained and reported.

    state: everything needed to continue, in types that torch.load(weights_only=True) reads: tensors, numbers, strings,
    dicts, lists, tuples. `orch evaluate` and `orch export` expect the model's state_dict under "model".
    """

    state: Mapping[str, Any]


@dataclass(frozen=True)
class ChunkInterrupted:
    """Returned by train_chunk if it stopped because should_stop returned True. Another process continues from state."""

    state: Mapping[str, Any]
    steps: int = 0  # steps completed in the interrupted epoch


class Job:
    """The base class of every job. One object is used for a whole Slurm job, so it can keep data that load slowly."""

    METRICS: ClassVar[tuple[str, ...]] = ("accuracy", "loss")  # names returned by the default `metrics`
    Params: ClassVar[type[BaseModel] | None] = None  # model that validates job_params; None: a dict with any keys
    default_optimizer: ClassVar[str] = "SGD"  # used if the profile names none: a torch.optim class or "module:Class"
    own_validation: ClassVar[bool] = False  # True: data("validation") is a set of its own, not a part of "train"
    evaluation_gradients: ClassVar[bool] = False  # True: compute gradients in evaluation too

    def __init__(self, context: JobContext) -> None:
        """Raises JobError if job_params do not validate against Params."""
        self.params: Any
        if self.Params is None:
            self.params = WatchedParams(context.settings.job_params)
            context = replace(context, settings=context.settings.model_copy(update={"job_params": self.params}))
        else:
            try:
                self.params = self.Params.model_validate(context.settings.job_params)
            except ValidationError as error:
                raise JobError(explain("job_params", error, self.Params)) from error
        self.context = context
        self._profile = self.resolved(context.settings.training_profiles[0])
        self.profile_was_read = False  # set by orch to know whether data() depends on the profile
        self.show: Callable[[str, str, Tensor], None] = _show_nothing  # set by orch

    def __getstate__(self) -> dict[str, Any]:
        """For a loader's processes, if they are not forked: their job shows nothing."""
        return self.__dict__ | {"show": _show_nothing}

    @property
    def profile(self) -> Profile:
        """The profile of the current chunk. Its `params` are free values for the job. Read it in `model`, in the loss,
        or in `data`, which is then called again for other params; not in a data set's __getitem__, which may run in
        another process. In evaluation, it is the profile with which the model was trained."""
        self.profile_was_read = True
        return self._profile

    @profile.setter
    def profile(self, profile: Profile) -> None:
        self._profile = self.resolved(profile)

    def resolved(self, profile: Profile) -> Profile:
        """Return the profile with the optimizer that the job uses if the profile names none."""
        return profile if profile.optimizer else replace(profile, optimizer=self.default_optimizer)

    def same_profile(self, saved: Mapping[str, Any], profile: Profile) -> bool:
        """Return whether a checkpoint was saved under this profile. saved: its fields; later ones have defaults."""
        return self.resolved(PROFILE.validate_python(saved)) == profile

    def log_image(self, name: str, image: Tensor) -> None:
        """Send a picture to the run's loggers: (channels, height, width) with 1 or 3 channels, uint8 or from 0 to 1.
        Copies it from the device at once. Other ranks than 0 send nothing."""
        self.show("image", name, image)

    def log_histogram(self, name: str, values: Tensor) -> None:
        """Send the distribution of some values to the run's loggers."""
        self.show("histogram", name, values)

    def model(self) -> nn.Module:
        """Return a new model with initial weights, on the CPU. torch is seeded for this founder before the call."""
        raise JobError(f"{type(self).__name__} has no model(); it must return a torch.nn.Module")

    def data(self, split: Split) -> Dataset[Any]:
        """Return a map-style data set of (input, target) pairs with a length. Called once per split in each process.

        "train" and "validation" must list the same examples in the same order: the run's seed decides which examples
        are used for training and which for validation, stratified by class. "train" may augment; "validation" should
        not. With the setting "validation": "own" (or own_validation = True), both are used whole. Only `orch evaluate`
        reads "test". It may also return an IterableDataset of a declared length or a loader of batches; see
        jobs.data.streams. The data must be the same in each process: orch compares them.

        Before each call, the global generators of Python, NumPy and torch are seeded with a value that depends only on
        the run's seed, not on the split.
        """
        raise JobError(f"{type(self).__name__} has no data(split); it must return a torch Dataset")

    def optimizer(self, model: nn.Module, profile: Profile) -> torch.optim.Optimizer:
        """Return a new optimizer with the profile's hyperparameters; called at the start of each chunk. If the settings
        name no optimizer, profile.optimizer is the job's default_optimizer.

        If the parent trained under the same profile, orch then restores the optimizer's whole state. Otherwise orch
        restores only the per-parameter state (such as momentum), and only if the class is the same; the parameter
        groups keep the hyperparameters set by this method.
        """
        return optimizers.make(profile, model.parameters())

    def labels(self, data: Any, split: Split) -> Sequence[int] | NDArray[np.int64] | None:
        """Return the class of each example of `data`, for splitting each class by itself; None: do not."""
        return labels_of(data)

    def collate(self, examples: list[Any]) -> Any:
        """Return a batch of these examples; dynamic padding goes here. Runs in the loader's processes."""
        return default_collate(examples)

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the mean loss of a batch, a scalar."""
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs: Any, targets: Any) -> dict[str, Tensor]:
        """Return means over an evaluation batch as scalars by name, including the metric named in the settings."""
        return {"accuracy": (outputs.argmax(dim=1) == targets).float().mean(), "loss": self.loss(outputs, targets)}

    def predict(self, model: nn.Module, inputs: Any) -> Any:
        """Return the outputs for an evaluation batch; test-time augmentation goes here. The model is in eval mode."""
        return model(inputs)

    def training_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the mean loss of a training batch, a scalar. Override it if a batch is not (inputs, targets)."""
        inputs, targets = batch
        return self.loss(model(inputs), targets)

    def evaluation_metrics(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Return the `metrics` of an evaluation batch. Override it if a batch is not (inputs, targets)."""
        inputs, targets = batch
        return self.metrics(self.predict(model, inputs), targets)

    def evaluate(self, model: nn.Module, batches: Iterable[Any]) -> Mapping[str, float]:
        """Return metrics of a whole split, such as F1, mean IoU or perplexity; they include the metric named in the
        settings. Override it if the metrics are not means over the examples of `evaluation_metrics`. The model is in
        eval mode; the batches are all of the split, in order, on the device, on each rank."""
        raise JobError(f"{type(self).__name__} does not define evaluate()")

    def batch_size(self, batch: Any) -> int:
        """Return the number of examples in a batch: the length of its first tensor that is not a scalar."""
        size = next((len(tensor) for tensor in tensors(batch) if tensor.ndim), None)
        if size is None:
            raise JobError(f"{type(self).__name__}: a batch has no non-scalar tensor; override batch_size(batch)")
        return size

    def averaging(self) -> Averaging | None:
        """Return how to average the weights, or None. orch evaluates and exports the average instead of the weights."""
        return None

    def frozen_part(self, model: nn.Module) -> nn.Module | None:
        """Return the first layers if their output for an example never changes, else None. orch then computes these
        outputs only once. The layers must not be random or trained, and their input must not be augmented."""
        return None

    def train_chunk(self, context: ChunkContext) -> ChunkResult | ChunkInterrupted:
        """Train with the job's own loop (the long form). Replaces `optimizer`, `training_loss`, `averaging` and
        `frozen_part`; `model`, `data` and the methods for metrics are still used; see docs/your-own-job.md."""
        raise JobError(f"{type(self).__name__} does not define train_chunk()")

    def fetch(self, how: Fetch) -> list[str]:
        """For `orch prepare`: use files that the user has brought (how.brought), or make stand-in data (how.stand_in).
        Called before `prepare(download=True)`. Returns messages for the user. Raises JobError, by default if anything
        was asked for."""
        if how.brought or how.stand_in or how.sha256:
            asked = "--stand-in" if how.stand_in else "--from" if how.brought else "--sha256"
            raise JobError(f"{asked}: {type(self).__name__} does not support it, because it does not fetch such files")
        return []

    def data_source(self) -> Mapping[str, Any]:
        """Return where the data come from, as JSON values for reports; {} if unknown. If they are artificial, include
        "stand_in": True and a "name"."""
        return {}

    def prepare(self, download: bool) -> list[str]:
        """Before a launch, check everything that can be checked without a GPU. download: first download missing files.
        Returns messages for the user. Raises JobError if a check fails."""
        return []


def _show_nothing(kind: str, name: str, values: Tensor) -> None:
    pass


class WatchedParams(dict[str, Any]):
    """job_params without a Params class: remembers the keys that were not read, so that a launch can name them."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        # A dict's own method, because those of this class note what is read.
        super().__init__(dict.items(given) if isinstance(given, dict) else given)
        self.unread = set(dict.keys(self))

    def __getitem__(self, key: str) -> Any:
        self.unread.discard(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.unread.discard(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.unread.discard(key)
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        self.unread.clear()  # the keys are used in a way that can't be followed, such as **params
        return super().__iter__()

    def keys(self) -> Any:
        self.unread.clear()
        return super().keys()

    def items(self) -> Any:
        self.unread.clear()
        return super().items()


def local_path(settings: Settings, setting: Literal["training_source_dir", "testing_source_dir"]) -> Path:
    """Return the folder that the setting names. Raises JobError if it is not a folder."""
    value = getattr(settings, setting)
    if not value:
        raise JobError(f"{setting} is not set; it must name a folder")
    if not Path(value).is_dir():
        raise JobError(
            f"{setting}: {value} is not a folder. Run `{settings.prepare_command}` to fetch the data, or correct the "
            "path"
        )
    return Path(value)
