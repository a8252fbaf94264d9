"""Estimate a job's checkpoint size without training, from its model and its optimizer's state after one step."""

from __future__ import annotations

import warnings

import torch

from jobs.data.batches import size_bytes, tensors
from jobs.errors import JobError
from jobs.job import Job
from jobs.training import frozen_file
from jobs.training.checked import checked_model
from jobs.training.opening import load_job
from orchestrator.profile import Profile
from orchestrator.settings.settings import Settings

# Measured: the random states of Python, numpy and torch, plus an empty archive.
STATE_BYTES = 22_000
TENSOR_BYTES = 250  # archive overhead per tensor


def checkpoint_bytes(settings: Settings) -> int:
    """Estimate the size of one checkpoint in bytes. The model is created without memory for its tensors (on torch's
    meta device) or, if the job's code needs their values, on the CPU. Raises JobError, and any error of that code."""
    # An optimizer without momentum may keep no state, so use the profile with the highest momentum.
    profile = max(settings.training_profiles, key=lambda profile: profile.momentum)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # for example, about weights dropped because the device is meta
            return _bytes_of(load_job(settings), profile)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, JobError):  # the job's code needs the values
        return _bytes_of(load_job(settings), profile)


def _bytes_of(job: Job, profile: Profile) -> int:
    model = checked_model(job, job.model())
    optimizer = job.optimizer(model, job.resolved(profile))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    weights = model.state_dict()
    frozen = {name: weights[name] for name in frozen_file.frozen_names(model) if name in weights}
    if job.context.settings.gpus_per_worker == 1 and size_bytes(frozen) >= frozen_file.LEAST_BYTES:
        weights = {name: value for name, value in weights.items() if name not in frozen}  # kept once, not in each file
    state = [weights, optimizer.state_dict()["state"]]
    return STATE_BYTES + size_bytes(state) + TENSOR_BYTES * len(tensors(state))
