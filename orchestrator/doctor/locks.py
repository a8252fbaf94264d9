"""Locks: what a mount promises, and what processes that count under the lock on several nodes show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.doctor.findings import Finding, Level
from orchestrator.errors import LeaderboardError
from orchestrator.leaderboard.engine import Database
from orchestrator.locking.mounts import ELSEWHERE, LockFacts, Mount, lock_facts
from orchestrator.locking.proof import Counted, Counting, Tally, percentile

INCREMENTS = 300  # of each process, for each kind
SLOW_S = 2.0  # a wait that slows training down: there are about two transactions in a chunk
NAMES: Mapping[Counted, str] = {"lock": "file lock", "database": "SQLite database"}


def prepare_database(folder: Path) -> None:
    """A database as a run has it, with one table more. Raises LeaderboardError."""
    with Database(None, folder).creation() as connection:
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
    database, counting = Database(None, folder), Counting("database", times, limit_s)
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


def judge_counts(kind: Counted, tallies: Sequence[Tally], counted: int | str, where: str) -> list[Finding]:
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


# --- what the mount itself says

QUOTA = {
    "lustre": "lfs quota -hu $USER {point}", "gpfs": "mmlsquota --block-size auto",
    "beegfs": "beegfs-ctl --getquota --uid $USER", "nfs": "quota -s", "nfs4": "quota -s",
    "ceph": "getfattr -n ceph.quota.max_bytes {point}",
}  # fmt: skip


def lock_advice(fstype: str, options: Sequence[str]) -> Finding:
    """Whether flock, which the lock around SQLite uses where it can, holds between the nodes that mount this.

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
    """Says how much of a quota is left, which free space does not; None where nothing is known."""
    command = QUOTA.get(mount.fstype)
    return command.format(point=mount.point) if command else None
