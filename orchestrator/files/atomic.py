"""Atomic writes: write under a temporary name in the same folder, fsync, rename, fsync the folder."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)  # what os.link raises on file systems without hard links


def publish(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Write a file atomically and durably. If writing fails, raises OSError and leaves `path` unchanged."""
    with filled(path, fill) as temporary:
        os.rename(temporary, path)
    sync_folder(path.parent)


@contextmanager
def filled(path: Path, fill: Callable[[IO[bytes]], object]) -> Iterator[Path]:
    """Write a temporary file beside `path`, durably. The block gives it its name; if it fails, the file is deleted."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with open(temporary, "wb") as target:
            fill(target)
            target.flush()
            os.fsync(target.fileno())
        yield temporary
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def place(temporary: Path, path: Path, replacing: os.stat_result | None = None) -> None:
    """Give a file its name. Raises FileExistsError if the name is in use, even since a moment ago; but the file that
    `replacing` describes (by os.lstat) is replaced if it has not changed since."""
    if replacing is not None and _is_still(path, replacing):
        os.rename(temporary, path)
    else:
        try:
            os.link(temporary, path)  # unlike os.rename, never replaces a file
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            os.rename(temporary, path)
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def _is_still(path: Path, before: os.stat_result) -> bool:
    try:
        now = os.lstat(path)
    except OSError:
        return False
    names = ("st_dev", "st_ino", "st_size", "st_mtime_ns")
    return all(getattr(now, name) == getattr(before, name) for name in names)


def sync_folder(folder: Path) -> None:
    """Make earlier creations, renamings and deletions of files in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
