"""The settings of a run: their keys, defaults, meanings and limits."""

from __future__ import annotations

import json
import re
import secrets
import shlex
from typing import Annotated, Any, Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import AfterValidator, Field, PrivateAttr, field_validator

from orchestrator.messages import one_line, shown
from orchestrator.profile import CLASS, Line, Metric, Profile
from orchestrator.records import Policy, StopRules, WantedLock
from orchestrator.rules import stopping
from orchestrator.settings.fields import MOST, Count, FilePath, Lifetime, Size, Strict, Word
from orchestrator.settings.sbatch_values import checked_additional, checked_setup

POSTGRES = "postgresql+psycopg"
DEFAULT_JOB = "jobs.alexnet:AlexNet"
LOGGERS = ("tensorboard", "wandb", "mlflow")
JOB = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"

Flags = bool | list[bool]


def _check_logger(name: str) -> str:
    if name not in LOGGERS and not (len(name) <= 300 and ":" in name and CLASS.fullmatch(name)):
        allowed = f'{", ".join(LOGGERS)} and "package.module:Class"'
        raise ValueError(f"{shown(repr(name))} is not a logger; allowed: {allowed}")
    return name


def _check_database(url: str) -> str:
    """Return the URL if it is allowed; otherwise raise ValueError. The message never contains the password."""
    one_line(url)
    try:
        parts = urlsplit(url)
        query = {key.lower() for key in parse_qs(parts.query, keep_blank_values=True)}
        password = parts.password or query & {"password", "sslpassword"}
        parts.port  # noqa: B018  # raises ValueError if the port is not a number
    except ValueError as error:  # urlsplit raises it if brackets do not contain an IPv6 address
        raise ValueError(f"not a URL: {str(error).split(':')[0]}") from error
    if parts.scheme == "sqlite":
        if parts.path in ("", "/", "/:memory:"):
            raise ValueError("a database in memory is lost when its process ends; use sqlite:////folder/file.db")
    elif parts.scheme != POSTGRES:
        raise ValueError(
            f"orch does not support the database {parts.scheme[:40]!r}; allowed: {POSTGRES}://user@host/name and "
            "sqlite:////folder/file.db"
        )
    elif password:
        raise ValueError(
            "the URL contains a password, which would be written to the run folder; leave it out, and set PGPASSWORD "
            "or use ~/.pgpass"
        )
    return url


DatabaseUrl = Annotated[str, AfterValidator(_check_database)]


class SlurmSettings(Strict):
    """What each job requests from Slurm. If a key is unset, the value from slurm_file applies, else Slurm's default."""

    partition: Word | None = Field(None, description="partition, or several with commas between them")
    account: Word | None = Field(None, description="account to charge the jobs to")
    qos: Word | None = Field(None, description="quality of service")
    time_min: Count | None = Field(None, description="time limit in minutes; default: computed from eon_lifetime")
    gpus: int | None = Field(None, ge=0, le=MOST, description="GPUs of a worker; default: gpus_per_worker")
    gres: Word | None = Field(None, description="generic resources, such as gpu:a100:1")
    cpus: Count | None = Field(None, description="CPU cores of each task")
    mem_gb: Size | None = Field(None, description="memory of each node in GiB")
    nice: int | None = Field(None, ge=0, le=2**31, description="how much to lower the jobs' priority")
    constraint: Word | None = Field(None, description="features that nodes must have")
    exclude: Word | None = Field(None, description="nodes that jobs must not run on")
    throttle: Count | None = Field(None, description="how many jobs of the first array may run at the same time")
    signal_delay_s: Count | None = Field(None, description="seconds between warning and time limit; default: 60")
    setup: Annotated[list[str], AfterValidator(checked_setup)] = Field(
        [], description="shell commands to run at the beginning of a job"
    )
    additional_parameters: Annotated[dict[str, Any], AfterValidator(checked_additional)] = Field(
        {}, description="other long sbatch options"
    )


class StartFrom(Strict):
    """The weights that founders start from, instead of those that the job's model() draws."""

    file: FilePath = Field(description="a checkpoint of a run, or a file of weights written by torch.save")
    optimizer: bool = Field(False, description="take over the optimizer's state too; only from a checkpoint")


class Settings(Strict):
    """Everything that defines a run. Lifetimes are in seconds."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100, description="name of run and folder")
    job: str = Field(DEFAULT_JOB, pattern=JOB, max_length=300, description="module:Class of the model and its data")
    job_params: dict[str, Any] = Field({}, description="the job's own parameters")

    num_models: Count = Field(5, description="slots of the leaderboard")
    training_profiles: list[Profile] = Field(min_length=1, description="the cycle, in order; repeats are allowed")
    max_batch_size: Count = Field(100, description="examples in a batch")
    epochs_per_chunk: Count = Field(1, description="epochs of a chunk, unless its profile names them")
    metric: Metric = Field(Metric(), description="the number that orders the board; mode is max or min")
    select_on: Literal["validation", "test"] = Field(
        "validation", description="the data that models are selected on; with test, the scores are too optimistic"
    )
    validation: Literal["split", "own"] | None = Field(
        None,
        description="split: a part of the training set; own: data('validation') as it is; default: the job's choice",
    )
    validation_fraction: float = Field(0.1, gt=0, lt=1, description="share of the training set used for validation")
    stratify: bool = Field(True, description="split each class by itself, if the classes are known")
    evaluate_every: Count = Field(1, description="epochs between validations; the last epoch of a chunk has one too")
    evaluate_every_steps: Count | None = Field(
        None, description="optimizer steps between further validations, for curves"
    )
    drop_last: bool = Field(False, description="leave out an epoch's last batch if it is smaller than the others")
    start_from: StartFrom | None = Field(None, description="founders start from this checkpoint or file of weights")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of the split and the initial weights")
    deterministic: bool = Field(False, description="use torch's deterministic algorithms, which are slower")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="format of matrix products and convolutions; auto: bf16, else fp16 on a GPU, fp32 on a CPU"
    )
    channels_last: Literal["auto", True, False] = Field(
        "auto", description="memory layout of images; auto: channels last if the model has 2D convolutions"
    )
    compile: bool = Field(False, description="compile the model with torch.compile")
    loggers: list[Annotated[str, AfterValidator(_check_logger)]] = Field(
        ["tensorboard"], description="where curves are written: tensorboard, wandb, mlflow, or module:Class"
    )

    training_source_dir: FilePath | None = Field(None, description="folder of training images, one subfolder per class")
    testing_source_dir: FilePath | None = Field(None, description="folder of test images, one subfolder per class")
    pretrained_features: Flags = Field(False, description="AlexNet: which convolution layers start pretrained")
    pretrained_classifier: Flags = Field(False, description="AlexNet: which classifier layers start pretrained")
    trainable_features: Flags = Field(True, description="AlexNet: which convolution layers are trained")
    trainable_classifier: Flags = Field(True, description="AlexNet: which classifier layers are trained")
    pretrained_weights: FilePath = Field("IMAGENET1K_V1", description="name of weights in torchvision, or a file")

    workers: int = Field(1, ge=1, le=100_000, description="number of chains that train at the same time")
    executor: Literal["slurm", "local", "inline"] | None = Field(
        None, description="where jobs run; default: slurm if sbatch is installed, else local"
    )
    gpus_per_worker: Count = Field(1, description="processes of a worker that train together, one GPU each")
    cores_per_worker: Count | None = Field(None, description="CPU cores; default: the cores allocated to the job")
    total_lifetime: Lifetime = Field(259200, description="seconds from launch to the end of the run")
    eon_lifetime: Lifetime = Field(2400, description="seconds of work in one job")
    stop_after_stale_cycles: Count | Literal["auto"] | None = Field(
        "auto",
        description="end after this many cycles without a promotion; null: never; auto: 1, but 20 chunks or more",
    )
    stop_at_score: float | None = Field(None, allow_inf_nan=False, description="end when a model has this score")
    stop_after_epochs: Count | None = Field(None, description="end after this many epochs in total")
    max_failures: Count = Field(5, description="failures in a row that end a chain")
    max_chunk_attempts: Count = Field(3, description="failures of a profile on a model before the profile is skipped")
    max_disk_gb: Size | None = Field(None, description="limit for the run's folder in GB (10^9 bytes)")
    slurm_file: FilePath | None = Field(None, description="an sbatch file whose options and setup lines are used")
    slurm: SlurmSettings = Field(SlurmSettings(), description="what jobs request from Slurm; overrides slurm_file")
    database: DatabaseUrl | None = Field(None, description="PostgreSQL or SQLite URL; default: in the run's folder")
    lock: WantedLock = Field("auto", description="lock for the SQLite file; auto: one that passes a test at launch")
    group: Line | None = Field(None, description="a Unix group whose members may read and control the run")
    database_schema: str | None = Field(
        None, pattern=r"^[a-z_][a-z0-9_]*$", max_length=63, description="PostgreSQL schema; default: a new one per run"
    )

    # The command-line words that give these settings: a file and its --set options. Not stored; empty if unknown.
    _origin: tuple[str, ...] = PrivateAttr(())

    @field_validator("loggers")
    @classmethod
    def _check_loggers_are_distinct(cls, names: list[str]) -> list[str]:
        """Refuse duplicates: a logger named twice would write everything twice."""
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{shown(repr(name))} is named {names.count(name)} times; name each logger once")
        return names

    @field_validator("start_from", mode="before")
    @classmethod
    def _file_only(cls, start: Any) -> Any:
        return {"file": start} if isinstance(start, str) else start

    @field_validator("metric", mode="before")
    @classmethod
    def _check_metric_has_mode(cls, metric: Any) -> Any:
        if isinstance(metric, str):
            name = shown(json.dumps(metric))
            better = '"mode": "min"} if a lower value is better, "max" if a higher one is'
            raise ValueError(f'{name} is only a name; write {{"name": {name}, {better}')
        return metric

    @field_validator("training_profiles")
    @classmethod
    def _check_repeats_are_equal(cls, profiles: list[Profile]) -> list[Profile]:
        seen: dict[str, Profile] = {}
        for profile in profiles:
            if seen.setdefault(profile.name, profile) != profile:
                raise ValueError(f"two profiles are named {profile.name!r} but differ; a repeat must be the same")
        return profiles

    @property
    def uses_server(self) -> bool:
        """Whether the database is on a server. A server needs no file lock, but the run's tables need a schema."""
        return self.database is not None and not self.database.startswith("sqlite")

    @property
    def several_nodes(self) -> bool:
        """Whether the run's jobs may be on more than one machine, so that locks must work between machines."""
        return self.executor not in ("local", "inline")

    def __eq__(self, other: object) -> bool:
        """Compare the values of all settings, wherever they came from."""
        return isinstance(other, Settings) and self.__dict__ == other.__dict__

    def came_from(self, *words: str) -> None:
        """Remember the command-line words that give these settings: a settings file, and its --set options."""
        self._origin = words

    @property
    def prepare_command(self) -> str:
        """The command that fetches missing data and weights, for messages."""
        return shlex.join(["orch", "prepare", *(self._origin or ("SETTINGS",))])

    @property
    def data_folders(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(path for path in (self.training_source_dir, self.testing_source_dir) if path))

    def policy(self, version: int) -> Policy:
        """Return the part of the settings that the leaderboard needs."""
        return Policy(
            version=version,
            metric=self.metric,
            num_models=self.num_models,
            cycle=tuple(self.training_profiles),
            stop=StopRules(
                stale_chunks=stopping.stale_chunks(
                    self.stop_after_stale_cycles, len(self.training_profiles), self.num_models
                ),
                score=self.stop_at_score,
                epochs=self.stop_after_epochs,
            ),
            max_chunk_attempts=self.max_chunk_attempts,
        )


def new_schema(run_name: str) -> str:
    """Make a unique schema name that PostgreSQL accepts without quotes."""
    return f"orch_{re.sub(r'[^a-z0-9_]', '_', run_name.lower())[:40]}_{secrets.token_hex(4)}"
