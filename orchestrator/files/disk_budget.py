"""The disk space that a run takes, and whether its budget ("max_disk_gb") has room for another checkpoint."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO

from orchestrator.errors import NoSpaceError, SettingsError
from orchestrator.files import checkpoints
from orchestrator.files.checkpoints import HashingWriter, References
from orchestrator.files.run_folder import CHECKPOINTS, nearest_folder
from orchestrator.messages import GB, counted, gb
from orchestrator.rules import collecting
from orchestrator.rules.checkpoint_names import SUFFIX


def used_bytes(path: Path) -> int:
    """Return the size of a file, or of all files in a folder. Files deleted meanwhile count as 0."""
    if not path.is_dir():
        return _size(path)
    return sum(_size(Path(folder, name)) for folder, _, names in os.walk(path) for name in names)


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def needed_bytes(files: Path, save: Callable[[IO[bytes]], None]) -> int:
    """Predict the next checkpoint's size: the largest size so far or, if there is none, the size of save's output."""
    largest = max((_size(path) for path in files.glob("*" + SUFFIX)), default=0)
    if largest:
        return largest
    with open(os.devnull, "wb") as nothing:
        writer = HashingWriter(nothing)
        save(writer)  # type: ignore[arg-type]  # serialisers only call write and flush
    return writer.size_bytes


def make_room(folder: Path, budget_gb: float, references: References, save: Callable[[IO[bytes]], None]) -> None:
    """Make sure that the run's budget has room for one more checkpoint. Deletes unreferenced files only if needed.

    Raises NoSpaceError if there is no room; the message says how many GB the run would need.
    """
    files = folder / CHECKPOINTS
    needed = needed_bytes(files, save)
    if collecting.fits(used_bytes(folder), needed, budget_gb * GB):
        return
    checkpoints.collect(files, references)
    used = used_bytes(folder)
    if not collecting.fits(used, needed, budget_gb * GB):
        raise NoSpaceError(
            f"max_disk_gb is {budget_gb:g}: the run takes {gb(used)} GB and its next checkpoint {gb(needed)} GB, "
            f"{gb(used + needed)} GB in all. `orch amend {folder.name} --set max_disk_gb=...` allows more, `orch gc "
            f"{folder.name}` deletes unneeded files; nothing is lost, and the chunk is trained again."
        )


# --- before a launch


def demand(
    num_models: int, workers: int, budget_gb: float | None, checkpoint_bytes: int | str, folder: Path
) -> tuple[float | None, list[str]]:
    """Estimate how many GB the run's checkpoints will take. Returns (the estimate or None, lines for the user).

    checkpoint_bytes: size of a checkpoint, or a text that says why the size is unknown. folder: the run's folder, which
    may not exist yet. Raises SettingsError if max_disk_gb is less than the estimate.
    """
    if isinstance(checkpoint_bytes, str):
        return None, [f"disk: unknown, because {checkpoint_bytes}"]
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
    folder = nearest_folder(folder)
    if (free := shutil.disk_usage(folder).free) < wanted:
        lines.append(f"warning: {folder} has {gb(free)} GB free, less than the run needs")
    return wanted / GB, lines
