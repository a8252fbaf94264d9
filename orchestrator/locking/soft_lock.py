"""A lock made of files, for file systems whose flock does not reach every node.

filelock's `StrictSoftFileLock` decides who holds it: each process publishes a claim under a name of its own by a
hard link, which a server makes once or not at all. filelock never breaks such a claim. Here a claim is removed when
its process is proven dead: it ran on this host, since this boot, and no process has its pid and its start time.
Names of claims are used once, so that any number of processes may remove the same dead claim and none of them can
hit a live one. A claim of another host is never removed, nor is any by its age.

It is not fair, and takes some milliseconds: flock is better where it holds.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import time
from pathlib import Path
from types import TracebackType

import psutil
from filelock import SoftFileLockProtocolError, StrictSoftFileClaim, StrictSoftFileLock, Timeout

from orchestrator.errors import LockError

LOOK_FOR_DEAD_S = 0.5  # between two looks, while waiting
POLL_S = 0.01
_TICK_BITS = 64  # of a claim's start: below them clock ticks since the boot, above them the boot's id


class HeldError(Timeout):
    """Somebody else held the lock for the whole wait. Its text says who, and what to do."""

    def __init__(self, lock_file: str, advice: str = "") -> None:
        super().__init__(lock_file)
        self.advice = advice

    def __str__(self) -> str:
        return self.advice


class SoftLock:
    """Same use as `FairFileLock`."""

    def __init__(self, lock_file: str | os.PathLike[str], timeout: float) -> None:
        """timeout: seconds; below 0: for ever."""
        self.lock_file = str(lock_file)
        self.timeout = timeout
        self._inner = StrictSoftFileLock(self.lock_file, poll_interval=POLL_S)

    @property
    def is_locked(self) -> bool:
        return self._inner.is_locked

    def acquire(self, timeout: float | None = None) -> SoftLock:
        """Wait at most `timeout` seconds (below 0: for ever).

        Raises HeldError, LockError where the lock's files make no sense or hard links are missing, and OSError.
        """
        timeout = self.timeout if timeout is None else timeout
        end = None if timeout < 0 else time.monotonic() + timeout
        while True:
            left = LOOK_FOR_DEAD_S if end is None else max(0.0, end - time.monotonic())
            try:
                self._inner.acquire(timeout=min(left, LOOK_FOR_DEAD_S))
                return self
            except Timeout:
                buried = self._bury_the_dead()
            except SoftFileLockProtocolError as error:
                raise LockError(
                    f"{error}. If no process of this run is alive on any node, remove {self.lock_file} and "
                    f"{self.lock_file}.filelock and try again"
                ) from error
            if end is not None and time.monotonic() >= end and not buried:
                raise HeldError(self.lock_file, self._who_holds_it(timeout))

    def release(self) -> None:
        self._inner.release()

    def _bury_the_dead(self) -> bool:
        """Remove the claims of processes that are proven dead. True if there was one."""
        buried = False
        for claim in self._claims():
            if is_dead(claim):
                # Gone already, or another user's to remove: then that user's processes do it.
                with contextlib.suppress(FileNotFoundError, PermissionError):
                    self._inner.force_break(claim.name)
                    buried = True
        return buried

    def _claims(self) -> tuple[StrictSoftFileClaim, ...]:
        try:
            return self._inner.claims
        except SoftFileLockProtocolError:
            return ()  # the next acquisition says so

    def _who_holds_it(self, waited_s: float) -> str:
        claims = self._claims()
        held = [claim for claim in claims if claim.state == "held"] or claims
        if not held:
            return f"{self.lock_file} could not be taken within {waited_s:.0f} s: many processes ask for it; try again"
        who = held[0]
        files = Path(f"{self.lock_file}.filelock") / "claims" / f"*{who.token}.claim"
        return (
            f"{self.lock_file} was held for {waited_s:.0f} s by process {who.pid} on {who.hostname}. A lock is never "
            f"broken by its age. Is that process stopped? If it is dead (`ssh {who.hostname.partition('?')[0]} ps -p "
            f"{who.pid}`; is its job still in squeue?), remove its claim: rm {files}"
        )

    def __enter__(self) -> SoftLock:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def is_dead(claim: StrictSoftFileClaim) -> bool:
    """Is it proven that the process which made this claim is no more? Of another host, another boot, another
    namespace of pids, or of a process without a known start time, nothing is proven."""
    me = _own_claim(os.getpid())
    if claim.hostname != me.hostname or claim.start is None or me.start is None:
        return False
    if not me.start >> _TICK_BITS or claim.start >> _TICK_BITS != me.start >> _TICK_BITS:
        return False
    started_at = psutil.Process(me.pid).create_time() + (claim.start - me.start) / os.sysconf("SC_CLK_TCK")
    try:
        process = psutil.Process(claim.pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return True
        return bool(abs(process.create_time() - started_at) > 0.5)
    except psutil.AccessDenied:
        return False
    except psutil.NoSuchProcess:
        return not psutil.pid_exists(claim.pid)  # where /proc hides others' processes, it exists all the same


@functools.cache
def _own_claim(pid: int) -> StrictSoftFileClaim:
    """How filelock writes this process down. pid: its own; a forked child is another process."""
    with tempfile.TemporaryDirectory(prefix="orch-") as folder:
        lock = StrictSoftFileLock(Path(folder) / "lock", timeout=10)
        with lock:
            return lock.claims[0]
