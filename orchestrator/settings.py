"""JSON -> Settings, validated once; every mistake named with its place, its value and what is allowed."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import AfterValidator, Field, ValidationError, field_validator
from pydantic_core import PydanticSerializationError

from orchestrator import rules
from orchestrator.changes import changes
from orchestrator.errors import SettingsError
from orchestrator.explain import explain, shown
from orchestrator.fields import MOST, Count, FilePath, Lifetime, Line, Size, Word
from orchestrator.fields import Strict as Strict  # of job_params too: a job imports it from here
from orchestrator.files import permissions
from orchestrator.profile_settings import ProfileSettings, checked_logger, checked_loggers
from orchestrator.records import Metric, Mode, Policy, Profile, StopRules
from orchestrator.slurm_values import checked_additional, checked_setup, one_line

# Keys of the report's own system whose job is done by the database and the run folder now.
OBSOLETE = ("lock_file", "lock_timeout", "state_file", "log_file", "model_name_format")
POSTGRES = "postgresql+psycopg"
DEFAULT_JOB = "jobs.alexnet:AlexNet"

Flags = bool | list[bool]
Logger = Annotated[str, AfterValidator(checked_logger)]


class MetricSettings(Strict):
    name: Annotated[Line, Field(min_length=1, max_length=100)] = "accuracy"
    mode: Mode = "max"


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
    training_profiles: Annotated[list[ProfileSettings], Field(min_length=1)]
    max_batch_size: Count = 100
    epochs_per_chunk: Count = 1
    metric: MetricSettings = MetricSettings()
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
    lock: Literal["auto", "flock", "soft"] = "auto"
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
    def _names_mean_one_thing(cls, profiles: list[ProfileSettings]) -> list[ProfileSettings]:
        seen: dict[str, ProfileSettings] = {}
        for profile in profiles:
            if seen.setdefault(profile.name, profile) != profile:
                raise ValueError(f"two profiles are named {profile.name!r} but differ; a repeat must be the same")
        return profiles

    def policy(self, version: int) -> Policy:
        """What of it the leaderboard needs."""
        return Policy(
            version=version,
            metric=Metric(self.metric.name, self.metric.mode),
            num_models=self.num_models,
            cycle=tuple(Profile(**p.model_dump()) for p in self.training_profiles),
            stop=StopRules(
                stale_chunks=rules.stale_chunks(
                    self.stop_after_stale_cycles, len(self.training_profiles), self.num_models
                ),
                score=self.stop_at_score,
                epochs=self.stop_after_epochs,
            ),
            max_failures=self.max_failures,
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


def load_policy(text: str, version: int) -> Policy:
    """The policy of settings as they were frozen by `freeze`."""
    return thaw(text).policy(version)


def freeze(settings: Settings) -> str:
    """Complete JSON: every default spelled out, so that a later version's defaults change nothing."""
    return settings.model_dump_json(indent=2)


def thaw(text: str) -> Settings:
    try:
        return Settings.model_validate_json(text)
    except ValidationError as error:
        raise SettingsError(explain("the run's settings", error, Settings)) from error


def load(path: Path, overrides: Sequence[str] = (), **fixed: Any) -> tuple[Settings, list[str]]:
    """Read a settings file. overrides are "key=value" with dots for depth and JSON for values; fixed ones
    come from the command line's own options and win.

    Returns the settings (paths absolute, from the current directory) and what the user should be told.
    Raises SettingsError with a line for each mistake.
    """
    source = shown(str(path), 160)
    raw = _read(path)
    for override in overrides:
        _override(raw, override)
    raw.update({key: value for key, value in fixed.items() if value is not None})
    notes = [f"{source}: {key} is no longer needed and ignored" for key in OBSOLETE if raw.pop(key, None) is not None]
    raw.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._")[:100] or "run")
    for key in ("training_source_dir", "testing_source_dir", "slurm_file"):
        if isinstance(raw.get(key), str) and raw[key]:
            try:
                raw[key] = str(Path(raw[key]).expanduser().absolute())
            except (RuntimeError, ValueError) as error:  # ~ of a user who does not exist, or can't
                raise SettingsError(f"{source}: {key}: {shown(raw[key])}: {shown(str(error), 200)}") from error
    weights = raw.get("pretrained_weights")  # a name of torchvision's, or a file
    if isinstance(weights, str) and _is_file(weights):
        raw["pretrained_weights"] = str(Path(weights).absolute())
    try:
        settings = Settings.model_validate(raw)
    except ValidationError as error:
        raise SettingsError(explain(source, error, Settings)) from error
    _check_round_trip(settings, source)
    if settings.group is not None:
        try:
            permissions.group_id(settings.group)
        except SettingsError as error:
            raise SettingsError(f"{source}: {error}") from error
    if settings.select_on == "test":
        notes.append(
            f'{source}: select_on is "test": the board is chosen on the test set, so its scores are no estimate of '
            'how good the models are. "validation" keeps the test set for the end.'
        )
    return settings, notes


# What may change while a run goes on: nothing that earlier results depend on.
AMENDABLE = (
    "training_profiles", "epochs_per_chunk", "workers", "cores_per_worker", "total_lifetime", "eon_lifetime",
    "stop_after_stale_cycles", "stop_at_score", "stop_after_epochs", "max_failures", "max_chunk_attempts",
    "max_disk_gb", "slurm_file", "slurm", "loggers",
)  # fmt: skip


def amend(settings: Settings, overrides: Sequence[str]) -> Settings:
    """Settings with "key=value" changes. Raises SettingsError for a key that can't change in a run."""
    raw = settings.model_dump(mode="json")
    for override in overrides:
        key = override.partition("=")[0].split(".")[0]
        if key in raw and key not in AMENDABLE:
            can = ", ".join(AMENDABLE)
            raise SettingsError(f"--set {shown(override, 100)}: {key} is fixed at launch; what can change: {can}")
        _override(raw, override)
    try:
        amended = Settings.model_validate(raw)
    except ValidationError as error:
        raise SettingsError(explain("amended settings", error, Settings)) from error
    _check_round_trip(amended, "amended settings")
    return amended


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # no name that a file could have
        return False


def _check_round_trip(settings: Settings, source: str) -> None:
    """A run's settings are kept as JSON, so they must come back from it as they were."""
    try:
        same = thaw(freeze(settings)) == settings
    except (PydanticSerializationError, SettingsError, ValueError, RecursionError):
        same = False
    if not same:
        where = "job_params, training_profiles or slurm"
        raise SettingsError(f"{source}: {where} hold a value that JSON can't keep (NaN, too deep, ...)")


def difference(old: Settings, new: Settings) -> list[str]:
    """A line for each value that differs, as deep as it lies: "slurm.partition: old -> new"."""
    return changes(old.model_dump(mode="json"), new.model_dump(mode="json"))


def _read(path: Path) -> dict[str, Any]:
    raw = _read_json(path)
    if not isinstance(raw, dict):
        raise SettingsError(f"{shown(str(path), 160)}: settings are a JSON object {{...}}, not {type(raw).__name__}")
    return raw


def _read_json(path: Path) -> Any:
    source = shown(str(path), 160)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_no_twins)
    except OSError as error:
        raise SettingsError(f"{source}: {error.strerror or error}") from error
    except json.JSONDecodeError as error:
        raise SettingsError(f"{source}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from error
    except _TwinKeyError as error:
        raise SettingsError(f"{source}: the key {shown(str(error))} is given twice") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, numbers of thousands of digits, nested too deep
        raise SettingsError(f"{source}: not JSON: {shown(str(error), 120)}") from error


class _TwinKeyError(Exception):
    """Which of two values would win is nobody's to guess."""


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise _TwinKeyError(repr(key))
        seen[key] = value
    return seen


def _override(raw: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise SettingsError(f"--set {shown(override, 180)!r}: allowed is key=value, e.g. --set workers=4")
    if text.startswith("@"):
        try:
            value = _read_json(Path(text[1:]))
        except SettingsError as error:
            raise SettingsError(f"--set {shown(override, 180)!r}: {error}") from error
    else:
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text  # a bare word is a string
        except (ValueError, RecursionError) as error:
            raise SettingsError(f"--set {shown(override, 180)!r}: {error}") from error
    *parents, last = path.split(".")
    node: Any = raw
    for key in parents:
        node = node[int(key)] if _is_index(node, key) else node.setdefault(key, {}) if isinstance(node, dict) else None
    if isinstance(node, dict):
        node[last] = value
    elif _is_index(node, last):
        node[int(last)] = value
    else:
        raise SettingsError(f"--set {shown(override, 180)!r}: there is nothing at {shown(path)!r} to set")


def _is_index(node: Any, key: str) -> bool:
    return isinstance(node, list) and key.isascii() and key.isdigit() and len(key) < 10 and int(key) < len(node)
