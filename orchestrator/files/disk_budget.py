"""How much of the disk a run takes, and whether its budget ("max_disk_gb") has room for another checkpoint."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO

from orchestrator.errors import NoSpaceError, SettingsError
from orchestrator.files import checkpoints
from orchestrator.messages import counted
from orchestrator.rules import collecting
from orchestrator.rules.checkpoint_names import SUFFIX

GB = 1e9

References = Callable[[], tuple[Collection[str], Collection[int]]]


class _Counter:
    """A file that keeps nothing but its size."""

    def __init__(self) -> None:
        self.size_bytes = 0

    def write(self, data: bytes | bytearray | memoryview) -> int:
        size = memoryview(data).nbytes
        self.size_bytes += size
        return size

    def flush(self) -> None:
        return


def used_bytes(path: Path) -> int:
    """Of a file, or of everything in a folder. What vanishes meanwhile counts nothing."""
    if not path.is_dir():
        return _size(path)
    return sum(_size(Path(folder, name)) for folder, _, names in os.walk(path) for name in names)


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def needed_bytes(files: Path, save: Callable[[IO[bytes]], None]) -> int:
    """Of the next checkpoint: as many as the largest that is there; before there is any, it is counted."""
    largest = max((_size(path) for path in files.glob("*" + SUFFIX)), default=0)
    if largest:
        return largest
    counter = _Counter()
    save(counter)  # type: ignore[arg-type]  # all that a serialiser calls are write and flush
    return counter.size_bytes


def make_room(folder: Path, budget_gb: float, references: References, save: Callable[[IO[bytes]], None]) -> None:
    """See that the run in folder stays within its budget when one more checkpoint is written; files that nothing
    refers to are collected only where they are in the way.

    Raises NoSpaceError, which says how many GB it would take.
    """
    files = folder / "checkpoints"
    needed = needed_bytes(files, save)
    if collecting.fits(used_bytes(folder), needed, budget_gb * GB):
        return
    checkpoints.collect(files, references)
    used = used_bytes(folder)
    if not collecting.fits(used, needed, budget_gb * GB):
        raise NoSpaceError(
            f"max_disk_gb is {budget_gb:g}: the run takes {gb(used)} GB and its next checkpoint {gb(needed)} GB, "
            f"{gb(used + needed)} GB in all. `orch amend {folder.name} --set max_disk_gb=...` allows more, `orch gc "
            f"{folder.name}` deletes what is no longer needed; nothing is lost, the chunk is done again."
        )


def gb(size_bytes: float) -> str:
    """In GB, to three digits, rounded up, so that what is said to be enough is enough."""
    if size_bytes <= 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(size_bytes / GB)))
    return f"{math.ceil(size_bytes / GB * 10**digits) / 10**digits:.{digits}f}"


# --- before a launch


def demand(
    num_models: int, workers: int, budget_gb: float | None, checkpoint_bytes: int | str, folder: Path
) -> tuple[float | None, list[str]]:
    """About how many GB the run's checkpoints will take, None where a checkpoint's size is unknown (checkpoint_bytes
    says why); and lines to tell the user. folder: of the run, which need not be there.

    Raises SettingsError where max_disk_gb is less than that.
    """
    if isinstance(checkpoint_bytes, str):
        return None, [f"disk: unknown, since {checkpoint_bytes}"]
    count = collecting.checkpoints_at_most(num_models, workers)
    wanted = count * checkpoint_bytes
    each = f"about {gb(checkpoint_bytes)} GB each"
    lines = [f"disk: about {gb(wanted)} GB at most, for {counted(count, 'checkpoint')} of {each}"]
    if budget_gb is not None and budget_gb * GB < wanted:
        raise SettingsError(
            f"max_disk_gb: {budget_gb:g} is less than what the run needs, about {gb(wanted)}: {count} "
            f"checkpoints ({num_models} on the board, 2 for each of {counted(workers, 'worker')}) of "
            f"{each}. Allow more, or choose fewer models or workers"
        )
    free = shutil.disk_usage(_existing(folder)).free
    if free < wanted:
        lines.append(f"warning: {_existing(folder)} has {gb(free)} GB free, less than the run needs")
    return wanted / GB, lines


def _existing(folder: Path) -> Path:
    return next(path for path in _upwards(folder.absolute()) if path.is_dir())


def _upwards(folder: Path) -> Iterator[Path]:
    yield folder
    yield from folder.parents
