"""A lock made of files, for file systems whose flock does not work between nodes.

filelock's `StrictSoftFileLock` decides which process holds the lock: each process publishes a claim under a unique name
with a hard link, which the server creates atomically. filelock itself keeps the claims of dead processes. `SoftLock`
removes a claim if its process is proven dead: the process ran on this host since the last boot, and no process now has
its pid and start time. Claim names are never reused, so several processes can remove the same dead claim without
removing a live one. Claims from other hosts are never removed, and no claim is removed because of its age.

Waiting processes get the lock in no particular order and some milliseconds late, so flock is better where it works.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import time
from pathlib import Path
from typing import Self

import psutil
from filelock import SoftFileLockProtocolError, StrictSoftFileClaim, StrictSoftFileLock, Timeout

from orchestrator.errors import LockError
from orchestrator.locking.flock import Lock

DEAD_CHECK_S = 0.5  # while waiting for the lock: the time between two checks for dead claims
POLL_S = 0.01
_TICK_BITS = 64  # in a claim's `start`, the lower 64 bits count clock ticks since the boot; the rest is the boot's id


class HeldError(Timeout):
    """Another process held the lock for the whole wait. The message names the process and says what to do."""

    def __init__(self, lock_file: str, advice: str = "") -> None:
        super().__init__(lock_file)
        self.advice = advice

    def __str__(self) -> str:
        return self.advice


class SoftLock(Lock):
    """A lock made of files; see the module's docstring."""

    def __init__(self, lock_file: str | os.PathLike[str], timeout: float) -> None:
        super().__init__(lock_file, timeout)
        self._inner = StrictSoftFileLock(self.lock_file, poll_interval=POLL_S)

    @property
    def is_locked(self) -> bool:
        return self._inner.is_locked

    def acquire(self, timeout: float | None = None) -> Self:
        """Raises HeldError, OSError, and LockError if the lock's files are damaged or hard links do not work."""
        timeout = self.timeout if timeout is None else timeout
        end = None if timeout < 0 else time.monotonic() + timeout
        while True:
            left = DEAD_CHECK_S if end is None else max(0.0, end - time.monotonic())
            try:
                self._inner.acquire(timeout=min(left, DEAD_CHECK_S))
                return self
            except Timeout:
                removed = self._remove_dead_claims()
            except SoftFileLockProtocolError as error:
                raise LockError(
                    f"{error}. If no process of this run is alive on any node, remove {self.lock_file} and "
                    f"{self.lock_file}.filelock and try again"
                ) from error
            if end is not None and time.monotonic() >= end and not removed:
                raise HeldError(self.lock_file, self._advice(timeout))

    def release(self) -> None:
        self._inner.release()

    def _remove_dead_claims(self) -> bool:
        """Remove the claims of processes that are proven dead. Returns whether a claim was removed."""
        removed = False
        for claim in filter(is_dead, self._claims()):
            # FileNotFoundError: already removed. PermissionError: only processes of the claim's user can remove it.
            with contextlib.suppress(FileNotFoundError, PermissionError):
                self._inner.force_break(claim.name)
                removed = True
        return removed

    def _claims(self) -> tuple[StrictSoftFileClaim, ...]:
        try:
            return self._inner.claims
        except SoftFileLockProtocolError:
            return ()  # the next attempt to acquire the lock raises this error

    def _advice(self, waited_s: float) -> str:
        """Say which process holds the lock, and what to do."""
        claims = self._claims()
        held = [claim for claim in claims if claim.state == "held"] or claims
        if not held:
            return f"{self.lock_file} could not be acquired within {waited_s:.0f} s: many processes want it; try again"
        holder = held[0]
        files = Path(f"{self.lock_file}.filelock") / "claims" / f"*{holder.token}.claim"
        return (
            f"{self.lock_file} was held for {waited_s:.0f} s by process {holder.pid} on {holder.hostname}. A lock is "
            "never removed because of its age. Check whether that process is stopped. If it is dead "
            f"(`ssh {holder.hostname.partition('?')[0]} ps -p {holder.pid}`; is its job still in squeue?), remove its "
            f"claim: rm {files}"
        )


def is_dead(claim: StrictSoftFileClaim) -> bool:
    """Return whether the process that made this claim is proven dead. This can't be proven if the process ran on
    another host or in another boot or pid namespace, or if its start time is not known."""
    own = _own_claim(os.getpid())
    if claim.hostname != own.hostname or claim.start is None or own.start is None:
        return False
    if not own.start >> _TICK_BITS or claim.start >> _TICK_BITS != own.start >> _TICK_BITS:
        return False
    started_at = psutil.Process(own.pid).create_time() + (claim.start - own.start) / os.sysconf("SC_CLK_TCK")
    try:
        process = psutil.Process(claim.pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return True
        return bool(abs(process.create_time() - started_at) > 0.5)
    except psutil.AccessDenied:
        return False
    except psutil.NoSuchProcess:
        return not psutil.pid_exists(claim.pid)  # /proc may hide other users' processes


@functools.cache
def _own_claim(pid: int) -> StrictSoftFileClaim:
    """Return a claim of this process, as filelock writes it. pid: the cache's key, since a fork needs its own claim."""
    with tempfile.TemporaryDirectory(prefix="orch-") as folder:
        lock = StrictSoftFileLock(Path(folder) / "lock", timeout=10)
        with lock:
            return lock.claims[0]
