"""Read a settings file, override and amend settings, and convert them to the JSON that is stored with a run."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from orchestrator.errors import SettingsError
from orchestrator.files import permissions
from orchestrator.messages import shown
from orchestrator.settings.changes import changes
from orchestrator.settings.explain import explain
from orchestrator.settings.settings import Settings

# Keys of the original system that are ignored, because each run now has its own database and folder.
OBSOLETE = ("lock_file", "lock_timeout", "state_file", "log_file", "model_name_format")


def freeze(settings: Settings) -> str:
    """Convert settings to JSON, including all defaults, so that a later version's defaults don't affect the run."""
    return settings.model_dump_json(indent=2)


def thaw(text: str) -> Settings:
    """Convert the JSON made by `freeze` back to settings. Raises SettingsError."""
    try:
        return Settings.model_validate_json(text)
    except ValidationError as error:
        raise SettingsError(explain("the run's settings", error, Settings)) from error


def load(path: Path, overrides: Sequence[str] = (), **fixed: Any) -> tuple[Settings, list[str]]:
    """Read a settings file. overrides: "key=value" texts, such as "slurm.nice=5"; the value is JSON.
    fixed: values of command-line options, which take precedence over file and overrides; None: option not given.

    Returns settings (with absolute paths) and notes for the user. Raises SettingsError with a line for each mistake.
    """
    source = shown(str(path), 160)
    raw = _read_json(path)
    if not isinstance(raw, dict):
        raise SettingsError(f"{source}: settings are a JSON object {{...}}, not {type(raw).__name__}")
    for override in overrides:
        _override(raw, override)
    raw.update({key: value for key, value in fixed.items() if value is not None})
    notes = [f"{source}: {key} is no longer needed and ignored" for key in OBSOLETE if raw.pop(key, None) is not None]
    raw.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._")[:100] or "run")
    for key in ("training_source_dir", "testing_source_dir", "slurm_file"):
        if isinstance(raw.get(key), str) and raw[key]:
            try:
                raw[key] = str(Path(raw[key]).expanduser().absolute())
            except (RuntimeError, ValueError) as error:  # ~ of an unknown user, or an impossible path
                raise SettingsError(f"{source}: {key}: {shown(raw[key])}: {shown(str(error), 200)}") from error
    start = raw.get("start_from")
    if isinstance(start, str):
        start = raw["start_from"] = {"file": start}
    if isinstance(start, dict) and isinstance(start.get("file"), str) and start["file"]:
        start["file"] = os.path.abspath(os.path.expanduser(start["file"]))
    weights = raw.get("pretrained_weights")  # a file, or the name of weights in torchvision
    if isinstance(weights, str) and os.path.isfile(weights):
        raw["pretrained_weights"] = str(Path(weights).absolute())
    settings = _validated(raw, source)
    settings.came_from(str(path), *(word for override in overrides for word in ("--set", override)))
    if settings.group is not None:
        try:
            permissions.group_id(settings.group)
        except SettingsError as error:
            raise SettingsError(f"{source}: {error}") from error
    if settings.select_on == "test":
        notes.append(
            f'{source}: select_on is "test": models are selected by their test scores, so these scores are too '
            'optimistic. "validation" keeps the test set for the final evaluation.'
        )
    return settings, notes


# Keys that may change during a run, because a change does not invalidate earlier results.
AMENDABLE = (
    "training_profiles", "epochs_per_chunk", "evaluate_every", "evaluate_every_steps", "workers", "cores_per_worker",
    "total_lifetime", "eon_lifetime", "stop_after_stale_cycles", "stop_at_score", "stop_after_epochs", "max_failures",
    "max_chunk_attempts", "max_disk_gb", "slurm_file", "slurm", "loggers",
)  # fmt: skip


def amend(settings: Settings, overrides: Sequence[str]) -> Settings:
    """Apply "key=value" changes to a run's settings. Raises SettingsError for a key that is fixed at launch."""
    raw = settings.model_dump(mode="json")
    for override in overrides:
        key = override.partition("=")[0].split(".")[0]
        if key in raw and key not in AMENDABLE:
            can = ", ".join(AMENDABLE)
            raise SettingsError(f"--set {shown(override, 100)}: {key} is fixed at launch; what can change: {can}")
        _override(raw, override)
    return _validated(raw, "amended settings")


def _validated(raw: dict[str, Any], source: str) -> Settings:
    """Validate settings, and check that storing them as JSON does not change any value. Raises SettingsError."""
    try:
        settings = Settings.model_validate(raw)
    except ValidationError as error:
        raise SettingsError(explain(source, error, Settings)) from error
    try:
        same = thaw(freeze(settings)) == settings
    except (PydanticSerializationError, SettingsError, ValueError, RecursionError):
        same = False
    if not same:
        where = "job_params, training_profiles or slurm"
        raise SettingsError(f"{source}: {where}: a value there can't be kept as JSON (NaN, nested too deep, ...)")
    return settings


def difference(old: Settings, new: Settings) -> list[str]:
    """Return a line for each value that differs, such as "slurm.partition: old -> new"."""
    return changes(old.model_dump(mode="json"), new.model_dump(mode="json"))


def _read_json(path: Path) -> Any:
    source = shown(str(path), 160)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise SettingsError(f"{source}: {error.strerror or error}") from error
    except json.JSONDecodeError as error:
        raise SettingsError(f"{source}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from error
    except SettingsError as error:  # a duplicate key
        raise SettingsError(f"{source}: {error}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, a number with thousands of digits, nested too deeply
        raise SettingsError(f"{source}: not JSON: {shown(str(error), 120)}") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict. Raises SettingsError for a duplicate key, because json would silently use its last value."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise SettingsError(f"the key {shown(repr(key))} is given twice")
        values[key] = value
    return values


def _override(raw: dict[str, Any], override: str) -> None:
    """Apply one "key=value" override to raw, in place. Raises SettingsError."""
    path, equals, text = override.partition("=")
    option = f"--set {shown(override, 180)!r}"
    if not equals or not path:
        raise SettingsError(f"{option}: write key=value, e.g. --set workers=4")
    try:
        value = _read_json(Path(text[1:])) if text.startswith("@") else json.loads(text)
    except json.JSONDecodeError:
        value = text  # not JSON: a string without quotes
    except (SettingsError, ValueError, RecursionError) as error:
        raise SettingsError(f"{option}: {error}") from error
    *parents, last = path.split(".")
    node: Any = raw
    for key in parents:
        node = node[int(key)] if _is_index(node, key) else node.setdefault(key, {}) if isinstance(node, dict) else None
    if isinstance(node, dict):
        node[last] = value
    elif _is_index(node, last):
        node[int(last)] = value
    else:
        raise SettingsError(f"{option}: there is nothing at {shown(path)!r} to set")


def _is_index(node: Any, key: str) -> bool:
    return isinstance(node, list) and key.isascii() and key.isdigit() and len(key) < 10 and int(key) < len(node)
