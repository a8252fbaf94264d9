"""Open the job given in the settings, ready to train."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from jobs.data.download import Fetch
from jobs.errors import JobError
from jobs.imports import find_class
from jobs.job import Job, JobContext
from jobs.loggers import choice
from jobs.optim import schedules
from jobs.training.own_loop import OwnLoop
from jobs.training.ranks import ALONE, Alone
from jobs.training.session import Session
from orchestrator.settings.settings import Settings


def load_job(
    settings: Settings, device: torch.device | None = None, cores: int = 1, run_folder: Path | None = None
) -> Job:
    """Create the job named in the settings. Raises JobError if its class can't be imported or does not extend Job."""
    job_class = find_class(settings.job, f"job {settings.job}")
    if not issubclass(job_class, Job):
        raise JobError(f"job {settings.job}: its class is not derived from jobs.job.Job")
    return job_class(JobContext(settings, device or torch.device("cpu"), cores, run_folder))


def open_session(
    settings: Settings, cores: int, group: Alone = ALONE, run_folder: Path | None = None, *, logs: bool = True
) -> Session | OwnLoop:
    """Open the settings' job for training. group: the ranks that train together. run_folder: None if there is no run.
    logs: report to the run's loggers."""
    job = load_job(settings, set_up(settings, cores), cores, run_folder)
    kept = run_folder if group.rank == 0 else None  # the other ranks write nothing
    observer = choice.observer(settings, kept if logs else None)
    kind = OwnLoop if has_own_loop(job) else Session
    return kind(job, group, observer, kept)


def has_own_loop(job: Job) -> bool:
    return type(job).train_chunk is not Job.train_chunk


def check_job(settings: Settings, fetch: Fetch | None = None) -> list[str]:
    """Check the job as far as possible before a launch. fetch: first fetch missing files. Returns lines to show to the
    user. Raises JobError."""
    choice.check_loggers(settings.loggers)
    job = load_job(settings)
    own, metric = type(job), settings.metric
    mistakes = []
    if not has_own_loop(job):
        missing = [name for name in ("model", "data") if getattr(own, name) is getattr(Job, name)]
        where = "see docs/your-own-job.md for what it must return"
        mistakes = [f"{own.__name__} has no {name}; {where}" for name in missing]
        # The names of metrics computed by the job's own method are known only after a call.
        known = (own.metrics, own.evaluation_metrics) == (Job.metrics, Job.evaluation_metrics)
        if known and metric.name not in Job.METRICS and own.evaluate is Job.evaluate:
            allowed = ", ".join(Job.METRICS)
            mistakes.append(f"metric.name: {metric.name!r} is not among the metrics of {own.__name__}: {allowed}")
        if known and metric.name == "loss" and metric.mode == "max":
            mistakes.append('metric.mode: "max" would keep the models with the highest loss; use "min"')
    for profile in {profile.name: profile for profile in settings.training_profiles}.values():
        try:
            schedules.check_schedule(job.resolved(profile), metric)
        except JobError as error:
            mistakes.append(str(error))
    if mistakes:
        raise JobError("\n".join(mistakes))
    fetched = job.fetch(fetch) if fetch else []
    return fetched + job.prepare(download=fetch is not None)


def set_up(settings: Settings, cores: int) -> torch.device:
    """Configure this process's threads and determinism. Returns the device: a GPU if there is one, else the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(max(1, cores))
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not settings.deterministic
    return device
