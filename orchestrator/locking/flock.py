"""The lock around the SQLite database: filelock's API, with a wait that is fair."""

from __future__ import annotations

import fcntl
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from filelock import Timeout

LOCK_TIMEOUT_S = 300.0
# The first in the queue looks for the lock this often: a tenth of the time that it has waited already, within these.
FIRST_POLL_S, LAST_POLL_S = 0.0001, 0.01


class FairFileLock:
    """A lock of `filelock.FileLock`'s kind (flock on the same file, so that each keeps the other out) behind a queue.

    FileLock polls, so under contention whoever happens to look first gets it: with 64 processes a waiter
    was measured to wait for 1.8 s (p99) where the kernel's own queue of blocked flock calls gave 0.27 s.
    So a process first waits, blocked in flock, for a file of its own (`NAME.queue`), and looks for the lock itself
    while it holds that. Then it lets go of the queue: the kernel wakes the next while this one works (waking takes a
    process half as long as a short transaction), and at most one process ever looks for the lock, often.

    The kernel drops both when their holder dies. Neither is ever broken by age.
    """

    def __init__(self, lock_file: str | os.PathLike[str], timeout: float = LOCK_TIMEOUT_S) -> None:
        self.lock_file = str(lock_file)
        self.timeout = timeout
        self._queue_file = f"{self.lock_file}.queue"
        self._fd: int | None = None
        self._queue_fd: int | None = None

    @property
    def is_locked(self) -> bool:
        return self._fd is not None

    def acquire(self, timeout: float | None = None) -> FairFileLock:
        """Wait for the turn, at most `timeout` seconds (below 0: for ever).

        Raises filelock.Timeout, and OSError where the file system refuses the files or the lock.
        """
        timeout = self.timeout if timeout is None else timeout
        until = math.inf if timeout < 0 else time.monotonic() + timeout
        fd = os.open(self._queue_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        _flock_within(fd, timeout, lambda: Timeout(self.lock_file))
        self._queue_fd = fd
        try:
            first = time.monotonic()
            while not self._take():
                now = time.monotonic()
                if now >= until:
                    raise Timeout(self.lock_file)
                time.sleep(min(max(FIRST_POLL_S, (now - first) / 10), LAST_POLL_S))
        finally:
            self._leave_queue()
        return self

    def _take(self) -> bool:
        """Without waiting. False: a program that does not queue has the lock, or has just removed its file."""
        fd = os.open(self.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_nlink > 0:
                self._fd = fd
                return True
        except BlockingIOError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return False

    def release(self) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None
            fcntl.flock(fd, fcntl.LOCK_UN)  # closing is not enough where a forked child has it too
            os.close(fd)

    def _leave_queue(self) -> None:
        if self._queue_fd is not None:
            fcntl.flock(self._queue_fd, fcntl.LOCK_UN)
            os.close(self._queue_fd)
            self._queue_fd = None

    def __enter__(self) -> FairFileLock:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _flock_within(fd: int, timeout: float, on_timeout: Callable[[], Timeout]) -> None:
    """Lock fd exclusively, blocked in the kernel's queue. Closes fd if that fails.

    flock has no time limit of its own, so a wait that has one is done by a thread, which outlives the wait
    when the limit is reached and gives up what it then gets.
    """
    if timeout < 0:
        fcntl.flock(fd, fcntl.LOCK_EX)
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    except BlockingIOError:
        pass
    except OSError:
        os.close(fd)
        raise
    outcome: list[OSError | None] = []
    over = threading.Lock()  # held while there is no outcome; waited for in place of the thread's end, which is later
    over.acquire()
    guard = threading.Lock()  # decides who owns fd: the waiter, or the thread once the waiter has left
    left = False

    def wait() -> None:
        error: OSError | None = None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as caught:
            error = caught
        with guard:
            if left:
                os.close(fd)
            else:
                outcome.append(error)
        over.release()

    thread = threading.Thread(target=wait, name="flock", daemon=True)
    try:
        thread.start()
        over.acquire(timeout=min(timeout, threading.TIMEOUT_MAX))
    except BaseException:  # Ctrl-C: the thread must not get the lock for somebody who does not wait any more
        with guard:
            left = not outcome
        if not left:
            os.close(fd)
        raise
    with guard:
        left = not outcome
    if left:
        raise on_timeout()
    if outcome[0] is not None:
        os.close(fd)
        raise outcome[0]


def lock_path(database: Path) -> Path:
    return database.with_name(database.name + ".lock")
