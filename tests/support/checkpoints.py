"""Checkpoints with records, for tests in which most of a record's values do not matter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from orchestrator.files import checkpoints
from orchestrator.files.checkpoint_record import CheckpointRecord
from orchestrator.files.checkpoints import Written
from orchestrator.rules.checkpoint_names import chunk_of, generation_of


def record_of(**fields: Any) -> Callable[[Written], CheckpointRecord]:
    """Return the function that `checkpoints.write` calls to make the record; it has these fields."""

    def record(written: Written) -> CheckpointRecord:
        values = {
            "kind": "candidate", "worker": 0, "position": 0, "profile": "a", "parent_file": None, "created_at": 1.0,
            "score": 0.5, "chunk": chunk_of(written.file), "generation": generation_of(written.file),
        }  # fmt: skip
        return CheckpointRecord.model_validate(values | asdict(written) | fields)

    return record


def write(folder: Path, stem: str, save: Callable[[IO[bytes]], Any], **fields: Any) -> Written:
    return checkpoints.write(folder, stem, save, record_of(**fields))
