"""What must stay the same during a run, such as its data: JSON files, written once by the first process."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from orchestrator.files.atomic import place, publish
from orchestrator.files.run_folder import FINGERPRINTS


def kept(run_folder: Path, name: str) -> dict[str, Any] | None:
    """Return what the run's folder has under a name; None if nothing was kept. Raises OSError."""
    try:
        facts: dict[str, Any] = json.loads(_file(run_folder, name).read_bytes())
    except FileNotFoundError:
        return None
    return facts


def keep(run_folder: Path, name: str, facts: Mapping[str, Any]) -> None:
    """Write facts to the run's folder, unless another process has done so before. Raises OSError."""
    file = _file(run_folder, name)
    file.parent.mkdir(exist_ok=True)
    own = file.with_name(f".{name}-{secrets.token_hex(8)}")  # processes of several nodes may have the same pid
    publish(own, lambda target: target.write(json.dumps(facts, indent=1).encode()))
    try:
        with suppress(FileExistsError):
            place(own, file)
    finally:
        own.unlink(missing_ok=True)


def _file(run_folder: Path, name: str) -> Path:
    return run_folder / FINGERPRINTS / f"{name}.json"
