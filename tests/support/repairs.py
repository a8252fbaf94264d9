"""Ways to damage a run's database, and to repair the run."""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from orchestrator.run.repair import RepairReport, repair
from orchestrator.run.run import Run
from tests.support.small_runs import ROOT
from tests.support.storage import Storage

ORCH = Path(sys.executable).with_name("orch")
SQLITE = Storage(None)
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # faster than a disk
# Scores for a board with three slots: founders, promoted children and discarded children.
SCRIPT = [0.3, 0.5, 0.4, 0.6, 0.1, 0.2, 0.7, 0.55, 0.65, 0.05, 0.75]


def orch(folder: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ORCH), *arguments, "--runs-dir", str(folder)], capture_output=True, text=True, timeout=120, cwd=ROOT,
        env={**os.environ, **(env or {})}, check=False,
    )  # fmt: skip


def repaired(folder: Path, dry_run: bool = False, force: bool = False) -> RepairReport:
    return repair(folder, dry_run, force, time.time())


def everything(folder: Path) -> dict[str, bytes]:
    """Read all files of a run except the locks."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".lock" not in path.name
    }


def drop(run: Run) -> None:
    if run.leaderboard.database.file is None:
        run.leaderboard.database.drop(schema_too=True)
        run.leaderboard.database.release_connection()


def resumed(run: Run) -> Run:
    run.leaderboard.run_state.change_state("active", ["paused"], None, time.time())
    return run


def _delete(file: Path) -> None:
    file.unlink()


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _random_bytes(file: Path) -> None:
    data = bytearray(file.read_bytes())
    third = len(data) // 3
    data[third : 2 * third] = random.Random(3).randbytes(third)
    file.write_bytes(data)


def _random_head(file: Path) -> None:
    file.write_bytes(random.Random(4).randbytes(200) + file.read_bytes()[200:])


def _text(file: Path) -> None:
    file.write_text("all work and no play\n" * 500)


def _sql(*statements: str) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        with closing(sqlite3.connect(file)) as connection:
            for statement in statements:
                connection.execute(statement)
            connection.commit()

    return damage


DAMAGE = {
    "deleted": _delete,
    "empty": _empty,
    "truncated": _truncate,
    "with random bytes in the middle": _random_bytes,
    "with random bytes at its head": _random_head,
    "a text file": _text,
    "without a table": _sql("DROP TABLE epoch"),
    "without the run's row": _sql("DELETE FROM run"),
    "with orphans": _sql("PRAGMA foreign_keys=OFF", "DELETE FROM checkpoint WHERE checkpoint_id = 1"),
    "with an unknown state": _sql("UPDATE chunk SET state = 'sleeping'"),
    "with an unknown reason": _sql("UPDATE chunk SET expired_by = 'sleep'"),
    "with a generation that was never issued": _sql("UPDATE run SET generation = 1"),
    "with a score that its record contradicts": _sql("UPDATE checkpoint SET score = 0.99"),
    "with settings that are not valid": _sql("UPDATE run SET settings = '{'"),
    "with metrics that are not JSON": _sql("UPDATE checkpoint SET metrics = '{'"),
    "with more entries than slots": _sql(
        "UPDATE checkpoint SET released = 0", "UPDATE entry SET on_board = 1, evicted_at = NULL, evicted_by = NULL"
    ),
}
