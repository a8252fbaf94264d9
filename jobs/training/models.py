"""New model objects: made by the job, each a new one, with the weights that a founder starts from."""

from __future__ import annotations

import hashlib
import logging
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jobs.data.batches import contents_digest
from jobs.errors import JobError
from jobs.job import Job
from jobs.training import states
from jobs.training.checked import checked_model
from orchestrator.files import fingerprints

log = logging.getLogger("orch")


class Models:
    """Makes a job's models, and notices mistakes in its model()."""

    def __init__(self, job: Job, run_folder: Path | None = None) -> None:
        """run_folder: where the digest of the start_from file is kept; None: nowhere."""
        self._job = job
        self._run_folder = run_folder
        self._start: Mapping[str, Any] | None = None
        self._last: list[weakref.ref[nn.Parameter]] = []  # the trained parameters of the last model
        self._founder: str | None = None  # digest of the last founder's weights

    def make(self) -> nn.Module:
        """Return a new model. Raises JobError if it shares trained parameters with the last one."""
        model = checked_model(self._job, self._job.model())
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        last = {id(kept) for reference in self._last if (kept := reference()) is not None}
        if any(id(parameter) in last for parameter in trained):
            raise JobError(
                f"{type(self._job).__name__}.model() returned an object that it had returned before, whose weights "
                "are trained by now; it must make a new model at each call"
            )
        self._last = [weakref.ref(parameter) for parameter in trained]
        return model

    def make_founder(self) -> nn.Module:
        """Return a new model with the weights that a founder starts from. If they equal those of the last founder
        although nothing was loaded, logs a warning."""
        model = self.make()
        start, wanted = self.start(), self._job.context.settings.start_from
        if start is not None and wanted is not None:
            load_weights(model, states.weights(start), wanted.file)
            return model
        digest = contents_digest(model.parameters())
        if digest == self._founder:
            log.warning("%s", EQUAL_FOUNDERS)
        self._founder = digest
        return model

    def start(self) -> Mapping[str, Any] | None:
        """Return the state in the file of the setting start_from; None without that setting. Raises JobError if the
        file can't be used, or is not the one with which the run began."""
        wanted = self._job.context.settings.start_from
        if wanted is not None and self._start is None:
            file = Path(wanted.file)
            _compare_start(self._run_folder, file)
            self._start = states.read_start(file)
            if wanted.optimizer and "optimizer" not in self._start:
                raise JobError(f'start_from: {file} has no state of an optimizer; set "optimizer": false')
        return self._start


START_FROM = "start_from"  # the name of its fingerprint
EQUAL_FOUNDERS = (
    "model() returned the same weights for two founders, so they start equal. If it does not load pretrained weights, "
    "remove the seed (torch.manual_seed) in it: orch seeds each founder"
)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], file: str) -> None:
    """Load weights into a model. Raises JobError if any are missing, superfluous, or of another shape."""
    own = model.state_dict()
    weights = states.unwrapped(weights, own.keys())
    missing = [name for name in own if name not in weights]
    extra = [name for name in weights if name not in own]
    shapes = [
        f"{name} has the shape {tuple(value.shape)}, here {tuple(own[name].shape)}"
        for name, value in weights.items()
        if name in own and isinstance(value, Tensor) and value.shape != own[name].shape
    ]
    mistakes = [f"it lacks {', '.join(missing[:3])}"] if missing else []
    mistakes += [f"it also has {', '.join(extra[:3])}"] if extra else []
    mistakes += shapes[:3]
    if mistakes:
        raise JobError(f"start_from: {file} does not fit the model: {'; '.join(mistakes)}")
    model.load_state_dict(weights)


def _compare_start(run_folder: Path | None, file: Path) -> None:
    """Compare the file with the one that the run began with. Raises JobError."""
    try:
        with file.open("rb") as source:
            sha256 = hashlib.file_digest(source, "sha256").hexdigest()
    except OSError as error:
        raise JobError(f"start_from: {file} can't be read: {error.strerror or error}") from error
    if run_folder is None:
        return
    if fingerprints.kept(run_folder, START_FROM) is None:
        fingerprints.keep(run_folder, START_FROM, {"sha256": sha256})
    if fingerprints.kept(run_folder, START_FROM) != {"sha256": sha256}:
        raise JobError(f"start_from: {file} has changed since this run began; restore it, or launch another run")


def equal_for_two_seeds(job: Job) -> bool:
    """Return whether model() returns the same weights for two seeds, although it has some."""
    digests = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        digests.append(contents_digest(checked_model(job, job.model()).parameters()))
    return digests[0] == digests[1]
