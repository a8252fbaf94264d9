"""Test whether a lock works: processes increment a shared counter under the lock. If two processes hold the lock at the
same time, updates are lost and the final number is too small.

`prove` runs this test on one machine, in a fraction of a second, before a run starts. The doctor's two-node test runs
it between two nodes, and for longer.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import Timeout

from orchestrator.errors import LeaderboardError, LockError
from orchestrator.locking.flock import FairFileLock, Lock
from orchestrator.locking.soft_lock import SoftLock
from orchestrator.records import LockKind

Counted = Literal["lock", "database"]
Access = tuple[Callable[[], int], Callable[[int], object]]  # (read, write) functions; call them under the lock
LOCKS: Mapping[LockKind, Callable[..., Lock]] = {"flock": FairFileLock, "soft": SoftLock}

PAUSE_S = 0.001  # pause between reading and writing, in which another process writes if the lock does not work
DIGITS = 12  # the number in the file is zero-padded to this length, so that each write replaces all of the old number
GIVE_UP_AFTER = 5  # stop after this many errors in a row
INCREMENTS = 25  # how often each of the two processes of `prove` increments the number
_PACKAGE_PARENT = str(Path(__file__).parents[2])  # so that a child finds orchestrator even if it is not installed
ANSWER_S = 20.0  # limit for a child's answer, since a lock may hang; long, since Python may start slowly


@dataclass(frozen=True, slots=True)
class Tally:
    """The results of one process's increments."""

    kind: Counted
    wanted: int
    done: int
    switches: int  # how often another process had changed the number since this process's last increment
    waits_s: tuple[float, ...]  # how long each increment waited for the lock or for its transaction to start
    errors: tuple[str, ...]
    busy: int = 0  # how many of the errors are SQLite's SQLITE_BUSY


def count(
    kind: Counted,
    opened: Callable[[], AbstractContextManager[Access]],
    times: int,
    limit_s: float,
    is_busy: Callable[[Exception], bool] = lambda error: False,
) -> Tally:
    """Increment the number `times` times, each time within `opened()`. limit_s: start no increment after this many
    seconds.

    Stops early after GIVE_UP_AFTER errors in a row. is_busy: returns whether an error is SQLITE_BUSY.
    """
    end = time.monotonic() + limit_s
    done = switches = busy = failures = 0
    last: int | None = None
    waits_s: list[float] = []
    errors: list[str] = []
    for _ in range(times):
        asked_at = time.monotonic()
        if failures == GIVE_UP_AFTER or asked_at > end:
            break
        try:
            with opened() as (read, write):
                waits_s.append(time.monotonic() - asked_at)
                number = read()
                switches += last is not None and number != last
                time.sleep(PAUSE_S)
                write(number + 1)
        except (OSError, ValueError, LeaderboardError) as error:  # filelock.Timeout is an OSError
            failures += 1
            busy += is_busy(error)
            errors.append(f"{type(error).__name__}: {error}"[:300])
        else:
            last, failures = number + 1, 0
            done += 1
    return Tally(kind, times, done, switches, tuple(waits_s), tuple(errors), busy)


def prepare_file(path: Path) -> None:
    path.write_text(f"{0:0{DIGITS}d}", encoding="ascii")


def counted_in_file(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))


def count_in_file(path: Path, lock: AbstractContextManager[object], times: int, limit_s: float) -> Tally:
    """Increment the number in the file, each time under the lock."""

    @contextlib.contextmanager
    def opened() -> Iterator[Access]:
        with lock, open(path, "r+b") as file:  # opening the file makes NFS fetch its current content

            def write(number: int) -> None:
                file.seek(0)
                file.write(f"{number:0{DIGITS}d}".encode("ascii"))

            yield lambda: int(file.read()), write

    return count("lock", opened, times, limit_s)


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the smallest value with at least this share of all values at or below it; 0 if there are no values."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


# --- the proof on this machine


def prove(folder: Path, kind: LockKind) -> str | None:
    """Return why this kind of lock fails between processes of this machine in this folder, or None if it works.

    While one process holds the lock, another must not get it. Then both increment a counter under the lock. Takes about
    0.3 s, and removes the files that it writes. Raises OSError if it can't start a process or write a file.
    """
    scratch = tempfile.TemporaryDirectory(prefix=".lock-proof-", dir=folder, ignore_cleanup_errors=True)
    counter, lock_file = Path(scratch.name, "counter"), Path(scratch.name, "lock")
    with scratch, contextlib.ExitStack() as stack:
        prepare_file(counter)
        children = [stack.enter_context(_child(kind, counter, lock_file)) for _ in range(2)]
        try:
            return _find_problem(children, counter)
        except TimeoutError:
            return f"a process that asked for the lock hangs (no answer for {ANSWER_S:.0f} s)"
        except LockError as error:
            return str(error)


def _find_problem(children: Sequence[_Child], counter: Path) -> str | None:
    """Test the lock and return its problem; see `prove`. Raises TimeoutError, and LockError if a child fails."""
    first, second = children
    if _ask(first, "hold") != "held":
        return f"the lock could not be acquired within {ANSWER_S:.0f} s although no process held it"
    if _ask(second, "try") == "held":
        return "two processes got it at the same time"
    _ask(first, "release")
    for child in children:
        child.tell("count")
    done, counted = sum(int(child.answer()) for child in children), counted_in_file(counter)
    return None if counted == done else f"{done - counted} of {done} updates were lost"


def _ask(child: _Child, order: str) -> str:
    child.tell(order)
    return child.answer()


class _Child:
    """A process that carries out orders. Each order and each answer is one line. The answers are "held", "refused",
    "released", a number of increments, or "problem" followed by a description."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def tell(self, order: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the process has died; `answer` reports this
            self._process.stdin.write(f"{order}\n".encode())
            self._process.stdin.flush()

    def answer(self) -> str:
        """Return the next answer. Raises TimeoutError, and LockError if the child reports a problem or has died."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], ANSWER_S)[0]:
            raise TimeoutError
        line = self._process.stdout.readline().decode(errors="replace").strip()
        answer, _, text = line.partition(" ")
        if not line or answer == "problem":
            raise LockError(text or "a process that tested the lock died")
        return answer


@contextlib.contextmanager
def _child(kind: LockKind, counter: Path, lock_file: Path) -> Iterator[_Child]:
    path = os.pathsep.join([_PACKAGE_PARENT, os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", "from orchestrator.locking.proof import obey; obey()", kind, counter, lock_file],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        yield _Child(process)
    finally:
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.stdout.close()
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process that hangs in the file system can't be killed
            process.wait(1.0)


def obey() -> None:
    """The main function of a `_Child`: read orders from standard input, answer on standard output."""
    kind, counter, lock_file = sys.argv[1:]
    lock = LOCKS[kind](lock_file, timeout=ANSWER_S)  # type: ignore[index]  # kind is a key of LOCKS

    def carry_out(order: str) -> str:
        if order == "release":
            lock.release()
            return "released"
        if order == "count":
            tally = count_in_file(Path(counter), lock, INCREMENTS, ANSWER_S / 2)
            return f"problem {tally.errors[0]}" if tally.errors else str(tally.done)
        lock.acquire(0.0 if order == "try" else None)
        return "held"

    for line in sys.stdin:
        try:
            answer = carry_out(line.strip())
        except Timeout:
            answer = "refused"
        except (OSError, NotImplementedError, LockError) as error:
            answer = "problem " + " ".join(str(getattr(error.__cause__, "reason", error)).split())
        print(answer, flush=True)


def sqlite_locks_work(folder: Path) -> bool:
    """Return whether the file system accepts the locks that SQLite itself sets on a database (fcntl, not flock)."""
    with tempfile.NamedTemporaryFile(prefix=".lock-proof-", dir=folder) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True
