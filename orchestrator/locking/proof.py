"""Does a lock hold? Processes count in one place, each number read, increased and written under the lock. Two in
there at once lose an update, and the sum tells.

`prove` tries it on this machine in a fraction of a second, before a run starts; the doctor does the same between
two nodes, for longer.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import Timeout

from orchestrator.errors import LockError
from orchestrator.locking.flock import FairFileLock
from orchestrator.locking.soft_lock import SoftLock
from orchestrator.records import LockKind

Counted = Literal["lock", "database"]
LOCKS: Mapping[LockKind, type[FairFileLock] | type[SoftLock]] = {"flock": FairFileLock, "soft": SoftLock}

PAUSE_S = 0.001  # between reading and writing: without a lock that holds, somebody else comes in between
DIGITS = 12  # of the number in the file: written in place, it is never half there
GIVE_UP_AFTER = 5  # errors in a row
PROCESSES = 2  # that prove a lock
INCREMENTS = 25  # of each of them
_HOME = str(Path(__file__).parents[2])  # where orchestrator is found, whether it is installed or not
ANSWER_S = 20.0  # for one of them to answer: a busy machine starts Python slowly. Locks that hang take for ever


@dataclass(frozen=True, slots=True)
class Tally:
    """What one process did."""

    kind: Counted
    wanted: int
    done: int  # increments that it made
    switches: int  # how often another process had counted since its last increment
    waits_s: tuple[float, ...]  # for the lock or for the transaction to begin
    errors: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Tally:
        return Tally(**{**value, "waits_s": tuple(value["waits_s"]), "errors": tuple(value["errors"])})


class Counting:
    """When to stop, and what is written down."""

    def __init__(self, kind: Counted, times: int, limit_s: float) -> None:
        self.kind: Counted = kind
        self.times = times
        self._end = time.monotonic() + limit_s
        self._attempts = self._failures = self.done = self._switches = 0
        self._last: int | None = None
        self._waits_s: list[float] = []
        self._errors: list[str] = []

    def goes_on(self) -> bool:
        if self._attempts == self.times or self._failures == GIVE_UP_AFTER or time.monotonic() > self._end:
            return False
        self._attempts += 1
        self._asked_at = time.monotonic()
        return True

    def inside(self) -> None:
        self._waits_s.append(time.monotonic() - self._asked_at)

    def read(self, number: int) -> int:
        """The number to write."""
        self._switches += self._last is not None and number != self._last
        time.sleep(PAUSE_S)
        return number + 1

    def wrote(self, number: int) -> None:
        self._last = number
        self.done += 1
        self._failures = 0

    def failed(self, error: Exception) -> None:
        self._failures += 1
        self._errors.append(f"{type(error).__name__}: {error}"[:300])

    def tally(self) -> Tally:
        errors = tuple(self._errors)
        return Tally(self.kind, self.times, self.done, self._switches, tuple(self._waits_s), errors)


def prepare_file(path: Path) -> None:
    path.write_text(f"{0:0{DIGITS}d}", encoding="ascii")


def counted_in_file(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))


def count_in_file(path: Path, lock: AbstractContextManager[object], times: int, limit_s: float) -> Tally:
    """Increase the number in the file, each time under the lock. limit_s: start no increment after it."""
    counting = Counting("lock", times, limit_s)
    while counting.goes_on():
        try:
            with lock:
                counting.inside()
                with open(path, "r+b") as file:  # opened under the lock: NFS looks at the server then
                    number = counting.read(int(file.read()))
                    file.seek(0)
                    file.write(f"{number:0{DIGITS}d}".encode("ascii"))
            counting.wrote(number)
        except (OSError, ValueError, LockError) as error:  # filelock.Timeout is an OSError
            counting.failed(error)
    return counting.tally()


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least this share is not above; 0 of nothing."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


# --- the proof on this machine


def prove(folder: Path, kind: LockKind) -> str:
    """Why a lock of this kind does not hold in this folder between processes of this machine; empty: it holds.

    One process holds the lock while the other is refused; then both count under it. Takes about 0.3 s; what it
    writes is gone at the end. Raises OSError where no process can be started or nothing can be written.
    """
    scratch = Path(tempfile.mkdtemp(prefix=".lock-proof-", dir=folder))
    counter, lock_file = scratch / "counter", scratch / "lock"
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        prepare_file(counter)
        children = [stack.enter_context(_child(kind, counter, lock_file)) for _ in range(PROCESSES)]
        try:
            return _examine(children, counter)
        except TimeoutError:
            return f"a process that asks for it hangs ({ANSWER_S:.0f} s without an answer)"


def _examine(children: Sequence[_Child], counter: Path) -> str:
    for order, child, expected in (
        ("hold", children[0], "held"),
        ("try", children[1], "refused"),
        ("release", children[0], "released"),
    ):
        child.tell(order)
        if (answer := child.answer()) != expected:
            return "two processes got it at the same time" if answer == "held" else answer
    for child in children:
        child.tell("count")
    answers = [child.answer() for child in children]
    for answer in answers:
        if not answer.isdigit():
            return answer
    done, counted = sum(map(int, answers)), counted_in_file(counter)
    return "" if counted == done else f"{done - counted} of {done} updates under it were lost"


class _Child:
    """A process that does what it is told, an order and an answer a line."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def tell(self, order: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the answer says that it is dead
            self._process.stdin.write(f"{order}\n".encode())
            self._process.stdin.flush()

    def answer(self) -> str:
        """Raises TimeoutError."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], ANSWER_S)[0]:
            raise TimeoutError
        return self._process.stdout.readline().decode(errors="replace").strip() or "a process that tried it died"


@contextlib.contextmanager
def _child(kind: LockKind, counter: Path, lock_file: Path) -> Iterator[_Child]:
    command = [sys.executable, "-c", "from orchestrator.locking.proof import obey; obey()", kind]
    process = subprocess.Popen(
        [*command, str(counter), str(lock_file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([_HOME, os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)},
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
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in the file system can't be killed
            process.wait(1.0)


def obey() -> None:
    """What a process of the proof does: hold, try, release and count, as its standard input says."""
    kind, counter, lock_file = sys.argv[1:]
    lock = LOCKS[kind](lock_file, timeout=ANSWER_S)  # type: ignore[index]  # one of its keys

    def held(timeout: float | None = None) -> str:
        lock.acquire(timeout)
        return "held"

    def released() -> str:
        lock.release()
        return "released"

    def counted() -> str:
        tally = count_in_file(Path(counter), lock, INCREMENTS, ANSWER_S / 2)
        return tally.errors[0] if tally.errors else str(tally.done)

    orders: Mapping[str, Callable[[], str]] = {
        "hold": held,
        "try": lambda: held(0.0),
        "release": released,
        "count": counted,
    }
    for order in sys.stdin:
        try:
            said = orders[order.strip()]()
        except Timeout:
            said = "refused"
        except (OSError, NotImplementedError, LockError) as error:
            said = " ".join(str(getattr(error.__cause__, "reason", error)).split())
        print(said, flush=True)


def sqlite_locks_work(folder: Path) -> bool:
    """Does the kernel take the locks here that SQLite itself sets on its file (fcntl, not flock)?"""
    with tempfile.NamedTemporaryFile(prefix=".lock-proof-", dir=folder) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True
