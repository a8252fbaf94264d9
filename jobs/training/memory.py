"""How much memory of the host this process may still take: a job on a cluster has less than the machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
# For each version of cgroups: the files with the limit and the use, and the droppable cache's name in memory.stat.
V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_bytes(cgroups: Path = CGROUPS, of_process: Path = Path("/proc/self/cgroup")) -> int:
    """Return the memory that is free on this machine and within the limits of this process's control groups."""
    return min([int(psutil.virtual_memory().available), *_rooms(cgroups, of_process)])


def _rooms(cgroups: Path, of_process: Path) -> Iterator[int]:
    try:
        lines = of_process.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            yield from _upwards(cgroups, path, V2)
        elif "memory" in controllers.split(","):
            yield from _upwards(cgroups / "memory", path, V1)


def _upwards(root: Path, path: str, names: tuple[str, str, str]) -> Iterator[int]:
    """Yield what is left in a group and in each group above it, if it has a limit."""
    limit_name, use_name, cache_name = names
    group = root / path.lstrip("/")
    for folder in (group, *group.parents):
        try:
            limit, use = (folder / limit_name).read_text().strip(), int((folder / use_name).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            if limit != "max":
                yield int(limit) - use + int(stat.get(cache_name, 0))
        except (OSError, ValueError):
            pass  # no such group here, as in a container
        if folder == root:
            return
