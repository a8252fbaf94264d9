"""Does a lock hold? Processes on several nodes count in one place, each number read, increased and written
under the lock. Two in there at once lose an update, and the sum tells."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator.doctor.findings import Finding
from orchestrator.doctor.mounts import ELSEWHERE
from orchestrator.errors import LeaderboardError
from orchestrator.leaderboard.engine import Database

Kind = Literal["lock", "database"]
INCREMENTS = 300  # of each process, for each kind
PAUSE_S = 0.001  # between reading and writing: without a lock that holds, somebody else comes in between
DIGITS = 12  # of the number in the file: written in place, it is never half there
GIVE_UP_AFTER = 5  # errors in a row
SLOW_S = 2.0  # a wait that slows training down: there are about two transactions in a chunk
NAMES: Mapping[Kind, str] = {"lock": "file lock", "database": "SQLite database"}


@dataclass(frozen=True, slots=True)
class Tally:
    """What one process did."""

    kind: Kind
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


class _Counting:
    """The parts that both kinds share: when to stop, and what is written down."""

    def __init__(self, kind: Kind, times: int, limit_s: float) -> None:
        self.kind: Kind = kind
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
    counting = _Counting("lock", times, limit_s)
    while counting.goes_on():
        try:
            with lock:
                counting.inside()
                with open(path, "r+b") as file:  # opened under the lock: NFS looks at the server then
                    number = counting.read(int(file.read()))
                    file.seek(0)
                    file.write(f"{number:0{DIGITS}d}".encode("ascii"))
            counting.wrote(number)
        except (OSError, ValueError) as error:  # filelock.Timeout is an OSError
            counting.failed(error)
    return counting.tally()


def prepare_database(folder: Path) -> None:
    """A database as a run has it, with one table more. Raises LeaderboardError."""
    database = Database(None, folder)
    database.create()
    with database.transaction() as connection:
        connection.exec_driver_sql("CREATE TABLE doctor_counter (number INTEGER NOT NULL)")
        connection.exec_driver_sql("INSERT INTO doctor_counter VALUES (0)")


def counted_in_database(folder: Path) -> int:
    """Raises LeaderboardError, also if SQLite finds the file damaged."""
    with Database(None, folder).transaction() as connection:
        check = connection.exec_driver_sql("PRAGMA integrity_check").scalar_one()
        if check != "ok":
            raise LeaderboardError(f"the database is damaged: {check}")
        return int(connection.exec_driver_sql("SELECT number FROM doctor_counter").scalar_one())


def count_in_database(folder: Path, times: int, limit_s: float) -> Tally:
    """Increase the number in the database, each time in one of the leaderboard's transactions."""
    database, counting = Database(None, folder), _Counting("database", times, limit_s)
    while counting.goes_on():
        try:
            with database.transaction() as connection:
                counting.inside()
                number = counting.read(
                    int(connection.exec_driver_sql("SELECT number FROM doctor_counter").scalar_one())
                )
                connection.exec_driver_sql("UPDATE doctor_counter SET number = ?", (number,))
            counting.wrote(number)
        except (LeaderboardError, OSError) as error:
            counting.failed(error)
    return counting.tally()


# --- what it means


def judge_counts(kind: Kind, tallies: Sequence[Tally], counted: int | str, where: str) -> list[Finding]:
    """counted: the number at the end, or why it can't be read. where: between whom, for the messages."""
    topic, name = "lock test", f"{NAMES[kind]}, {where}"
    done = sum(tally.done for tally in tallies)
    found = _judge_errors(name, tallies)
    if isinstance(counted, str):
        found.append(Finding("error", topic, f"{name}: what was counted can't be read: {counted}", ELSEWHERE))
    elif counted != done:
        what = f"{name}: {done - counted} of {done} updates were lost: the lock does not hold"
        found.append(Finding("error", topic, what, ELSEWHERE))
    if found:
        return found
    waits = f"{_waits(tallies)}"
    if sum(tally.done < tally.wanted for tally in tallies):
        what = f"{name}: only {done} of {sum(t.wanted for t in tallies)} updates were made in time ({waits})"
        found.append(Finding("warning", topic, what, f"the file system is slow now: try again, or {ELSEWHERE}"))
    if len(tallies) > 1 and not sum(tally.switches for tally in tallies):
        what = f"{name}: the processes did not count at the same time, so that nothing is proven"
        found.append(Finding("warning", topic, what, "try again"))
    if (slow := percentile(_all_waits(tallies), 0.99)) > SLOW_S:
        what = f"{name}: waits are long ({waits})"
        found.append(Finding("warning", topic, what, f"a file system with less to do is better (p99 is {slow:.1f} s)"))
    return found or [Finding("ok", topic, f"{name}: {done} updates, 0 lost; {waits}")]


def _judge_errors(name: str, tallies: Sequence[Tally]) -> list[Finding]:
    kinds = Counter(error for tally in tallies for error in tally.errors)
    locked = sum(many for error, many in kinds.items() if "database is locked" in error)
    found = []
    if locked:
        what = f'{name}: "database is locked" {locked} times: SQLite\'s own locks do not work here'
        found.append(Finding("error", "lock test", what, ELSEWHERE))
    others = {error: many for error, many in kinds.items() if "database is locked" not in error}
    if others:
        said = "; ".join(f"{error} ({many} times)" for error, many in list(others.items())[:3])
        found.append(Finding("error", "lock test", f"{name}: {said}", ELSEWHERE))
    return found


def _all_waits(tallies: Sequence[Tally]) -> list[float]:
    return sorted(wait for tally in tallies for wait in tally.waits_s)


def _waits(tallies: Sequence[Tally]) -> str:
    waits = _all_waits(tallies)
    if not waits:
        return "no waits"
    p50, p99, most = (1000 * value for value in (percentile(waits, 0.5), percentile(waits, 0.99), waits[-1]))
    return f"waits p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {most:.1f} ms"


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least this share is not above; 0 of nothing."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0
