"""Finds and signals the processes of a development cluster, and finds ports for them. Linux only.

A process belongs to the cluster if, according to /proc, it has a log file in the cluster's folder open (the daemons and
slurmstepd) or its environment is that of a job of the cluster. No other process is ever signalled. Unlike pid files,
/proc is never out of date, and it also shows slurmstepd, which has no pid file and overwrites its environment.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

# On Debian, the daemons are in folders that are not on a plain user's PATH.
DAEMON_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])
DAEMONS = ("slurmctld", "slurmscriptd", "slurmd", "slurmstepd", "slurmdbd", "mariadbd", "munged")

# program -> its Debian package
PACKAGES = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
ACCOUNTING_PACKAGES = {
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server",
    "mariadb-install-db": "mariadb-server",
}
FAKETIME_LIBRARIES = ("usr/lib/*/faketime/libfaketimeMT.so.1", "usr/lib*/faketime/libfaketimeMT.so.1")

# All ports are below 32768, where Linux's ephemeral ports usually begin: any client may use an ephemeral port briefly.
PORT_BASES = range(17000, 32000, 50)


class DevClusterError(Exception):
    """An operation on the development cluster failed."""


class MissingPackagesError(DevClusterError):
    """Programs that the development cluster needs are not installed."""


@dataclass(frozen=True)
class Process:
    """A running process of the cluster. Zombies are excluded, because they have no open files and no environment."""

    pid: int
    program: str  # one of DAEMONS, or "job" for a process of a batch job
    node: str | None  # set for slurmd, slurmstepd and jobs


def wait_for(condition: Callable[[], T], timeout_s: float, what: str, every_s: float = 0.05) -> T:
    """Poll until the condition is true and return its value. Raises DevClusterError when the time is up."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise DevClusterError(f"waited {timeout_s:g} s for {what}")
        time.sleep(every_s)
    return value


def faketime_library() -> Path | None:
    return next((path for pattern in FAKETIME_LIBRARIES for path in Path("/").glob(pattern)), None)


def check_packages(accounting: bool, faketime: bool) -> None:
    """If a program is missing, raise MissingPackagesError, whose message gives the command that installs it."""
    wanted = PACKAGES | (ACCOUNTING_PACKAGES if accounting else {})
    missing = {name: package for name, package in wanted.items() if not shutil.which(name, path=DAEMON_PATH)}
    if faketime and faketime_library() is None:
        missing["libfaketimeMT.so.1"] = "faketime"
    if missing:
        packages = " ".join(sorted(set(missing.values())))
        raise MissingPackagesError(
            f"not installed: {', '.join(missing)}. On Debian or Ubuntu: apt-get install -y {packages}"
        )


def start_time(pid: int) -> str | None:
    """Return the pid and the process's start in kernel ticks: a unique pair. None if the process does not run."""
    try:
        fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return f"{pid} {fields[19]}" if fields[0] != "Z" else None


def find_processes(folder: Path) -> list[Process]:
    """Return all processes of the cluster in the folder, including those that this process did not start."""
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [process for pid in pids if (process := identify(pid, folder))]


def identify(pid: int, folder: Path) -> Process | None:
    """Return the process if it belongs to the cluster in the folder, else None."""
    proc = Path("/proc", str(pid))
    try:
        name = (proc / "comm").read_text().strip()
        if name in DAEMONS:
            log = _open_log(proc, folder)
            node = log and re.match(r"slurmd-(\w+)\.", log)
            return Process(pid, name, node[1] if node else None) if log else None
        environment = (proc / "environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # the process has ended meanwhile, or belongs to another user
        return None
    variables = dict(item.split("=", 1) for item in environment if "=" in item)
    ours = variables.get("SLURM_CONF") == f"{folder}/etc/slurm.conf" and "SLURM_JOB_ID" in variables
    node_name = variables.get("SLURMD_NODENAME")
    return Process(pid, "job", node_name) if ours and node_name else None


def _open_log(proc: Path, folder: Path) -> str | None:
    """Return the name of a log file of the cluster that the process has open, if any."""
    for descriptor in (proc / "fd").iterdir():
        with contextlib.suppress(OSError):
            target = os.readlink(descriptor)
            if target.startswith(f"{folder}/log/"):
                return target.rpartition("/")[2]
    return None


def send_signal(processes: Iterable[Process], number: signal.Signals, folder: Path) -> None:
    """Signal processes of the cluster. A pid that now belongs to another process is not signalled."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            handle = os.pidfd_open(process.pid)
            try:
                if identify(process.pid, folder) == process:
                    signal.pidfd_send_signal(handle, number)
            finally:
                os.close(handle)


@contextlib.contextmanager
def reserved_ports(count: int, preferred: int | None, fixed: bool) -> Iterator[int]:
    """Yield the first of `count` consecutive free ports: from `preferred` on if free; otherwise others, unless `fixed`.

    Inside the block, no other cluster on this machine chooses these ports, although the daemons open them only seconds
    later. The reservation, a name in Linux's abstract socket namespace, holds for all users and ends with this process.
    """
    spread = os.getpid() % len(PORT_BASES)  # clusters started at the same time try different ports first
    others = [] if fixed else [*PORT_BASES[spread:], *PORT_BASES[:spread]]
    for base in ([] if preferred is None else [preferred]) + others:
        with socket.socket(socket.AF_UNIX) as reservation:
            try:
                reservation.bind(f"\0orch-devcluster-{base}")
            except OSError:
                continue
            if all(_is_free(port) for port in range(base, base + count)):
                yield base
                return
    raise DevClusterError(f"no {count} free ports from {preferred if fixed else PORT_BASES[0]} on")


def listens(address: int | Path) -> bool:
    """Return whether a process accepts connections on this local port or Unix socket."""
    family = socket.AF_INET if isinstance(address, int) else socket.AF_UNIX
    with socket.socket(family) as probe:
        return probe.connect_ex(("127.0.0.1", address) if isinstance(address, int) else str(address)) == 0


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Slurm does; ignores connections in TIME_WAIT
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True
