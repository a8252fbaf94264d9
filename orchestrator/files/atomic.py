"""Atomic writes: write under a temporary name in the same folder, fsync, rename, fsync the folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO


def publish(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Write a file atomically and durably. If writing fails, raises OSError and leaves `path` unchanged."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with open(temporary, "wb") as target:
            fill(target)
            target.flush()
            os.fsync(target.fileno())
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make earlier creations, renamings and deletions of files in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
