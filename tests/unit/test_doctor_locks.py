"""Locks: what the mount options guarantee, and the counting test on this machine, with working and broken locks."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from sqlalchemy.exc import DBAPIError

from orchestrator.doctor import locks
from orchestrator.doctor.findings import Finding, worst
from orchestrator.doctor.locks import Unreadable, judge_counts, lock_advice, quota_command
from orchestrator.errors import LeaderboardError
from orchestrator.locking import proof
from orchestrator.locking.flock import FairFileLock
from orchestrator.locking.mounts import Mount, mount_here, mount_of
from orchestrator.locking.proof import Tally, percentile
from tests.support.doctoring import tally

MOUNTINFO = r"""
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro
25 22 0:23 / /dev/shm rw,nosuid,nodev shared:2 - tmpfs tmpfs rw,size=1024k
30 22 0:40 / /home rw,relatime shared:3 - autofs systemd-1 rw,fd=46,pgrp=1,timeout=0
31 22 0:41 / /home rw,relatime shared:4 master:1 - nfs4 nas:/home rw,vers=4.2,hard,proto=tcp,local_lock=none
32 22 0:42 / /old rw,relatime - nfs filer:/vol/old rw,vers=3,nolock,proto=tcp,local_lock=all
33 22 0:43 / /scratch rw,noatime shared:5 - lustre 10.0.0.1@o2ib:/fs1 rw,checksum,flock,user_xattr,lruresize
34 33 0:44 / /scratch/node\040local rw shared:6 - xfs /dev/nvme0n1 rw,attr2
35 22 0:45 / /gpfs rw,relatime shared:7 - gpfs gpfs0 rw
36 22 0:46 /vol /quiet rw -  tmpfs  rw
not a line of mountinfo
"""


@pytest.mark.parametrize(
    ("path", "point", "fstype"),
    [
        ("/", "/", "ext4"),
        ("/var/lib/runs", "/", "ext4"),
        ("/homework", "/", "ext4"),  # not inside /home, although the name begins with it
        ("/home/me/runs", "/home", "nfs4"),  # of two mounts at one point, the later one hides the earlier one
        ("/dev/shm", "/dev/shm", "tmpfs"),
        ("/old/x", "/old", "nfs"),
        ("/scratch/me", "/scratch", "lustre"),
        ("/scratch/node local/runs", "/scratch/node local", "xfs"),  # longer than /scratch; \040 is a space
        ("/gpfs/project", "/gpfs", "gpfs"),
    ],
)
def test_a_path_is_on_the_mount_with_the_longest_point_above_it(path, point, fstype):
    mount = mount_of(MOUNTINFO, path)
    assert mount is not None
    assert (mount.point, mount.fstype) == (point, fstype)


def test_a_mount_has_the_options_of_the_mount_and_of_the_file_system():
    mount = mount_of(MOUNTINFO, "/scratch")
    assert mount == Mount(
        "/scratch",
        "lustre",
        "10.0.0.1@o2ib:/fs1",
        ("rw", "noatime", "checksum", "flock", "user_xattr", "lruresize"),
    )


@pytest.mark.parametrize("text", ["", "36 35 98:0 /mnt1", "nonsense - nonsense"])
def test_no_mount_is_found_where_there_is_none(text):
    assert mount_of(text, "/home") is None


def test_this_machine_s_own_mountinfo_can_be_read(tmp_path):
    mount = mount_here(tmp_path)
    assert mount is not None
    assert tmp_path.is_relative_to(mount.point)


@pytest.mark.parametrize(
    ("fstype", "options", "level", "words"),
    [
        ("ext4", "rw,relatime", "note", "one machine"),
        ("tmpfs", "rw", "note", "one machine"),
        ("overlay", "rw", "note", "one machine"),
        ("nfs4", "rw,vers=4.2,local_lock=none", "ok", "NFS 4.2"),
        ("nfs4", "rw", "ok", "NFS 4"),
        ("nfs4", "rw,vers=4.1,local_lock=flock", "error", "local_lock=flock"),
        ("nfs4", "rw,vers=4.1,local_lock=posix", "ok", "NFS 4.1"),  # only POSIX locks are local; orch uses flock
        ("nfs", "rw,vers=3,local_lock=none", "note", "lockd"),
        ("nfs", "rw,vers=3,nolock,local_lock=all", "error", "nolock"),
        ("nfs", "rw,nfsvers=3,nolock", "error", "one node only"),
        ("nfs", "rw,vers=4.0", "ok", "NFS 4.0"),
        ("lustre", "rw,flock", "ok", "flock"),
        ("lustre", "rw,localflock", "error", "localflock"),
        ("lustre", "rw,noflock", "error", "noflock"),
        ("lustre", "rw,lazystatfs", "warning", "no flock option"),
        ("gpfs", "rw", "note", "GPFS"),
        ("beegfs", "rw,cfgFile=/etc/beegfs/beegfs-client.conf", "warning", "tuneUseGlobalFileLocks"),
        ("ceph", "rw,acl", "ok", "CephFS"),
        ("cifs", "rw,vers=3.0,nobrl", "error", "nobrl"),
        ("smb3", "rw", "warning", "server"),
        ("afs", "rw", "warning", "AFS"),
        ("fuse.sshfs", "rw", "error", "no locks"),
        ("fuse.s3fs", "rw", "error", "no locks"),
        ("newfs", "rw", "warning", "does not know"),
    ],
)
def test_what_is_known_about_the_locks_of_a_file_system(fstype, options, level, words):
    finding = lock_advice(fstype, options.split(","))
    assert finding.level == level
    assert words in finding.what
    if level == "error":
        assert "PostgreSQL" in finding.do


@pytest.mark.parametrize(
    ("fstype", "command"), [("lustre", "lfs quota -hu $USER /work"), ("nfs4", "quota -s"), ("ext4", None)]
)
def test_the_command_that_shows_a_quota(fstype, command):
    assert quota_command(Mount("/work", fstype, "x", ())) == command


# --- counting


def count_together(work: Callable[[int], Tally], tasks: int = 2) -> list[Tally]:
    tallies: list[Tally] = []
    start = threading.Barrier(tasks)

    def run(task: int) -> None:
        start.wait()
        tallies.append(work(task))

    threads = [threading.Thread(target=run, args=[task]) for task in range(tasks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return tallies


def count_with(lock: Callable[[], AbstractContextManager[object]], path: Path, times: int = 100) -> list[Finding]:
    proof.prepare_file(path)
    tallies = count_together(lambda _task: proof.count_in_file(path, lock(), times, 60))
    return judge_counts("lock", tallies, proof.counted_in_file(path), "in two threads")


def test_a_lock_that_holds_loses_nothing(tmp_path):
    findings = count_with(lambda: FairFileLock(tmp_path / "lock"), tmp_path / "counter")
    assert "error" not in [finding.level for finding in findings], "how long the waits are is this machine's affair"
    assert proof.counted_in_file(tmp_path / "counter") == 200


def test_without_a_lock_updates_are_lost_and_that_is_detected(tmp_path):
    (finding,) = count_with(contextlib.nullcontext, tmp_path / "counter")
    assert finding.level == "error"
    assert "updates were lost: the lock does not work" in finding.what
    assert "PostgreSQL" in finding.do


def test_a_lock_that_fails_is_an_error_and_is_given_up_after_some_errors(tmp_path):
    class Refusing:
        def __enter__(self) -> None:
            raise OSError(37, "No locks available")

        def __exit__(self, *_: object) -> None: ...

    proof.prepare_file(tmp_path / "counter")
    tally = proof.count_in_file(tmp_path / "counter", Refusing(), 100, 60)
    assert (tally.done, len(tally.errors)) == (0, proof.GIVE_UP_AFTER)
    (finding,) = judge_counts("lock", [tally], 0, "here")
    assert finding.level == "error"
    assert "No locks available" in finding.what


def test_the_database_loses_nothing(tmp_path):
    locks.prepare_database(tmp_path / "database")
    tallies = count_together(lambda _task: locks.count_in_database(tmp_path / "database", 20, 60))
    assert locks.counted_in_database(tmp_path / "database") == 40
    (finding,) = judge_counts("database", tallies, 40, "in two threads")
    assert finding.level == "ok"


def test_a_count_ends_when_its_time_is_over(tmp_path):
    proof.prepare_file(tmp_path / "counter")
    tally = proof.count_in_file(tmp_path / "counter", contextlib.nullcontext(), 10**6, 0.05)
    assert 0 < tally.done < 10**6
    (finding,) = judge_counts("lock", [tally], tally.done, "here")
    assert finding.level == "warning"
    assert "in time" in finding.what


@pytest.mark.parametrize(
    ("tallies", "counted", "level", "words"),
    [
        ([tally(), tally()], 600, "ok", "600 updates, 0 lost"),
        ([tally(), tally()], 599, "error", "1 of 600 updates were lost"),
        ([tally(), tally(switches=0)], 600, "ok", "0 lost"),
        ([tally(switches=0), tally(switches=0)], 600, "warning", "nothing is proven"),
        ([tally(), tally(done=200)], 500, "warning", "only 500 of 600"),
        (
            [tally(), tally(done=299, errors=("x",), busy=1)],
            599,
            "error",
            "found its file locked 1 time:",
        ),
        ([tally(waits=(3.0,)), tally(waits=(3.0,))], 600, "warning", "waits are long"),
        ([tally(), tally()], Unreadable("the database is damaged"), "error", "damaged"),
    ],
)
def test_what_a_count_means(tallies, counted, level, words):
    findings = judge_counts("lock", tallies, counted, "between a and b")
    assert worst(findings) == level
    assert words in findings[0].what


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([], 0.5, 0.0), ([1.0], 0.99, 1.0), ([1.0, 2.0], 0.5, 1.0), (list(map(float, range(1, 101))), 0.99, 99.0)],
)
def test_percentiles(values, share, expected):
    assert percentile(values, share) == expected


@pytest.mark.parametrize("wrapped", [False, True], ids=["the driver's error", "SQLAlchemy's error around it"])
def test_a_file_that_sqlite_finds_locked_is_counted_by_its_error_code(tmp_path, wrapped):
    with sqlite3.connect(tmp_path / "file", isolation_level=None) as holder:
        holder.execute("BEGIN EXCLUSIVE")

        @contextlib.contextmanager
        def opened() -> Iterator[proof.Access]:
            try:
                sqlite3.connect(tmp_path / "file", timeout=0, isolation_level=None).execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                raise LeaderboardError("no") from (DBAPIError(None, None, error) if wrapped else error)
            yield lambda: 0, lambda _number: None

        tally = proof.count("database", opened, 2, 60, locks._is_busy)
    assert (tally.busy, tally.errors) == (2, ("LeaderboardError: no",) * 2)


def test_other_errors_are_not_counted_as_a_locked_file(tmp_path):
    (tmp_path / "orch.db").write_bytes(b"not a database" * 100)
    tally = locks.count_in_database(tmp_path, 1, 60)
    assert (tally.busy, len(tally.errors)) == (0, 1)
