"""Pictures that are decoded and resized once on each node, and lie there as raw bytes on its own disk.

What is kept is found again by a hash of the files' names, sizes and times and of what was done to them. It is built
by one process for all jobs of the node, with the help of others, and appears whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from jobs.data.images import statistics_of
from jobs.errors import JobError

VERSION = 1  # of what is kept: another one is never read as this one
UNUSED_S = 7 * 86400.0  # after that nobody seems to need it
GROUP = 16  # pictures that a process decodes before it hands them over
PIXELS, INDEX, USED = "pixels.bin", "index.json", "used"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

log = logging.getLogger("orch")

Shape = NDArray[np.int64]


@dataclass(frozen=True)
class Decoded:
    """A list of pictures, each resized to its shorter side, RGB.

    shapes: (n, 2) int64, height and width; counts: (3, 256) int64, how often each value occurs in each channel;
    file: one picture after the other, each (height, width, 3) uint8; None where no disk had room, and each is
    decoded when it is read.
    """

    paths: Sequence[Path]
    size: int
    shapes: Shape
    counts: NDArray[np.int64]
    file: Path | None

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def equal(self) -> bool:
        """Whether all have one size."""
        return bool(len(self) and (self.shapes == self.shapes[0]).all())

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Where each begins, (n + 1,)."""
        return np.concatenate([[0], np.cumsum(self.shapes.prod(axis=1) * 3)])

    @cached_property
    def pixels(self) -> NDArray[np.uint8]:
        """The file's content, flat, in memory only as far as it is read. A write to it does not reach the file."""
        assert self.file is not None
        return np.memmap(self.file, dtype=np.uint8, mode="c") if self.file.stat().st_size else np.empty(0, np.uint8)

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        """One picture, (height, width, 3)."""
        if self.file is None:
            return decode(self.paths[index], self.size)
        start, end = self.offsets[index], self.offsets[index + 1]
        return self.pixels[start:end].reshape(*self.shapes[index], 3)

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel, of values in [0, 1]."""
        return statistics_of(torch.from_numpy(self.counts).double())

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in self.__dict__.items() if name != "pixels"
        }  # another process maps it anew


def decode(path: Path, size: int) -> NDArray[np.uint8]:
    """A picture with a shorter side of so many pixels, (height, width, 3), as torchvision's Resize makes it of a file.

    Raises JobError, naming the file, if it can't be read.
    """
    from PIL import Image
    from torchvision.transforms.v2 import functional

    try:
        with Image.open(path) as picture:
            return np.asarray(functional.resize(picture.convert("RGB"), [size]))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise JobError(f"{path} is no picture that can be read: {error}; mend it or take it away") from error


def decoded(paths: Sequence[Path], size: int, cores: int = 1) -> Decoded:
    """These pictures, resized to a shorter side of size pixels: from what is kept on this node, or decoded now by so
    many processes and kept. Without room on the disk: a warning, and they are decoded each time they are read.

    Raises JobError if a picture can't be read, or if the folder for what is kept is somebody else's.
    """
    paths = [Path(path) for path in paths]
    try:
        folder = _folder()
        _remove_unused(folder)
        target = folder / _key(paths, size)
        with FileLock(f"{target}.lock"):
            found = _open(target, paths, size)
            return found or _build(target, paths, size, cores)
    except OSError as error:
        if error.errno not in (*FULL, errno.EROFS, errno.ENOENT) or isinstance(error, Timeout):
            raise
        shapes, counts = _all(paths, size, cores, None)
        return _unkept(Decoded(paths, size, shapes, counts, None), error)


def _unkept(found: Decoded, error: OSError) -> Decoded:
    log.warning(
        "%d pictures can't be kept decoded (%.1f GB): %s. They are decoded anew each time, which is slow; name a "
        "folder with room in TMPDIR",
        len(found),
        found.offsets[-1] / 1e9,
        error,
    )
    return found


def _key(paths: Sequence[Path], size: int) -> str:
    """Changes with any of the files, and with what is made of them."""
    from PIL import __version__ as pillow

    told = hashlib.sha256(f"{VERSION} {pillow} {size}\n".encode())
    for path in paths:
        try:
            known = path.stat()
        except OSError as error:
            raise JobError(f"{path} can't be read: {error.strerror}") from error
        told.update(f"{path}\0{known.st_size} {known.st_mtime_ns}\n".encode())
    return told.hexdigest()[:32]


# --- on the disk


def _folder() -> Path:
    """This user's own, on a disk of this node: in SLURM_TMPDIR, else in TMPDIR, else in /tmp."""
    slurm = os.environ.get("SLURM_TMPDIR", "")
    place = Path(slurm) if slurm and os.access(slurm, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
    folder = place / f"orch-pictures-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o170077 != 0o040000:
        raise JobError(f"{folder} must be a folder of your own that nobody else can open; remove it, or set TMPDIR")
    return folder


def _remove_unused(folder: Path) -> None:
    """What no job has opened for a week, and what a builder has left that is no more."""
    for entry in folder.iterdir():
        if entry.suffix == ".lock":
            continue
        used = entry / USED
        with suppress(OSError, Timeout):
            age_s = time.time() - (used if used.exists() else entry).stat().st_mtime
            if age_s < UNUSED_S and not entry.suffix:
                continue
            lock = folder / f"{entry.stem}.lock"
            with FileLock(lock, timeout=0):  # its builder lives as long as this is held
                shutil.rmtree(entry, ignore_errors=True)


def _open(target: Path, paths: Sequence[Path], size: int) -> Decoded | None:
    """What is kept there; None if there is nothing, or not all of it."""
    try:
        index = json.loads((target / INDEX).read_text(encoding="utf-8"))
        shapes, counts = (np.array(index[name], np.int64) for name in ("shapes", "counts"))
        found = Decoded(paths, size, shapes.reshape(-1, 2), counts, target / PIXELS)
        if len(found.shapes) == len(paths) and (target / PIXELS).stat().st_size == found.offsets[-1]:
            (target / USED).touch()
            return found
    except (OSError, ValueError, KeyError):
        pass
    return None


def _build(target: Path, paths: Sequence[Path], size: int, cores: int) -> Decoded:
    started = time.monotonic()
    part = target.with_suffix(".part")
    for old in (part, target):
        shutil.rmtree(old, ignore_errors=True)
    part.mkdir(mode=0o700)
    try:
        with (part / PIXELS).open("wb", buffering=0) as file:
            writer = _Writer(file)
            shapes, counts = _all(paths, size, cores, writer)
            if writer.full is None:
                index = {"shapes": shapes.tolist(), "counts": counts.tolist()}
                (part / INDEX).write_text(json.dumps(index), encoding="utf-8")
                (part / USED).touch()
                os.fsync(file.fileno())
        if writer.full is not None:
            return _unkept(Decoded(paths, size, shapes, counts, None), writer.full)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    made = Decoded(paths, size, shapes, counts, target / PIXELS)
    log.info("decoded %d pictures (%.1f GB) in %.0f s", len(paths), made.offsets[-1] / 1e9, time.monotonic() - started)
    return made


class _Writer:
    """Goes on without writing where the disk is full: sizes and statistics are needed all the same."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.full: OSError | None = None

    def __call__(self, content: NDArray[np.uint8]) -> None:
        view = memoryview(content.data)
        try:
            while self.full is None and view:
                view = view[self._file.write(view) :]
        except OSError as error:
            if error.errno not in FULL:
                raise
            self.full = error


def _all(
    paths: Sequence[Path], size: int, cores: int, write: _Writer | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Decode all, in order. Returns their shapes and the counts of their values."""
    shapes, counts = [np.empty((0, 2), np.int64)], np.zeros((3, 256), np.int64)
    for group in _groups(paths, size, cores):
        if isinstance(group, str):
            raise JobError(group)
        content, some_shapes, some_counts = group
        shapes.append(some_shapes.numpy())
        counts += some_counts.numpy()
        if write is not None:
            write(content.numpy())
    return np.concatenate(shapes), counts


def _groups(paths: Sequence[Path], size: int, cores: int) -> Iterator[Any]:
    groups = [paths[start : start + GROUP] for start in range(0, len(paths), GROUP)]
    processes = min(cores, len(groups)) if cores > 1 else 0
    return iter(DataLoader(_Groups(groups, size), batch_size=None, num_workers=processes, generator=torch.Generator()))


class _Groups(Dataset[Any]):
    """The pictures of a group one after the other, flat; their shapes; the counts of their values. Or what is wrong."""

    def __init__(self, groups: Sequence[Sequence[Path]], size: int) -> None:
        self._groups, self._size = groups, size

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]] | str:
        try:
            pictures = [decode(path, self._size) for path in self._groups[index]]
        except JobError as error:
            return str(error)  # raised here it would come with this process's traceback as its message
        shapes = np.array([picture.shape[:2] for picture in pictures], np.int64)
        flat = np.concatenate([picture.ravel() for picture in pictures])
        counts = [np.bincount(flat[channel::3], minlength=256) for channel in range(3)]
        return flat, shapes, np.array(counts, np.int64)
