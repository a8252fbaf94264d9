"""Immutable checkpoint files: write atomically, verify, delete. Independent of torch."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from orchestrator.errors import CheckpointError, DamagedCheckpointError
from orchestrator.files.atomic import publish
from orchestrator.files.checkpoint_record import CheckpointRecord
from orchestrator.rules import collecting
from orchestrator.rules.checkpoint_names import SUFFIX, is_file_name, record_name

References = Callable[[], tuple[Collection[str], Collection[int]]]  # returns files to keep, generations of live claims


@dataclass(frozen=True, slots=True)
class Written:
    """A checkpoint file that has been written completely and durably."""

    file: str  # its name inside the checkpoints folder
    sha256: str
    size_bytes: int


class HashingWriter:
    """A binary file for sequential writing that computes the checksum of the data."""

    def __init__(self, target: IO[bytes]) -> None:
        self._target = target
        self._hash = hashlib.sha256()
        self.size_bytes = 0
        self.error: OSError | None = None  # kept, since the serialiser may raise an error of its own instead

    def write(self, data: bytes | bytearray | memoryview) -> int:
        size = memoryview(data).nbytes  # in bytes; len would count items
        self._hash.update(data)
        self.size_bytes += size
        try:
            self._target.write(data)
        except OSError as error:
            self.error = error
            raise
        return size

    def flush(self) -> None:
        self._target.flush()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


def write(
    folder: Path, stem: str, save: Callable[[IO[bytes]], None], record: Callable[[Written], CheckpointRecord]
) -> Written:
    """Publish a checkpoint and its record.

    save: writes the checkpoint sequentially to the file that it gets. record: makes the record of the written file.
    Raises CheckpointError, and leaves neither file, if the disk is full or the folder is not writable.
    """
    file = stem + SUFFIX
    writers: list[HashingWriter] = []

    def fill(target: IO[bytes]) -> None:
        writers.append(HashingWriter(target))
        save(writers[0])  # type: ignore[arg-type]  # serialisers call only write and flush

    try:
        publish(folder / file, fill)
        written = Written(file, writers[0].sha256, writers[0].size_bytes)
        text = record(written).to_json()
        publish(folder / record_name(file), lambda target: target.write(text.encode()))
    except BaseException as error:
        remove(folder, [file])
        cause = error if isinstance(error, OSError) else writers[0].error if writers else None
        if cause is None:
            raise
        raise CheckpointError(
            f"{folder / file}: can't be written: {cause.strerror or cause}. Free some space (`orch gc`) or correct "
            "the folder's permissions; nothing is lost, and the chunk is trained again"
        ) from error
    return written


def verify(folder: Path, file: str, sha256: str) -> Path:
    """Check a checkpoint's checksum and return its path.

    Raises DamagedCheckpointError if the file is missing or its checksum differs, and CheckpointError if the file can't
    be read at present.
    """
    path = folder / file
    if not is_file_name(file):
        raise DamagedCheckpointError(
            f"{file[:100]!r} does not name a file in {folder}; the database or a record is damaged"
        )
    try:
        with open(path, "rb") as source:
            actual = hashlib.file_digest(source, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{path} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    if actual != sha256:
        raise DamagedCheckpointError(
            f"{path} is damaged: its SHA-256 is {actual[:12]}..., but {sha256[:12]}... was recorded"
        )
    return path


def remove(folder: Path, files: Collection[str]) -> None:
    """Delete checkpoints and their records, if they exist. Ignores paths that lead out of the folder."""
    for file in filter(is_file_name, files):
        for name in (file, record_name(file)):
            with contextlib.suppress(OSError):  # a file that can't be deleted now is collected later
                (folder / name).unlink(missing_ok=True)


def collect(folder: Path, references: References) -> list[str]:
    """Delete checkpoint files that nothing refers to. Returns their names."""
    unneeded = collectable(folder, references)
    for name in unneeded:
        with contextlib.suppress(OSError):
            (folder / name).unlink(missing_ok=True)
    return unneeded


def collectable(folder: Path, references: References) -> list[str]:
    """Return the names of the files that `collect` would delete. Lists the folder before it reads the references, so
    that a file published in between is not deleted."""
    listed = sorted(path.name for path in folder.iterdir())
    files, live_generations = references()
    keep = set(files) | {record_name(file) for file in files}
    return collecting.collectable(listed, keep, live_generations)
