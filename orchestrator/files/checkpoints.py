"""Immutable files: write whole or not at all, verify, read, collect. Knows nothing of torch.

A file appears under its final name only when every byte of it is on the disk:
temporary name in the same folder, fsync, rename, fsync of the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from orchestrator.errors import CheckpointError, DamagedCheckpointError
from orchestrator.files.atomic import publish
from orchestrator.rules import collecting

SUFFIX = ".pt"
RECORD_SUFFIX = ".json"
OF_THE_LAST = ("ancestors", "launched_at", "import_paths")  # of a record: what an ancestor's need not repeat
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Written:
    """A file that is complete and on the disk."""

    file: str  # its name inside the checkpoints folder
    sha256: str
    size_bytes: int


class _HashingWriter:
    """A binary file for writing in one go, which knows the checksum of what went through it."""

    def __init__(self, target: IO[bytes]) -> None:
        self._target = target
        self._hash = hashlib.sha256()
        self.size_bytes = 0
        self.error: OSError | None = None  # a serialiser may turn it into one of its own

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


def write(folder: Path, stem: str, save: Callable[[IO[bytes]], None], record: Mapping[str, Any]) -> Written:
    """Publish a checkpoint and, beside it, its record as JSON, from which the board can be rebuilt.

    save is given a file to write to, from front to back. Raises CheckpointError where the disk is full or
    the folder can't be written; then nothing is left of it.
    """
    file = stem + SUFFIX
    writers: list[_HashingWriter] = []

    def fill(target: IO[bytes]) -> None:
        writers.append(_HashingWriter(target))
        save(writers[0])  # type: ignore[arg-type]  # all that a serialiser calls are write and flush

    try:
        publish(folder / file, fill)
        written = Written(file, writers[0].sha256, writers[0].size_bytes)
        whole = {**_plain(record), "file": file, "sha256": written.sha256, "size_bytes": written.size_bytes}
        text = json.dumps(whole, indent=1, allow_nan=False, sort_keys=True)
        publish(folder / (stem + RECORD_SUFFIX), lambda target: target.write(text.encode()))
    except BaseException as error:
        remove(folder, [file])
        cause = error if isinstance(error, OSError) else writers[0].error if writers else None
        if cause is None:
            raise
        raise CheckpointError(
            f"{folder / file}: can't be written: {cause.strerror or cause}. Free some space (`orch gc`) or mend "
            "the folder's rights; nothing is lost, the chunk is done again."
        ) from error
    return written


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for a measure that is not finite."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_name(file: str) -> bool:
    """Of a file in a folder, and not a path that leads out of it: names come from databases and records, which may be
    damaged."""
    return file not in ("", ".", "..") and not {"/", "\0"} & set(file)


def verify(folder: Path, file: str, sha256: str) -> Path:
    """The path of a checkpoint whose bytes are those that were written.

    Raises DamagedCheckpointError if it is missing or differs, CheckpointError if it can't be read just now.
    """
    path = folder / file
    if not _is_name(file):
        raise DamagedCheckpointError(f"{file[:100]!r} is no name of a file in {folder}; what says so is damaged")
    try:
        with open(path, "rb") as source:
            found = hashlib.file_digest(source, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{path} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    if found != sha256:
        raise DamagedCheckpointError(
            f"{path}: its SHA-256 is {found[:12]}..., recorded was {sha256[:12]}...; it is damaged"
        )
    return path


def read_record(folder: Path, file: str) -> dict[str, Any]:
    """The JSON beside a checkpoint. Raises CheckpointError if it is missing or not one."""
    path = folder / (file.removesuffix(SUFFIX) + RECORD_SUFFIX)
    if not _is_name(file):
        raise CheckpointError(f"{file[:100]!r} is no name of a file in {folder}; what says so is damaged")
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a checkpoint's record: {error}") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{path}: not a checkpoint's record: it holds {type(record).__name__}")
    return record


def ancestors(folder: Path, parent_file: str | None) -> list[dict[str, Any]]:
    """The records of a checkpoint's line, its founder first and its parent last, as far as they are known. Each
    record holds them, since the ancestors' own files are collected when they have left the board."""
    if parent_file is None:
        return []
    try:
        parent = read_record(folder, parent_file)
    except CheckpointError:
        return []
    told = parent.get("ancestors")
    line = [one for one in told if isinstance(one, dict)] if isinstance(told, list) else []
    return [*line, {key: value for key, value in parent.items() if key not in OF_THE_LAST}]


def remove(folder: Path, files: Collection[str]) -> None:
    """Delete checkpoints and their records, as far as they are there; a path that leads elsewhere is not."""
    for file in filter(_is_name, files):
        for name in (file, file.removesuffix(SUFFIX) + RECORD_SUFFIX):
            with contextlib.suppress(OSError):  # what can't be deleted now is collected later
                (folder / name).unlink(missing_ok=True)


def collect(folder: Path, references: Callable[[], tuple[Collection[str], Collection[int]]]) -> list[str]:
    """Delete every file of ours that nothing refers to; their names.

    references gives the files that must stay and the generations of live claims. It is called after the
    folder was listed: a file that is published meanwhile is not in the list, and so is safe.
    """
    doomed = collectable(folder, references)
    for name in doomed:
        with contextlib.suppress(OSError):
            (folder / name).unlink(missing_ok=True)
    return doomed


def collectable(folder: Path, references: Callable[[], tuple[Collection[str], Collection[int]]]) -> list[str]:
    """The names of the files that `collect` would delete."""
    listed = sorted(path.name for path in folder.iterdir())
    files, live_generations = references()
    keep = set(files) | {f.removesuffix(SUFFIX) + RECORD_SUFFIX for f in files}
    return collecting.collectable(listed, keep, live_generations)
