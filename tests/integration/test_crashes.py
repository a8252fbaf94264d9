"""A job dies, loses power, is stopped, or gets an error at each call that changes a file: nothing is lost.

`make crashes` tests every call with every error, and removes every safeguard. The short form, which is part of the test
suite, tests fewer calls: one in ten of those that write a page of the database, one in four of those that open a file,
and all others. It truncates a checkpoint at one in three of the calls. `make test` tests the first part of these calls,
and `make test-long` the other parts. See tests/crash/explore.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.crash.explore import CALLS
from tests.crash.mutations import MUTATIONS

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "tests/crash/faults.c"
EVERY = os.environ.get("ORCH_CRASHES") == "every"
# The safeguards that the short form removes: at least one for each kind of fault but errors.
SHORT = (
    "no fsync of the checkpoints' folder",
    "no fsync by SQLite",
    "the evicted file is deleted before the commit",
    "no generation check",
    "no checksum",
)
SHARDS = {"kill": 2, "power cut": 4, "error": 4, "zombie": 2, "truncated": 2}  # parts; the calls of each are scattered
PARTS = [
    pytest.param(fault, shard, marks=pytest.mark.long if shard else ())
    for fault in CALLS
    for shard in range(SHARDS[fault])
]
AT_LEAST = {
    "kill": 75,
    "power cut": 150,
    "error": 160,
    "zombie": 75,
    "truncated": 25,
}  # points, short form


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile faults.c. Skips the test if there is no C compiler or the system is not Linux."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("a C library makes the faults at Linux system calls: needs Linux and gcc")
    library = tmp_path_factory.mktemp("crash") / "faults.so"
    command = [compiler, "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True)
    return library


def explore(library: Path, **asked: Any) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.crash.explore", json.dumps(asked)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "LD_PRELOAD": str(library)}, timeout=7000, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.timeout(7200 if EVERY else 600)
@pytest.mark.parametrize(("fault", "shard"), PARTS)
def test_after_a_fault_at_any_call_every_invariant_holds_and_the_run_reaches_its_end(
    library: Path, fault: str, shard: int
) -> None:
    found = explore(library, fault=fault, shard=shard, shards=SHARDS[fault], every=EVERY)
    print(
        f"{fault}, part {shard + 1} of {SHARDS[fault]}: {found['points']} points, {found['checks']} checks, "
        f"{found['states']} different states continued to the end, {found['violated']} violations"
    )
    assert found["violations"] == []
    assert found["points"] >= AT_LEAST[fault] / SHARDS[fault]
    assert found["checks"] >= found["points"] - 1
    assert found["states"] > 3


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutation", [pytest.param(m, marks=() if m in SHORT else pytest.mark.long) for m in MUTATIONS])
def test_the_tests_notice_when_a_safeguard_is_removed(library: Path, mutation: str) -> None:
    found = explore(library, fault=MUTATIONS[mutation][0], mutation=mutation, stop_at_first=True)
    assert found["violations"], f"{found['points']} points, and no violation"
    print(f"{mutation}: noticed after {found['points']} points: {found['violations'][0]}")
