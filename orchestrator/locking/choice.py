"""Choose the lock that protects a run's SQLite database. The lock is tested at launch and recorded with the run.

The choice is written to `NAME.lock.json` beside the database before the database is created. Each process reads this
file before it acquires a lock: processes that used different kinds of lock would not exclude each other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator.errors import LockError
from orchestrator.files.atomic import publish
from orchestrator.files.run_folder import LOCK_RECORD_SUFFIX
from orchestrator.locking.flock import LOCK_TIMEOUT_S, Lock, lock_path
from orchestrator.locking.mounts import LockFacts, Mount, lock_facts, mount_here
from orchestrator.locking.proof import LOCKS, prove, sqlite_locks_work
from orchestrator.records import LockKind, WantedLock

NAMES: Mapping[LockKind, str] = {"flock": "fair flock", "soft": "soft lock (files)"}
UNKNOWN = LockFacts("unsure", True, "the kernel does not show which file system this is")
INSTEAD = (
    'Use a PostgreSQL database, which needs no file lock ("database": "postgresql+psycopg://user@host/name"), '
    "or put the runs on another file system (--runs-dir)"
)


@dataclass(frozen=True, slots=True)
class Choice:
    """A run's lock."""

    kind: LockKind
    why: str
    sqlite_locks: bool = True  # whether the file system also accepts SQLite's own locks (fcntl)

    def __str__(self) -> str:
        return f"{NAMES[self.kind]}, {self.why}"


_proven: set[tuple[int, LockKind]] = set()  # (device, kind) pairs that passed `prove` in this process
UNRECORDED = Choice("flock", "the default, as no choice is recorded")


def choose(folder: Path, several_nodes: bool, wanted: WantedLock) -> Choice:
    """Test kinds of lock in this folder, and return the first kind that works. Takes some tenths of a second.

    several_nodes: whether processes of the run may be on more than one machine. Raises LockError if no lock works, and
    OSError if the folder is not writable or a process can't be started.
    """
    mount = mount_here(folder.resolve())
    return decide(mount, several_nodes, wanted, lambda kind: _prove_once(folder, kind), sqlite_locks_work(folder))


def decide(
    mount: Mount | None,
    several_nodes: bool,
    wanted: WantedLock,
    problem_of: Callable[[LockKind], str | None],
    sqlite_locks: bool = True,
) -> Choice:
    """Return the first kind of lock that works. problem_of: tests a kind on this machine and returns its problem or
    None, as `prove` does.

    Raises LockError if no lock works; the message names each lock's problem and what to do.
    """
    facts = lock_facts(mount.fstype, mount.options) if mount else UNKNOWN
    where = str(mount) if mount else "this file system"
    kinds = _candidates(facts, several_nodes, wanted)
    if not kinds:
        links = ", which needs hard links" if wanted == "soft" else ""
        reason = "" if wanted == "auto" else f'"lock" is "{wanted}"{links}, but '
        raise LockError(f"{where}: {reason}{facts.what}. {INSTEAD}")
    problems = []
    for kind in kinds:
        problem = problem_of(kind)
        if problem is None:
            return Choice(kind, f"proven on {where}", sqlite_locks)
        problems.append(f"{NAMES[kind]}: {problem}")
    other = "" if len(kinds) > 1 or wanted == "auto" else ', or "lock": "auto"'
    raise LockError(f"{where}: no lock protects the database ({'; '.join(problems)}). {INSTEAD}{other}")


def _candidates(facts: LockFacts, several_nodes: bool, wanted: WantedLock) -> tuple[LockKind, ...]:
    """Return the kinds of lock to test, best first; an empty tuple if no kind can work.

    A test on one machine can't show whether flock works between nodes. With several nodes, flock is tested only if the
    file system's servers are known to manage it, or if the settings ask for it and the mount does not rule it out.
    """
    if wanted == "flock":
        known_bad = several_nodes and not facts.local and facts.flock in ("machine", "nowhere")
        return () if known_bad else ("flock",)
    if wanted == "auto" and (facts.local or facts.flock == "nodes"):
        return ("flock", "soft")
    # The soft lock comes first even if all workers are on one machine: `orch` commands may run on another.
    soft: tuple[LockKind, ...] = ("soft",) if facts.links else ()
    if wanted == "auto" and not several_nodes and facts.flock != "nowhere":
        return (*soft, "flock")
    return soft


def _prove_once(folder: Path, kind: LockKind) -> str | None:
    """Like `prove`, but skip a test that this file system has passed: a sweep launches many runs from one process."""
    place = (folder.stat().st_dev, kind)
    problem = None if place in _proven else prove(folder, kind)
    if problem is None:
        _proven.add(place)
    return problem


# --- the record beside the database


def record_path(database: Path) -> Path:
    return database.with_name(database.name + LOCK_RECORD_SUFFIX)


def write_record(database: Path, choice: Choice) -> None:
    """Write the choice beside the database. Raises OSError."""
    text = json.dumps(asdict(choice), indent=1)
    publish(record_path(database), lambda target: target.write(text.encode()))


def read_record(database: Path) -> Choice:
    """Return the lock that all processes of the run must use. Raises LockError if the record is damaged or lost."""
    path = record_path(database)
    try:
        choice = Choice(**json.loads(path.read_bytes()))
        if choice.kind not in LOCKS:
            problem = f"{str(choice.kind)[:80]!r} is not a kind of lock that this version of orch knows"
        elif not isinstance(choice.why, str) or not isinstance(choice.sqlite_locks, bool):
            problem = '"why" must be a string and "sqlite_locks" must be true or false'
        else:
            return choice
    except FileNotFoundError:
        if not lock_path(database).with_name(lock_path(database).name + ".filelock").exists():
            return UNRECORDED
        problem = "is missing, and the soft lock was in use here"
    except OSError as error:
        problem = error.strerror or str(error)
    except (ValueError, TypeError, RecursionError) as error:
        problem = str(error)[:200]
    raise LockError(
        f"{path}: {problem}. This file names the lock of the run's processes. Put it back from a backup; or, if no "
        'process of the run is alive on any node, write {"kind": "flock", "why": "by hand"} ("soft" for the soft lock)'
    )


def lock_of(choice: Choice, database: Path, timeout_s: float = LOCK_TIMEOUT_S) -> Lock:
    return LOCKS[choice.kind](lock_path(database), timeout=timeout_s)
