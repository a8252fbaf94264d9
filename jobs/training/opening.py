"""From settings to a job that is ready to train."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from jobs.errors import JobError
from jobs.imports import find_class
from jobs.job import Job, JobContext
from jobs.loggers import choice
from jobs.optim import schedules
from jobs.training.own_loop import OwnLoop
from jobs.training.ranks import ALONE, Alone
from jobs.training.session import Session
from orchestrator.records import Metric, Profile


def load_job(settings: Mapping[str, Any], device: torch.device | None = None, cores: int = 1) -> Job:
    """The settings' job as an object. Raises JobError if it can't be imported or is none."""
    found = find_class(settings["job"])
    if not issubclass(found, Job):
        raise JobError(f"job {settings['job']}: its class is not derived from jobs.job.Job")
    job: Job = found(JobContext(settings, device or torch.device("cpu"), cores))
    return job


def open_session(
    settings: Mapping[str, Any], cores: int, group: Alone = ALONE, run_folder: Path | None = None
) -> Session | OwnLoop:
    """The settings' job, ready to train in this process. group: those that train together. run_folder: where loggers
    write; None: nothing is logged."""
    job = load_job(settings, set_up(settings, cores), cores)
    observer = choice.observer(settings, run_folder if group.rank == 0 else None)
    return (OwnLoop if has_own_loop(job) else Session)(job, group, observer)


def has_own_loop(job: Job) -> bool:
    return type(job).train_chunk is not Job.train_chunk


def check_job(settings: Mapping[str, Any], download: bool = False) -> list[str]:
    """Everything of the job's that can be checked before a launch. Returns lines to tell the user. Raises JobError."""
    choice.check_loggers(settings["loggers"])
    job = load_job(settings)
    metric = Metric(settings["metric"]["name"], settings["metric"]["mode"])
    mistakes = []
    if not has_own_loop(job):
        for method in ("model", "data"):
            if getattr(type(job), method) is getattr(Job, method):
                mistakes.append(f"{type(job).__name__} has no {method}; see docs/your-own-job.md for what it returns")
    if metric.name not in Job.METRICS and not _has_own_metrics(job):
        known = ", ".join(Job.METRICS)
        mistakes.append(f"metric.name: {metric.name!r} is not among the metrics of {type(job).__name__}: {known}")
    for profile in {profile["name"]: Profile(**profile) for profile in settings["training_profiles"]}.values():
        try:
            schedules.check_schedule(profile, metric, job.default_optimizer)
        except JobError as error:
            mistakes.append(str(error))
    if mistakes:
        raise JobError("\n".join(mistakes))
    return job.prepare(download)


def _has_own_metrics(job: Job) -> bool:
    """What they are called shows when they are measured."""
    own = type(job)
    return has_own_loop(job) or (own.metrics, own.evaluation_metrics) != (Job.metrics, Job.evaluation_metrics)


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
