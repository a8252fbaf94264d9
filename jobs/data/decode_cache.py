"""Decode and resize pictures once per node, and cache them as raw bytes on the node's local disk.

The key of a cache entry is a hash of the files' paths, sizes, modification times and the target size. One process (with
loader processes) builds an entry for all jobs of the node, and publishes it atomically.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from jobs.data.decoding import UnreadableError, check, decode, unreadable
from jobs.data.images import Statistics, statistics_of
from jobs.errors import FULL_DISK, JobError

VERSION = 2  # of the entry format and of how pictures are decoded; part of the hash
UNUSED_S = 7 * 86400.0  # entries not opened for this long are removed
GROUP = 16  # number of pictures that a process decodes at a time
MANY = 2000  # pictures whose check takes so long that the user is told of it
PIXELS, INDEX, USED = "pixels.bin", "index.json", "used"
FULL = (*FULL_DISK, errno.EFBIG)

log = logging.getLogger("orch")

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Decoded:
    """A list of RGB pictures, resized."""

    paths: Sequence[Path]
    size: int  # length of the shorter side in pixels
    shapes: Integers  # (n, 2), heights and widths
    counts: Integers  # (3, 256), how often each pixel value occurs in each channel
    file: Path | None  # all pictures in order, each (height, width, 3) uint8; None (disk full): decode on every read

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def equal(self) -> bool:
        """Whether all pictures have the same size."""
        return bool(len(self) and (self.shapes == self.shapes[0]).all())

    @cached_property
    def offsets(self) -> Integers:
        """Byte offset of each picture in the file, followed by the file's size, (n + 1,)."""
        return np.concatenate([[0], np.cumsum(self.shapes.prod(axis=1) * 3)])

    @cached_property
    def pixels(self) -> NDArray[np.uint8]:
        """The file's content as a flat memory map. Writes to the array do not change the file."""
        assert self.file is not None
        return np.memmap(self.file, dtype=np.uint8, mode="c") if self.file.stat().st_size else np.empty(0, np.uint8)

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        """Return one picture, (height, width, 3)."""
        if self.file is None:
            return decode(self.paths[index], self.size)
        start, end = self.offsets[index], self.offsets[index + 1]
        return self.pixels[start:end].reshape(*self.shapes[index], 3)

    def statistics(self) -> Statistics:
        """Return mean and standard deviation of each channel, with pixels scaled to [0, 1]."""
        return statistics_of(torch.from_numpy(self.counts).double())

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the memory map; each process maps the file itself."""
        return {name: value for name, value in self.__dict__.items() if name != "pixels"}


def decoded(paths: Sequence[Path], size: int, cores: int = 1) -> Decoded:
    """Return these pictures, resized to a shorter side of `size` pixels, from this node's cache. If they are not cached
    yet, `cores` processes decode them. If the disk is full, logs a warning, and pictures are decoded on every read.
    Raises JobError that names all pictures that can't be read, or if other users can access the cache folder."""
    paths = [Path(path) for path in paths]
    try:
        folder = _folder()
        _remove_unused(folder)
        target = folder / _key(paths, size)
        with FileLock(f"{target}.lock"):
            cached = _open(target, paths, size)
            return _build(target, paths, size, cores) if cached is None else cached
    except OSError as error:
        if error.errno not in (*FULL, errno.EROFS, errno.ENOENT):
            raise
        shapes, counts = _decode_all(paths, size, cores)
        pictures = Decoded(paths, size, shapes, counts, None)
        log.warning(
            "%d decoded pictures (%.1f GB) can't be cached: %s. They are decoded at each read, which is slow; set "
            "TMPDIR to a folder with enough space",
            len(paths),
            pictures.offsets[-1] / 1e9,
            error,
        )
        return pictures


def verify(lists: Sequence[Sequence[Path]], size: int, cores: int = 1) -> int:
    """Check that `decoded` can read all pictures of these lists; `cores` processes decode them without caching them.
    Lists that are in this node's cache or were verified before are not read again. Returns the number of pictures read.
    Raises JobError that names all pictures that can't be read, or if other users can access the cache folder."""
    folder: Path | None = None
    try:
        folder = _folder()
        _remove_unused(folder)
    except OSError as error:
        if error.errno not in (*FULL, errno.EROFS, errno.ENOENT):
            raise
    todo = [paths for paths in lists if folder is None or not _is_verified(folder, paths, size)]
    all_paths = [Path(path) for paths in todo for path in paths]
    if len(all_paths) >= MANY:
        log.warning("reading %d pictures to find damaged ones; this is done once, until a file changes", len(all_paths))
    problems = [line for group in _each_group(all_paths, cores, partial(_check_group, size=size)) for line in group]
    if problems:
        raise unreadable(problems, len(all_paths))
    for mark in [_mark(folder, paths, size) for paths in todo] if folder else ():
        with suppress(OSError):  # a full disk: verified again the next time
            mark.mkdir(mode=0o700, exist_ok=True)
            (mark / USED).touch()
    return len(all_paths)


def _is_verified(folder: Path, paths: Sequence[Path], size: int) -> bool:
    with suppress(OSError):
        if (mark := _mark(folder, paths, size)).is_dir():
            (mark / USED).touch()
            return True
    return _open(folder / _key(paths, size), paths, size) is not None


def _mark(folder: Path, paths: Sequence[Path], size: int) -> Path:
    """Return the folder that exists once these pictures have been verified."""
    return folder / f"verified-{_key(paths, size)}"


def _key(paths: Sequence[Path], size: int) -> str:
    """Return the entry's name, a hash of the files and of how they are decoded."""
    from PIL import __version__ as pillow

    digest = hashlib.sha256(f"{VERSION} {pillow} {size}\n".encode())
    for path in map(Path, paths):
        digest.update(os.fsencode(path))  # a file's name may be any bytes
        try:
            status = path.stat()
            digest.update(f"\0{status.st_size} {status.st_mtime_ns}\n".encode())
        except OSError:
            digest.update(b"\0missing\n")  # decoding it names the file
    return digest.hexdigest()[:32]


# --- cache files


def _folder() -> Path:
    """Return this user's private folder on a local disk: in SLURM_TMPDIR, else in TMPDIR, else in /tmp."""
    slurm = os.environ.get("SLURM_TMPDIR", "")
    parent = slurm if slurm and os.access(slurm, os.W_OK | os.X_OK) else tempfile.gettempdir()
    folder = Path(parent) / f"orch-pictures-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o170077 != 0o040000:
        raise JobError(f"{folder} must be a folder that only you can open (mode 700); remove it, or set TMPDIR")
    return folder


def _remove_unused(folder: Path) -> None:
    """Remove entries that no job has opened for a week, and unfinished entries of dead builders."""
    for entry in folder.iterdir():
        if entry.suffix == ".lock":
            continue
        used = entry / USED
        with suppress(OSError, Timeout):
            age_s = time.time() - (used if used.exists() else entry).stat().st_mtime
            if age_s < UNUSED_S and not entry.suffix:
                continue
            with FileLock(folder / f"{entry.stem}.lock", timeout=0):  # Timeout: a builder holds it; keep the entry
                shutil.rmtree(entry, ignore_errors=True)


def _open(target: Path, paths: Sequence[Path], size: int) -> Decoded | None:
    """Open the entry; return None if it is missing or incomplete."""
    try:
        index = json.loads((target / INDEX).read_text(encoding="utf-8"))
        shapes, counts = (np.array(index[name], np.int64) for name in ("shapes", "counts"))
        pictures = Decoded(paths, size, shapes.reshape(-1, 2), counts, target / PIXELS)
        if len(pictures.shapes) == len(paths) and (target / PIXELS).stat().st_size == pictures.offsets[-1]:
            (target / USED).touch()
            return pictures
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
        with (part / PIXELS).open("wb") as file:
            shapes, counts = _decode_all(paths, size, cores, file)
            file.flush()
            os.fsync(file.fileno())
        index = {"shapes": shapes.tolist(), "counts": counts.tolist()}
        (part / INDEX).write_text(json.dumps(index), encoding="utf-8")
        (part / USED).touch()
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    made = Decoded(paths, size, shapes, counts, target / PIXELS)
    log.info("decoded %d pictures (%.1f GB) in %.0f s", len(paths), made.offsets[-1] / 1e9, time.monotonic() - started)
    return made


def _decode_all(
    paths: Sequence[Path], size: int, cores: int, file: IO[bytes] | None = None
) -> tuple[Integers, Integers]:
    """Decode all pictures in order, and write them to `file` if given. Returns `shapes` and `counts` as in Decoded."""
    shapes, counts = [np.empty((0, 2), np.int64)], np.zeros((3, 256), np.int64)
    problems: list[str] = []
    for lines, arrays in _each_group(paths, cores, partial(_decode_group, size=size)):
        problems += lines
        if problems:
            continue  # find the others
        content, some_shapes, some_counts = arrays
        shapes.append(some_shapes.numpy())
        counts += some_counts.numpy()
        if file is not None:
            file.write(content.numpy().data)
    if problems:
        raise unreadable(problems, len(paths))
    return np.concatenate(shapes), counts


def _each_group(paths: Sequence[Path], cores: int, work: Callable[[Sequence[Path]], Any]) -> Iterator[Any]:
    """Call `work` with groups of the pictures in `cores` processes, and return the results in order."""
    groups = [paths[start : start + GROUP] for start in range(0, len(paths), GROUP)]
    processes = min(cores, len(groups))
    loader: DataLoader[Any] = DataLoader(
        groups,  # type: ignore[arg-type]  # DataLoader accepts a list as a data set
        batch_size=None,
        collate_fn=partial(_without_memory_errors, work=work),
        num_workers=processes if processes > 1 else 0,
        generator=torch.Generator(),
    )
    for result in loader:
        if isinstance(result, MemoryError):
            raise result
        yield result


def _without_memory_errors(paths: Sequence[Path], work: Callable[[Sequence[Path]], Any]) -> Any:
    try:
        return work(paths)
    except MemoryError as error:
        return error  # if raised, torch would add this process's traceback to the message


def _check_group(paths: Sequence[Path], size: int) -> list[str]:
    """Return a line for each picture that can't be read."""
    problems = []
    for path in paths:
        try:
            check(path, size)
        except UnreadableError as error:
            problems.append(error.line)
    return problems


def _decode_group(paths: Sequence[Path], size: int) -> tuple[list[str], list[Tensor]]:
    """Return a line for each picture that can't be read, and if there are none, the pictures' flattened pixels, shapes
    and value counts."""
    pictures: list[NDArray[np.uint8]] = []
    problems = []
    for path in paths:
        try:
            pictures.append(decode(path, size))
        except UnreadableError as error:
            problems.append(error.line)
    if problems:
        return problems, []
    shapes = np.array([picture.shape[:2] for picture in pictures], np.int64)
    flat = np.concatenate([picture.ravel() for picture in pictures])
    counts = np.array([np.bincount(flat[channel::3], minlength=256) for channel in range(3)], np.int64)
    return [], [torch.from_numpy(array) for array in (flat, shapes, counts)]
