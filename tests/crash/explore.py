"""Cause a kind of fault at every point of a job, and check the result. Run it in a process that has faults.c preloaded:

    LD_PRELOAD=faults.so python -m tests.crash.explore '{"fault": "kill", "shard": 0, "shards": 1}'

A point is one call that changes a file of the run. The job under test starts, submits its successor, reconciles,
collects files, and trains chunks that are promoted (and evict an entry), discarded or suspended. The next job continues
the suspended chunk. Each point has its own processes, forked from this process, which has imported all modules.

Prints one JSON object: the numbers of points and states, and a line for each violation.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import logging
import os
import pickle
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.errors import OrchError
from orchestrator.worker.trainer import Ending
from tests.crash.disk import VARIANTS, Disk, write_tree
from tests.crash.mutations import MUTATIONS
from tests.crash.world import World, dump
from tests.support.invariants import violations

OFF, COUNT, KILL, STOP, FAIL_ONCE, FAIL_ON = range(6)
# For each kind of call, the errors that it fails with. Each of them makes only one call fail; EROFS, which is added
# for every kind, makes all later calls fail too.
ERRORS = {
    "create": (errno.ENOSPC, errno.EACCES), "open": (errno.EACCES, errno.EIO), "open-truncate": (errno.EACCES,),
    "write": (errno.ENOSPC, errno.EIO), "pwrite": (errno.ENOSPC, errno.EIO), "truncate": (errno.EIO,),
    "fsync": (errno.EIO, errno.ENOSPC), "rename": (errno.EACCES, errno.ENOSPC), "unlink": (errno.EACCES, errno.EIO),
    "mkdir": (errno.ENOSPC,),
}  # fmt: skip
# The calls that change files. A process that dies or stops leaves different files depending on how many it has made.
CHANGES = ("create", "open-truncate", "write", "pwrite", "truncate", "rename", "unlink", "mkdir")
CALLS = {
    "kill": CHANGES,
    "zombie": CHANGES,
    "truncated": CHANGES,
    "power cut": (*CHANGES, "fsync"),
    "error": tuple(ERRORS),
}
# The short form tests one in this many calls of these kinds: most calls write pages of the database, in similar ways.
ONE_IN = {"pwrite": 10, "open": 4}
STRIDE = 37  # prime
JOBS = (1, 2)  # the jobs under test: the first ends with a suspended chunk, the second begins with it


@dataclass
class Findings:
    points: int = 0
    checks: int = 0
    states: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)


class Explorer:
    def __init__(self, fault: str, shard: int, shards: int, mutation: str | None, every: bool) -> None:
        """every: whether to test all points and all errors; otherwise the short form."""
        self.fault, self.shard, self.shards, self.every = fault, shard, shards, every
        self.library = ctypes.CDLL(None)
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.place = Path(tempfile.mkdtemp(prefix="orch-crash-", dir=memory))
        self.found = Findings()
        self.known: dict[str, list[str]] = {}  # by the digest of a state: the violations after continuing from it
        self.mutation = mutation

    def take_away(self) -> None:
        """Remove the safeguard in the process under test. The later checks run with all safeguards."""
        if self.mutation is not None:
            MUTATIONS[self.mutation][1]()

    # --- processes

    def forked(self, work: Callable[[], Any]) -> tuple[int, Any]:
        """Run `work` in a forked process. Returns its wait status and its result; an exception is also a result."""
        reader, writer = os.pipe()
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            try:
                result = work()
            except BaseException as error:
                result = error if isinstance(error, OrchError) else traceback.format_exc()
            with os.fdopen(writer, "wb") as pipe:
                pickle.dump(result, pipe)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            data = pipe.read()
        _, status = os.waitpid(pid, 0)
        return status, pickle.loads(data) if data else None

    # --- the scenes

    def prepare(self, jobs: int) -> Path:
        """Make a run whose next job has number `jobs`, with files of a dead worker, which that job will collect."""
        scene = self.place / f"scene-{jobs}"
        world = World(self.place / "now")
        shutil.rmtree(world.folder, ignore_errors=True)

        def play() -> None:
            world.found()
            for _ in range(jobs):
                world.mend()
                world.work()
            world.mend()
            for name in ("g00000000-c00000000.pt", ".tmp-g00000000-c00000000.json-77"):
                (world.run_folder / "checkpoints" / name).write_bytes(b'"left by somebody who died"')

        status, problem = self.forked(play)
        assert (status, problem) == (0, None), problem
        shutil.copytree(world.folder, scene)
        return scene

    def world(self, scene: Path, jobs: int) -> World:
        """Copy the scene, always to the same folder, because paths are part of the compared states."""
        world = World(self.place / "now", jobs=jobs + 1)
        shutil.rmtree(world.folder, ignore_errors=True)
        shutil.copytree(scene, world.folder)
        return world

    def calls(self, scene: Path, jobs: int) -> list[str]:
        """Return the kinds of the calls that the job makes, in order. Each call is a point."""
        world, log = self.world(scene, jobs), self.place / "calls"

        def count() -> Any:
            self.take_away()
            self.library.fault_arm(bytes(world.run_folder.parent), COUNT, -1, 0, bytes(log), None)
            return world.work()

        _, ending = self.forked(count)
        assert isinstance(ending, Ending), ending
        assert not ending.error, ending
        return [line.split()[1] for line in log.read_text().splitlines()]

    # --- every point

    def explore(self, until: Callable[[], bool] = lambda: False) -> Findings:
        try:
            for jobs in JOBS:
                scene = self.prepare(jobs)
                kinds = self.calls(scene, jobs)
                self.found.calls.update(kinds)
                for number, point in enumerate(self.points(kinds)):
                    if number % self.shards != self.shard:
                        continue
                    kind = kinds[point - 1] if point <= len(kinds) else "end"
                    self.found.points += 1
                    self.at_point(scene, jobs, point, kind)
                    if until():
                        return self.found
        finally:
            shutil.rmtree(self.place, ignore_errors=True)
        return self.found

    def points(self, kinds: list[str]) -> list[int]:
        """Return the numbers (from 1) of the calls before which a fault is caused; the last is for after all calls."""
        wanted: list[int] = []
        met: Counter[str] = Counter()
        for point, kind in enumerate(kinds, start=1):
            met[kind] += 1
            if kind in CALLS[self.fault] and (self.every or met[kind] % ONE_IN.get(kind, 1) == 0):
                wanted.append(point)
        if self.fault == "truncated" and not self.every:
            wanted = wanted[::3]
        wanted.append(len(kinds) + 1)
        # A scattered order finds most bugs early, because a bug usually affects several successive calls.
        return [wanted[i * STRIDE % len(wanted)] for i in range(len(wanted))] if len(wanted) % STRIDE else wanted

    def at_point(self, scene: Path, jobs: int, point: int, kind: str) -> None:
        where = f"{self.fault} at call {point} ({kind}) of job {jobs}"
        if self.fault == "kill":
            self.crash(scene, jobs, point)
            self.check(World(self.place / "now", jobs + 1), where)
        elif self.fault == "power cut":
            self.power_cuts(scene, jobs, point, where)
        elif self.fault == "error":
            every = [(code, FAIL_ONCE) for code in ERRORS.get(kind, ())] + [(errno.EROFS, FAIL_ON)]
            for code, how in every if self.every else [every[point % len(every)]]:
                self.error(
                    scene, jobs, point, how, code, f"{errno.errorcode[code]} at call {point} ({kind}) of job {jobs}"
                )
        elif self.fault == "zombie":
            self.zombie(scene, jobs, point, where)
        elif self.fault == "truncated":
            self.crash(scene, jobs, point)
            self.truncate(World(self.place / "now", jobs + 1), point, where)

    def inject(self, world: World, how: int, point: int, code: int = 0, shadow: Path | None = None) -> tuple[int, Any]:
        """Run the job in a new process, with this fault at this call; see `forked`."""

        def work() -> Any:
            self.take_away()
            journal = bytes(shadow) if shadow else None
            self.library.fault_arm(bytes(world.run_folder.parent), how, point, code, None, journal)
            return world.work()

        return self.forked(work)

    def crash(self, scene: Path, jobs: int, point: int) -> None:
        status, problem = self.inject(self.world(scene, jobs), KILL, point)
        if not (os.WIFSIGNALED(status) or isinstance(problem, Ending)):
            self.found.violations.append(f"the job neither died nor ended: {problem}")

    def power_cuts(self, scene: Path, jobs: int, point: int, where: str) -> None:
        shadow = self.place / "shadow"
        shutil.rmtree(shadow, ignore_errors=True)
        shadow.mkdir()
        world = self.world(scene, jobs)
        disk = Disk.of(world.run_folder)
        self.inject(world, KILL, point, shadow=shadow)
        disk.replay(shadow)
        disk.look(world.run_folder)
        aside = {p.name: p.read_bytes() for p in world.folder.iterdir() if p.is_file()}
        seen = set()
        for variant in VARIANTS:
            tree = disk.after_power_cut(variant, seed=point)
            digest = hashlib.sha256(repr(sorted(tree.items())).encode()).hexdigest()
            if digest in seen:
                continue
            seen.add(digest)
            for name, data in aside.items():
                (world.folder / name).write_bytes(data)
            write_tree(world.run_folder, tree)
            self.check(World(world.folder, jobs + 1), f"{where}, {variant}")

    def error(self, scene: Path, jobs: int, point: int, how: int, code: int, where: str) -> None:
        world = self.world(scene, jobs)
        status, outcome = self.inject(world, how, point, code)
        if os.WIFSIGNALED(status) or isinstance(outcome, str) or outcome is None:
            self.found.violations.append(f"{where}: no clear error but {outcome or status}")
        elif isinstance(outcome, Ending) and outcome.error and "Error: " not in outcome.outcome:
            self.found.violations.append(f"{where}: unclear: {outcome.outcome}")
        self.check(World(world.folder, jobs + 1), where)

    def zombie(self, scene: Path, jobs: int, point: int, where: str) -> None:
        """Stop the job; another process mends the chain and runs the next job. Then let the stopped job continue."""
        world = self.world(scene, jobs)
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            self.take_away()
            self.library.fault_arm(bytes(world.run_folder.parent), STOP, point, 0, None, None)
            try:
                world.work()
            except OrchError:
                pass
            except BaseException:
                os.write(writer, traceback.format_exc().encode()[-4000:])
            os._exit(0)
        os.close(writer)
        _, status = os.waitpid(pid, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            later = World(world.folder, jobs + 1)

            def go_on() -> None:
                later.mend()
                later.work()

            # If the job was stopped while it held the lock, the others can't work until it continues.
            if self.holds_no_lock(world):
                _, problem = self.forked(go_on)
                if problem is not None:
                    self.found.violations.append(f"{where}: the others: {problem}")
            os.kill(pid, signal.SIGCONT)
            os.waitpid(pid, 0)
        with os.fdopen(reader) as pipe:
            if problem := pipe.read():
                self.found.violations.append(f"{where}: the zombie: {problem}")
        self.check(World(world.folder, jobs + 2), where)

    def holds_no_lock(self, world: World) -> bool:
        for name in ("orch.db.lock.queue", "orch.db.lock"):
            path = world.run_folder / name
            if path.exists():
                with open(path) as file:
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        return False
        return True

    def truncate(self, world: World, point: int, where: str) -> None:
        """Truncate a checkpoint in addition to the crash, and check the result."""
        files = sorted((world.run_folder / "checkpoints").glob("*.pt"))
        if files:
            victim = files[point % len(files)]
            victim.write_bytes(victim.read_bytes()[: -1 - point % 7])
            self.check(world, f"{where}, {victim.name} truncated", damaged=True)

    # --- checks

    def check(self, world: World, where: str, damaged: bool = False) -> None:
        """Reopen and mend the run and check every invariant. Then continue to the end of the run and check again."""
        self.found.checks += 1

        def look() -> tuple[str, list[str]]:
            wrong = [] if damaged else torn(world.run_folder / "checkpoints")
            run = world.mend()
            wrong += [] if damaged else violations(run, over=False)
            wrong += world.broken_promises(run)
            state = hashlib.sha256(repr(dump(run)).encode()).hexdigest()
            return state, wrong

        _, looked = self.forked(look)
        if not isinstance(looked, tuple):
            self.found.violations.append(f"{where}: it can't be reopened: {looked}")
            return
        state, wrong = looked
        if state not in self.known:
            self.found.states += 1
            self.known[state] = self.go_on(world)
        self.found.violations += [f"{where}: {line}" for line in wrong]
        self.found.violations += [f"{where}, at the end: {line}" for line in self.known[state]]

    def go_on(self, world: World) -> list[str]:
        """Continue to the end of the run and check again."""

        def finish() -> None:
            if self.fault == "truncated":  # the work after the fault is under test, so it runs without the safeguard
                self.take_away()
                run = world.mend()  # a longer run, in which each entry is trained, and therefore verified, again
                run.amend(["stop_after_epochs=20"], world.now())
                run.resume(world.now())
            world.finish()

        def look() -> list[str]:
            run = world.open()
            board = run.board()["entries"]
            wrong = violations(run) + world.broken_promises(run)
            return wrong if len(board) == 2 else [*wrong, f"the board has {len(board)} entries at the end"]

        _, problem = self.forked(finish)
        if problem is not None:
            return [f"it does not go on: {problem}"]
        _, wrong = self.forked(look)
        return wrong if isinstance(wrong, list) else [f"it can't be opened: {wrong}"]


def torn(folder: Path) -> list[str]:
    """Return files that have their final name but are incomplete. (The scripted trainer's checkpoints are JSON too.)"""
    found = []
    for path in folder.glob("g*"):
        try:
            json.loads(path.read_bytes())
        except ValueError:
            found.append(f"1: {path.name} is incomplete")
    return found


def main() -> None:
    logging.getLogger("orch").addHandler(logging.NullHandler())  # the jobs' messages about their faults
    logging.getLogger("orch").propagate = False
    asked = json.loads(sys.argv[1])
    first = asked.get("stop_at_first", False)
    explorer = Explorer(
        asked["fault"], asked.get("shard", 0), asked.get("shards", 1), asked.get("mutation"),
        asked.get("every", False),
    )  # fmt: skip
    found = explorer.explore(lambda: first and bool(explorer.found.violations))
    print(
        json.dumps(
            {
                "points": found.points, "checks": found.checks, "states": found.states, "calls": found.calls,
                "violations": found.violations[:200], "violated": len(found.violations),
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
