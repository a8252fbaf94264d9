"""Check locks: what the mount options guarantee, and whether a counter incremented under the lock loses updates."""

from __future__ import annotations

import contextlib
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.doctor.findings import Finding, Level
from orchestrator.errors import LeaderboardError
from orchestrator.leaderboard.engine import Database
from orchestrator.locking.mounts import ELSEWHERE, LockFacts, Mount, lock_facts
from orchestrator.locking.proof import Access, Counted, Tally, count, percentile
from orchestrator.messages import counted

INCREMENTS = 300  # how often each process increments each counter
SLOW_S = 2.0  # longer waits slow down training, since each chunk needs about two transactions
NAMES: Mapping[Counted, str] = {"lock": "file lock", "database": "SQLite database"}
TOPIC = "lock test"


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands for a counter's final number that can't be read. why: the error message."""

    why: str


def prepare_database(folder: Path) -> None:
    """Create a run's database with an additional table for the counter. Raises LeaderboardError."""
    with Database(None, folder).creation() as connection:
        connection.exec_driver_sql("CREATE TABLE doctor_counter (number INTEGER NOT NULL)")
        connection.exec_driver_sql("INSERT INTO doctor_counter VALUES (0)")


def counted_in_database(folder: Path) -> int:
    """Return the counter's value. Raises LeaderboardError if the database can't be used or is damaged."""
    with Database(None, folder).transaction() as connection:
        check = connection.exec_driver_sql("PRAGMA integrity_check").scalar_one()
        if check != "ok":
            raise LeaderboardError(f"the database is damaged: {check}")
        return int(connection.exec_driver_sql("SELECT number FROM doctor_counter").scalar_one())


def count_in_database(folder: Path, times: int, limit_s: float) -> Tally:
    """Increment the counter in the database, each time in a transaction like the leaderboard's."""
    database = Database(None, folder)

    @contextlib.contextmanager
    def opened() -> Iterator[Access]:
        with database.transaction() as connection:
            yield (
                lambda: int(connection.exec_driver_sql("SELECT number FROM doctor_counter").scalar_one()),
                lambda number: connection.exec_driver_sql("UPDATE doctor_counter SET number = ?", (number,)),
            )

    return count("database", opened, times, limit_s, _is_busy)


def _is_busy(error: Exception) -> bool:
    """Return whether SQLite found its file locked. `error.__cause__` can be an error of SQLAlchemy or of the driver."""
    cause = getattr(error.__cause__, "orig", error.__cause__)
    return getattr(cause, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY


# --- what the counts mean


def judge_counts(kind: Counted, tallies: Sequence[Tally], final: int | Unreadable, where: str) -> list[Finding]:
    """Check one counter for lost updates, errors and long waits. final: its final value. where: names the hosts."""
    name = f"{NAMES[kind]}, {where}"
    done = sum(tally.done for tally in tallies)
    problems = _judge_errors(name, tallies)
    if isinstance(final, Unreadable):
        problems.append(Finding("error", TOPIC, f"{name}: the final number can't be read: {final.why}", ELSEWHERE))
    elif final != done:
        what = f"{name}: {done - final} of {done} updates were lost: the lock does not work"
        problems.append(Finding("error", TOPIC, what, ELSEWHERE))
    if problems:
        return problems
    waits = sorted(wait for tally in tallies for wait in tally.waits_s)
    shown = _describe(waits)
    if any(tally.done < tally.wanted for tally in tallies):
        what = f"{name}: only {done} of {sum(t.wanted for t in tallies)} updates were made in time ({shown})"
        problems.append(Finding("warning", TOPIC, what, f"the file system is slow now: try again, or {ELSEWHERE}"))
    if len(tallies) > 1 and not any(tally.switches for tally in tallies):
        what = f"{name}: the processes did not overlap in time, so nothing is proven"
        problems.append(Finding("warning", TOPIC, what, "try again"))
    if (p99 := percentile(waits, 0.99)) > SLOW_S:
        do = f"use a file system with less load (the p99 of the waits is {p99:.1f} s)"
        problems.append(Finding("warning", TOPIC, f"{name}: waits are long ({shown})", do))
    return problems or [Finding("ok", TOPIC, f"{name}: {done} updates, 0 lost; {shown}")]


def _judge_errors(name: str, tallies: Sequence[Tally]) -> list[Finding]:
    kinds = Counter(error for tally in tallies for error in tally.errors)
    if not kinds:
        return []
    busy = sum(tally.busy for tally in tallies)
    locked = f"SQLite found its file locked {counted(busy, 'time')}: SQLite's own locks fail here. " if busy else ""
    examples = "; ".join(f"{error} ({counted(times, 'time')})" for error, times in kinds.most_common(3))
    return [Finding("error", TOPIC, f"{name}: {locked}{examples}", ELSEWHERE)]


def _describe(waits_s: Sequence[float]) -> str:
    """Format percentiles of the waits, which must be sorted."""
    if not waits_s:
        return "no waits"
    p50, p99, most = (1000 * wait for wait in (percentile(waits_s, 0.5), percentile(waits_s, 0.99), waits_s[-1]))
    return f"waits p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {most:.1f} ms"


# --- what the mount options guarantee

QUOTA = {
    "lustre": "lfs quota -hu $USER {point}", "gpfs": "mmlsquota --block-size auto",
    "beegfs": "beegfs-ctl --getquota --uid $USER", "nfs": "quota -s", "nfs4": "quota -s",
    "ceph": "getfattr -n ceph.quota.max_bytes {point}",
}  # fmt: skip


def lock_advice(fstype: str, options: Sequence[str]) -> Finding:
    """Judge whether flock works between the nodes that mount this file system. A run prefers flock to other locks.

    fstype and options: as in /proc/self/mountinfo.
    """
    facts = lock_facts(fstype, options)
    return Finding(_level(facts), "locks", facts.what, facts.do)


def _level(facts: LockFacts) -> Level:
    if facts.local:
        return "note"
    if facts.flock == "nodes":
        return "note" if facts.do else "ok"
    return "warning" if facts.flock == "unsure" else "error"


def quota_command(mount: Mount) -> str | None:
    """Return a command that shows the user's quota, which may be less than the free space; None if none is known."""
    command = QUOTA.get(mount.fstype)
    return command.format(point=mount.point) if command else None
