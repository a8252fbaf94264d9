"""The doctor's findings about this machine, as tables: facts and the findings that they give."""

from __future__ import annotations

import stat
from typing import Any

import pytest

from orchestrator.doctor import machine
from orchestrator.doctor.findings import worst
from orchestrator.doctor.machine import FolderFacts, PythonFacts
from orchestrator.files.run_folder import nearest_folder
from orchestrator.locking.choice import Choice
from orchestrator.locking.mounts import Mount
from tests.support.doctoring import VERSIONS, levels

GOOD = PythonFacts("3.11.7", VERSIONS, "12.4", ("H200",))


@pytest.mark.parametrize(
    ("given", "listed", "expected", "levels_"),
    [
        (GOOD, 1, True, ["ok", "ok"]),
        (PythonFacts(error="ImportError: no torch"), 0, False, ["error"]),
        (PythonFacts("3.11.7", {"torch": "2"}, None), 0, False, ["ok", "error", "note"]),
        (PythonFacts("3.11.7", VERSIONS, None), 0, False, ["ok", "note"]),  # a login node
        (PythonFacts("3.11.7", VERSIONS, None), 2, False, ["ok", "warning"]),  # a CPU build beside GPUs
        (PythonFacts("3.11.7", VERSIONS, "12.4"), 2, False, ["ok", "warning"]),  # the driver is too old
        (PythonFacts("3.11.7", VERSIONS, "12.4"), 0, True, ["ok", "error"]),  # a job that requested a GPU has none
        (PythonFacts("3.11.7", VERSIONS, None), 0, True, ["ok", "error"]),
    ],
)
def test_the_python_environment(given, listed, expected, levels_):
    assert levels(machine.judge_python(given, listed, expected)) == levels_


def folder(**changes: Any) -> FolderFacts:
    values = {
        "runs_dir": "/scratch/runs",
        "exists": True,
        "looked_at": "/scratch/runs",
        "not_writable": None,
        "mode": stat.S_IFDIR | 0o755,
        "mount": Mount("/work", "nfs4", "nas:/work", ("rw", "vers=4.2")),
        "free_bytes": 500 * machine.GIB,
        "free_files": 10**7,
        "lock_error": None,
    }
    return FolderFacts(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "ok"),
        ({"mode": stat.S_IFDIR | 0o775}, "ok"),
        ({"mode": stat.S_IFDIR | 0o777}, "warning"),
        ({"mode": stat.S_IFDIR | 0o1777}, "warning"),  # every user may write to it, even with the sticky bit
        ({"mode": stat.S_IFDIR | 0o1777, "exists": False, "looked_at": "/tmp"}, "ok"),
        ({"mode": stat.S_IFDIR | 0o777, "exists": False, "looked_at": "/work"}, "warning"),
        ({"not_writable": "Permission denied"}, "error"),
    ],
)
def test_the_runs_folder(changes, expected):
    assert worst(machine.judge_folder(folder(**changes))) == expected


@pytest.mark.parametrize(
    ("free_gib", "files", "expected"),
    [(500, 10**7, "ok"), (19, 10**7, "warning"), (0.5, 10**7, "error"), (500, 9, "warning"), (500, None, "ok")],
)
def test_the_disk(free_gib, files, expected):
    assert worst(machine.judge_disk(folder(free_bytes=int(free_gib * machine.GIB), free_files=files))) == expected


def test_a_disk_with_room_names_the_command_for_the_quota():
    (finding,) = machine.judge_disk(folder())
    assert "quota -s" in finding.what


EXT4 = Mount("/", "ext4", "/dev/sda1", ("rw",))
BEEGFS = Mount("/bee", "beegfs", "beegfs_nodev", ("rw",))
LOCALFLOCK = Mount("/lustre", "lustre", "mgs:/fs", ("rw", "localflock"))


@pytest.mark.parametrize(
    ("changes", "slurm", "server", "proven", "expected"),
    [
        ({}, True, False, None, "ok"),
        ({"mount": EXT4}, False, False, None, "note"),
        ({"mount": EXT4}, True, False, None, "warning"),  # the nodes of a cluster do not share a local file system
        ({"mount": EXT4}, True, False, True, "ok"),  # the two-node test passed, because both nodes are one machine
        ({"mount": BEEGFS}, True, False, None, "warning"),
        ({"mount": BEEGFS}, True, False, True, "ok"),
        ({"mount": BEEGFS}, True, False, False, "warning"),  # the two-node test reports the errors itself
        ({"mount": LOCALFLOCK}, True, False, None, "error"),
        ({"mount": LOCALFLOCK}, True, False, True, "error"),  # a passed test does not outweigh the mount options
        ({"mount": LOCALFLOCK}, True, True, None, "ok"),  # PostgreSQL needs no lock
        ({"mount": None}, True, False, None, "warning"),
        ({"lock_error": "a lock can't be taken: [Errno 38]"}, True, False, None, "error"),
        ({"mount": LOCALFLOCK, "lock": Choice("soft", "")}, True, False, None, "note"),  # flock is not needed
        ({"mount": BEEGFS, "lock": Choice("soft", "")}, True, False, None, "note"),
        ({"mount": LOCALFLOCK, "lock": Choice("flock", "")}, True, False, None, "error"),
    ],
)
def test_the_locks_of_the_runs_folder(changes, slurm, server, proven, expected):
    assert worst(machine.judge_locks(folder(**changes), slurm, server, proven)) == expected


def test_a_home_folder_that_is_full_is_a_warning():
    assert machine.judge_home(None).level == "ok"
    assert machine.judge_home("Disk quota exceeded").level == "warning"


def test_the_nearest_folder_is_the_one_itself_or_the_first_above_it(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    assert nearest_folder(tmp_path) == tmp_path
    assert nearest_folder(tmp_path / "link" / "a" / "b") == tmp_path / "link"
