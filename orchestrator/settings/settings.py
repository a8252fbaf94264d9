"""JSON -> Settings, validated once; every mistake named with its place, its value and what is allowed."""

from __future__ import annotations

import json
import re
import secrets
from typing import Annotated, Any, Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import AfterValidator, Field, field_validator

from orchestrator.messages import one_line, shown
from orchestrator.records import Metric, Policy, Profile, StopRules, WantedLock
from orchestrator.rules import stopping
from orchestrator.settings.fields import (
    MOST,
    Count,
    FilePath,
    Lifetime,
    Line,
    Size,
    Strict,
    Word,
    checked_logger,
    checked_loggers,
)
from orchestrator.settings.sbatch_values import checked_additional, checked_setup

POSTGRES = "postgresql+psycopg"
DEFAULT_JOB = "jobs.alexnet:AlexNet"

Flags = bool | list[bool]
Logger = Annotated[str, AfterValidator(checked_logger)]


class SlurmSettings(Strict):
    """What each job asks of Slurm. Unset: what slurm_file says, else the partition's defaults."""

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    time_min: Annotated[Count | None, Field(description="time limit; default: eon_lifetime and the grace")] = None
    gpus: Annotated[int, Field(ge=0, le=MOST, description="GPUs per worker; default gpus_per_worker")] | None = None
    gres: Word | None = None
    cpus: Count | None = None
    mem_gb: Size | None = None
    nice: Annotated[int, Field(ge=0, le=2**31)] | None = None
    constraint: Word | None = None
    exclude: Word | None = None
    throttle: Annotated[Count | None, Field(description="jobs of the first array that run at once")] = None
    signal_delay_s: Annotated[Count | None, Field(description="warning before the limit; default 60")] = None
    setup: list[str] = Field([])
    additional_parameters: dict[str, Any] = Field({})

    @field_validator("setup")
    @classmethod
    def _commands(cls, lines: list[str]) -> list[str]:
        checked_setup(lines)
        return lines

    @field_validator("additional_parameters")
    @classmethod
    def _options_of_sbatch(cls, options: dict[str, Any]) -> dict[str, Any]:
        checked_additional(options)
        return options


class Settings(Strict):
    """Everything that a run is made from. Lifetimes in seconds."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    job: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", max_length=300)] = DEFAULT_JOB
    job_params: dict[str, Any] = Field({})

    num_models: Count = 5
    training_profiles: Annotated[list[Profile], Field(min_length=1)]
    max_batch_size: Count = 100
    epochs_per_chunk: Count = 1
    metric: Metric = Metric()
    select_on: Literal["validation", "test"] = "validation"
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    deterministic: bool = False
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    channels_last: Literal["auto", True, False] = "auto"
    compile: bool = False
    loggers: Annotated[list[Logger], AfterValidator(checked_loggers)] = Field(["tensorboard"])

    training_source_dir: FilePath | None = None
    testing_source_dir: FilePath | None = None
    pretrained_features: Flags = False
    pretrained_classifier: Flags = False
    trainable_features: Flags = True
    trainable_classifier: Flags = True
    pretrained_weights: FilePath = "IMAGENET1K_V1"

    workers: Annotated[int, Field(ge=1, le=100_000)] = 1
    executor: Literal["slurm", "local", "inline"] | None = None
    gpus_per_worker: Count = 1
    cores_per_worker: Count | None = None
    total_lifetime: Lifetime = 259200
    eon_lifetime: Lifetime = 2400
    stop_after_stale_cycles: Count | None = 1
    stop_at_score: Annotated[float, Field(allow_inf_nan=False)] | None = None
    stop_after_epochs: Count | None = None
    max_failures: Count = 5
    max_chunk_attempts: Count = 3
    max_disk_gb: Size | None = None
    slurm_file: FilePath | None = None
    slurm: SlurmSettings = SlurmSettings()
    database: str | None = None
    lock: WantedLock = "auto"
    group: Annotated[Line, Field(min_length=1, max_length=100)] | None = None
    database_schema: Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_]*$", max_length=63)] | None = None

    @field_validator("database")
    @classmethod
    def _a_database_we_know(cls, url: str | None) -> str | None:
        return None if url is None else checked_database(url)

    @field_validator("metric", mode="before")
    @classmethod
    def _a_name_and_which_way_is_up(cls, metric: Any) -> Any:
        if isinstance(metric, str):
            name = shown(json.dumps(metric))
            objects = f'{{"name": {name}, "mode": "min"}} if less of it is better, "max" in its place if more of it is'
            raise ValueError(f"{name} is a name alone; write {objects}")
        return metric

    @field_validator("training_profiles")
    @classmethod
    def _names_mean_one_thing(cls, profiles: list[Profile]) -> list[Profile]:
        seen: dict[str, Profile] = {}
        for profile in profiles:
            if seen.setdefault(profile.name, profile) != profile:
                raise ValueError(f"two profiles are named {profile.name!r} but differ; a repeat must be the same")
        return profiles

    def policy(self, version: int) -> Policy:
        """What of it the leaderboard needs."""
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


def checked_database(url: str) -> str:
    """Raises ValueError, whose text never holds the URL's password."""
    one_line(url)
    try:
        parts = urlsplit(url)
        query = {key.lower() for key in parse_qs(parts.query, keep_blank_values=True)}
        password = parts.password or query & {"password", "sslpassword"}
        parts.port  # noqa: B018  # looked at, and raises ValueError if it is no number
    except ValueError as error:  # brackets that are no IPv6 address
        raise ValueError(f"not a URL: {str(error).split(':')[0]}") from error
    if parts.scheme == "sqlite":
        if parts.path in ("", "/", "/:memory:"):
            raise ValueError("a database in memory is gone with its process; allowed is sqlite:////folder/file.db")
    elif parts.scheme != POSTGRES:
        raise ValueError(
            f"{parts.scheme[:40]!r} is no database that orch knows; allowed are {POSTGRES}://user@host/name and "
            "sqlite:////folder/file.db"
        )
    elif password:
        raise ValueError(
            "the URL holds a password, which would be written to the run folder; leave it out, and give it as "
            "PGPASSWORD or in ~/.pgpass"
        )
    return url


def is_server(database: str | None) -> bool:
    return database is not None and not database.startswith("sqlite")


def new_schema(run_name: str) -> str:
    """A name that PostgreSQL takes unquoted, and that no other run of this name has."""
    return f"orch_{re.sub(r'[^a-z0-9_]', '_', run_name.lower())[:40]}_{secrets.token_hex(4)}"
