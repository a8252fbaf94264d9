"""Which lock stands around a run's SQLite database: chosen and proven at launch, and kept with the run.

The choice is written beside the database (`NAME.lock.json`) before the database is made, and each process reads it
there before it takes any lock: two kinds at once would be no lock at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator.errors import LockError
from orchestrator.files.atomic import publish
from orchestrator.locking.flock import LOCK_TIMEOUT_S, FairFileLock, lock_path
from orchestrator.locking.mounts import LockFacts, Mount, lock_facts, mount_here
from orchestrator.locking.proof import LOCKS, prove, sqlite_locks_work
from orchestrator.locking.soft_lock import SoftLock
from orchestrator.records import LockKind, WantedLock

NAMES: Mapping[LockKind, str] = {"flock": "fair flock", "soft": "soft lock (files)"}
UNKNOWN = LockFacts("unsure", True, "this kernel does not say which file system it is")
INSTEAD = (
    'What helps: a PostgreSQL database, which needs no lock on files ("database": '
    '"postgresql+psycopg://user@host/name"), or runs on another file system (--runs-dir)'
)


@dataclass(frozen=True, slots=True)
class Choice:
    """A run's lock."""

    kind: LockKind
    why: str
    sqlite_locks: bool = True  # does the mount take SQLite's own locks (fcntl) too?

    def __str__(self) -> str:
        return f"{NAMES[self.kind]}, {self.why}"


_proven: set[tuple[int, LockKind]] = set()  # (device, kind) that this process has seen to hold
UNRECORDED = Choice("flock", "as no other choice is recorded")


# --- pure


def candidates(facts: LockFacts, several_nodes: bool, wanted: WantedLock) -> tuple[LockKind, ...] | str:
    """Kinds of lock to prove, the best first; or why none can do. several_nodes: may processes of the run be on more
    than one machine?

    A proof on one machine shows nothing of two, so between nodes flock counts only where the file system is known to
    keep it there, or where the settings say so and nothing is known to the contrary.
    """
    known_bad = several_nodes and not facts.local and facts.flock in ("machine", "nowhere")
    if wanted == "flock":
        return f'"lock" is "flock", but {facts.what}' if known_bad else ("flock",)
    if wanted == "soft":
        return ("soft",) if facts.links else f'"lock" is "soft", which is made of hard links, but {facts.what}'
    if facts.local or facts.flock == "nodes":
        return ("flock", "soft")
    # Even where all workers are on one machine, somebody may look at the run from another.
    found: tuple[LockKind, ...] = ("soft",) if facts.links else ()
    if not several_nodes and facts.flock != "nowhere":
        found = (*found, "flock")
    return found or facts.what


def decide(
    mount: Mount | None,
    several_nodes: bool,
    wanted: WantedLock,
    proofs: Mapping[LockKind, str],
    sqlite_locks: bool = True,
) -> Choice | str:
    """The lock of a run, or why there is none, and what to do.

    proofs: why each kind that was tried on this machine does not hold; empty: it holds. sqlite_locks: does the mount
    take SQLite's own locks?
    """
    facts = lock_facts(mount.fstype, mount.options) if mount else UNKNOWN
    where = str(mount) if mount else "this file system"
    kinds = candidates(facts, several_nodes, wanted)
    if isinstance(kinds, str):
        return f"{where}: {kinds}. {INSTEAD}"
    for kind in kinds:
        if proofs.get(kind) == "":
            return Choice(kind, f"proven on {where}", sqlite_locks)
    failed = "; ".join(f"{NAMES[kind]}: {proofs.get(kind, 'not tried')}" for kind in kinds)
    other = "" if len(kinds) > 1 or wanted == "auto" else ', or "lock": "auto"'
    return f"{where}: no lock holds ({failed}). {INSTEAD}{other}"


# --- the shell around it


def choose(folder: Path, several_nodes: bool, wanted: WantedLock) -> Choice:
    """Prove locks in this folder until one holds. Takes some tenths of a second.

    Raises LockError if none does, OSError where the folder can't be written or no process can be started.
    """
    mount = mount_here(folder.resolve())
    facts = lock_facts(mount.fstype, mount.options) if mount else UNKNOWN
    kinds = candidates(facts, several_nodes, wanted)
    proofs: dict[LockKind, str] = {}
    for kind in kinds if isinstance(kinds, tuple) else ():
        proofs[kind] = _prove_once(folder, kind)
        if not proofs[kind]:
            break
    choice = decide(mount, several_nodes, wanted, proofs, sqlite_locks_work(folder))
    if isinstance(choice, str):
        raise LockError(choice)
    return choice


def _prove_once(folder: Path, kind: LockKind) -> str:
    """A sweep launches many runs on one mount."""
    place = (folder.stat().st_dev, kind)
    if place in _proven:
        return ""
    problem = prove(folder, kind)
    if not problem:
        _proven.add(place)
    return problem


def record_path(database: Path) -> Path:
    return database.with_name(database.name + ".lock.json")


def write_record(database: Path, choice: Choice) -> None:
    """Raises OSError."""
    text = json.dumps(asdict(choice), indent=1)
    publish(record_path(database), lambda target: target.write(text.encode()))


def read_record(database: Path) -> Choice:
    """The lock that every process takes around this database. Raises LockError where that is not known."""
    path = record_path(database)
    try:
        value = json.loads(path.read_bytes())
        choice = Choice(**value)
        if choice.kind not in LOCKS:
            problem = f"{str(choice.kind)[:80]!r} is no kind of lock that this version of orch has"
        elif not isinstance(choice.why, str) or not isinstance(choice.sqlite_locks, bool):
            problem = '"why" is a text and "sqlite_locks" true or false'
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
        f"{path}: {problem}. It says which lock the processes of this run take. Put it back from a backup, or, when no "
        'process of the run is alive on any node, write {"kind": "flock", "why": "by hand"} ("soft" for the soft lock)'
    )


def lock_of(choice: Choice, database: Path, timeout_s: float = LOCK_TIMEOUT_S) -> FairFileLock | SoftLock:
    return LOCKS[choice.kind](lock_path(database), timeout=timeout_s)
