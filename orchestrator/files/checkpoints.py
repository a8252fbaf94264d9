"""Immutable checkpoint files: write whole or not at all, verify, delete. Knows nothing about torch."""

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

References = Callable[[], tuple[Collection[str], Collection[int]]]  # files that must stay, generations of live claims


@dataclass(frozen=True, slots=True)
class Written:
    """A file that is complete and on the disk."""

    file: str  # its name inside the checkpoints folder
    sha256: str
    size_bytes: int


class HashingWriter:
    """A binary file for writing from front to back, which computes the checksum of what is written."""

    def __init__(self, target: IO[bytes]) -> None:
        self._target = target
        self._hash = hashlib.sha256()
        self.size_bytes = 0
        self.error: OSError | None = None  # a serialiser may raise one of its own in its place

    def write(self, data: bytes | bytearray | memoryview) -> int:
        size = memoryview(data).nbytes  # len counts items, whatever their size
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
    """Publish a checkpoint and, beside it, its record.

    save is given a file to write to, from front to back; record is given what was written. Raises CheckpointError if
    the disk is full or the folder can't be written to; then nothing is left of the checkpoint.
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
            "the folder's permissions; nothing is lost, the chunk is trained again"
        ) from error
    return written


def verify(folder: Path, file: str, sha256: str) -> Path:
    """The path of a checkpoint, whose checksum is this one.

    Raises DamagedCheckpointError if it is missing or differs, CheckpointError if it can't be read just now.
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
            f"{path}: its SHA-256 is {actual[:12]}..., recorded was {sha256[:12]}...; it is damaged"
        )
    return path


def remove(folder: Path, files: Collection[str]) -> None:
    """Delete checkpoints and their records, if they exist. A path that leads out of the folder is ignored."""
    for file in filter(is_file_name, files):
        for name in (file, record_name(file)):
            with contextlib.suppress(OSError):  # a file that can't be deleted now is collected later
                (folder / name).unlink(missing_ok=True)


def collect(folder: Path, references: References) -> list[str]:
    """Delete the files of claims that nothing refers to. Returns their names."""
    unneeded = collectable(folder, references)
    for name in unneeded:
        with contextlib.suppress(OSError):
            (folder / name).unlink(missing_ok=True)
    return unneeded


def collectable(folder: Path, references: References) -> list[str]:
    """The names of the files that `collect` would delete. The folder is listed before the references are read, so a
    file that is published meanwhile is safe."""
    listed = sorted(path.name for path in folder.iterdir())
    files, live_generations = references()
    keep = set(files) | {record_name(file) for file in files}
    return collecting.collectable(listed, keep, live_generations)
