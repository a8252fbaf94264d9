"""Pictures that are decoded and resized once on each node, and kept as raw bytes on its own disk.

An entry of this cache is found by a hash of the files' paths, sizes and times and of how they were resized. One process
builds it for all jobs of the node, with loader processes to help, and it appears whole or not at all.
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
from collections.abc import Sequence
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

from jobs.data.images import Statistics, statistics_of
from jobs.errors import JobError

VERSION = 1  # of an entry's format; part of the hash
UNUSED_S = 7 * 86400.0  # entries that were not opened for this long are removed
GROUP = 16  # pictures that a process decodes before it returns them
PIXELS, INDEX, USED = "pixels.bin", "index.json", "used"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

log = logging.getLogger("orch")

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Decoded:
    """A list of RGB pictures, resized."""

    paths: Sequence[Path]
    size: int  # pixels of the shorter side
    shapes: Integers  # (n, 2), heights and widths
    counts: Integers  # (3, 256), how often each value occurs in each channel
    file: Path | None  # all pictures in order, each (height, width, 3) uint8; None: no room, so decode at each read

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def equal(self) -> bool:
        """Whether all pictures have one size."""
        return bool(len(self) and (self.shapes == self.shapes[0]).all())

    @cached_property
    def offsets(self) -> Integers:
        """Where each picture begins in the file, and the file's end, (n + 1,)."""
        return np.concatenate([[0], np.cumsum(self.shapes.prod(axis=1) * 3)])

    @cached_property
    def pixels(self) -> NDArray[np.uint8]:
        """The file's content, flat, loaded as it is read. Writes to it do not reach the file."""
        assert self.file is not None
        return np.memmap(self.file, dtype=np.uint8, mode="c") if self.file.stat().st_size else np.empty(0, np.uint8)

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        """One picture, (height, width, 3)."""
        if self.file is None:
            return decode(self.paths[index], self.size)
        start, end = self.offsets[index], self.offsets[index + 1]
        return self.pixels[start:end].reshape(*self.shapes[index], 3)

    def statistics(self) -> Statistics:
        """Mean and standard deviation of each channel, of values in [0, 1]."""
        return statistics_of(torch.from_numpy(self.counts).double())

    def __getstate__(self) -> dict[str, Any]:
        """Without the mapped file, which another process maps for itself."""
        return {name: value for name, value in self.__dict__.items() if name != "pixels"}


def decode(path: Path, size: int) -> NDArray[np.uint8]:
    """A picture resized to a shorter side of `size` pixels, (height, width, 3), equal to torchvision's Resize.
    Raises JobError, naming the file, if it can't be read."""
    from PIL import Image
    from torchvision.transforms.v2 import functional

    try:
        with Image.open(path) as picture:
            return np.asarray(functional.resize(picture.convert("RGB"), [size]))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise JobError(f"{path} can't be read as a picture: {error}; repair or remove it") from error


def decoded(paths: Sequence[Path], size: int, cores: int = 1) -> Decoded:
    """These pictures, resized to a shorter side of `size` pixels: from this node's cache, or decoded now by `cores`
    processes and cached. If the disk has no room: a warning, and they are decoded each time they are read. Raises
    JobError if a picture can't be read, or if others can write to the cache folder."""
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
            "%d pictures can't be kept decoded (%.1f GB): %s. They are decoded at each read, which is slow; name a "
            "folder with room in TMPDIR",
            len(paths),
            pictures.offsets[-1] / 1e9,
            error,
        )
        return pictures


def _key(paths: Sequence[Path], size: int) -> str:
    """The entry's name: it depends on the files and on how they are decoded."""
    from PIL import __version__ as pillow

    digest = hashlib.sha256(f"{VERSION} {pillow} {size}\n".encode())
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise JobError(f"{path} can't be read: {error.strerror}") from error
        digest.update(f"{path}\0{status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


# --- on the disk


def _folder() -> Path:
    """This user's own folder on a disk of this node: in SLURM_TMPDIR, else in TMPDIR, else in /tmp."""
    slurm = os.environ.get("SLURM_TMPDIR", "")
    parent = slurm if slurm and os.access(slurm, os.W_OK | os.X_OK) else tempfile.gettempdir()
    folder = Path(parent) / f"orch-pictures-{os.getuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o170077 != 0o040000:
        raise JobError(f"{folder} must be a folder of your own that nobody else can open; remove it, or set TMPDIR")
    return folder


def _remove_unused(folder: Path) -> None:
    """Remove entries that no job has opened for a week, and what dead builders have left."""
    for entry in folder.iterdir():
        if entry.suffix == ".lock":
            continue
        used = entry / USED
        with suppress(OSError, Timeout):
            age_s = time.time() - (used if used.exists() else entry).stat().st_mtime
            if age_s < UNUSED_S and not entry.suffix:
                continue
            with FileLock(folder / f"{entry.stem}.lock", timeout=0):  # a living builder holds it
                shutil.rmtree(entry, ignore_errors=True)


def _open(target: Path, paths: Sequence[Path], size: int) -> Decoded | None:
    """The entry; None if there is none, or if it is not complete."""
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
    """Decode all pictures, in order, into the file. Returns their shapes and the counts of their values."""
    groups = [paths[start : start + GROUP] for start in range(0, len(paths), GROUP)]
    processes = min(cores, len(groups)) if cores > 1 else 0
    loader: DataLoader[Any] = DataLoader(
        groups,  # type: ignore[arg-type]  # a list is a data set, too
        batch_size=None,
        collate_fn=partial(_decode_group, size=size),
        num_workers=processes,
        generator=torch.Generator(),
    )
    shapes, counts = [np.empty((0, 2), np.int64)], np.zeros((3, 256), np.int64)
    for group in loader:
        if isinstance(group, str):
            raise JobError(group)
        content, some_shapes, some_counts = group
        shapes.append(some_shapes.numpy())
        counts += some_counts.numpy()
        if file is not None:
            file.write(content.numpy().data)
    return np.concatenate(shapes), counts


def _decode_group(paths: Sequence[Path], size: int) -> list[Tensor] | str:
    """The pictures, flat and in order; their shapes; counts of their values. Or a message, if one is damaged."""
    try:
        pictures = [decode(path, size) for path in paths]
    except JobError as error:
        return str(error)  # if raised here, torch would put this process's traceback into the message
    shapes = np.array([picture.shape[:2] for picture in pictures], np.int64)
    flat = np.concatenate([picture.ravel() for picture in pictures])
    counts = np.array([np.bincount(flat[channel::3], minlength=256) for channel in range(3)], np.int64)
    return [torch.from_numpy(array) for array in (flat, shapes, counts)]
