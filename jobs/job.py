"""The Job protocol: what a user's own model and data look like to orch.

The short form gives `model` and `data`; everything else has a default that suits classification:

    class Mine(Job):
        def model(self): return torch.nn.Linear(784, 10)
        def data(self, split): return my_test_set if split == "test" else my_training_set

and a settings file names it: "job": "my_module:Mine".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn
from torch.utils.data import Dataset

from orchestrator.explain import explain
from orchestrator.records import Profile

Split = Literal["train", "validation", "test"]


class JobError(Exception):
    """The job lacks something that it needs; the message says what and where to get it."""


@dataclass(frozen=True)
class JobContext:
    """What a job is told about where it runs and what was asked for."""

    settings: Mapping[str, Any]  # the whole settings file, every default spelled out
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    cores: int = 1  # that this worker was given


class Job:
    """Derive from it. One object serves a whole job of the chain: keep what is dear to load in it."""

    Params: ClassVar[type[BaseModel] | None] = None  # the shape of job_params; None: any, as a plain dict

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
        """Called once for each model, with the profile it starts under. Later profiles set the learning rate,
        momentum and weight decay of every parameter group; its state is kept in the checkpoint."""
        return torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad],
            lr=profile.learning_rate,
            momentum=profile.momentum,
            weight_decay=profile.weight_decay,
        )

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """The mean loss of a batch, a scalar."""
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs: Any, targets: Any) -> dict[str, Tensor]:
        """Means over a batch of evaluation, scalars by name; the settings' metric must be among them."""
        return {
            "accuracy": (outputs.argmax(dim=1) == targets).float().mean(),
            "loss": self.loss(outputs, targets),
        }

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
