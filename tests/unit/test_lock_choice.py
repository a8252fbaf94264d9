"""The choice of a run's lock, from the mount options, the result of the test, and whether jobs use several nodes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from orchestrator.errors import LockError
from orchestrator.leaderboard.engine import Database
from orchestrator.locking.choice import Choice, decide, lock_of, read_record, record_path, write_record
from orchestrator.locking.flock import FairFileLock
from orchestrator.locking.mounts import mount_of
from orchestrator.locking.soft_lock import SoftLock
from orchestrator.records import LockKind

ONE, SEVERAL = False, True
Problems = Mapping[LockKind, str | None]
HOLD: Problems = {"flock": None, "soft": None}
NO_LINKS: Problems = {"flock": None, "soft": "hard links unavailable"}
NO_FLOCK: Problems = {"flock": "7 of 50 updates were lost", "soft": None}
NOTHING: Problems = {"flock": "7 of 50 updates were lost", "soft": "hard links unavailable"}


def decided(fstype: str, options: str, several: bool, wanted: str = "auto", proofs: Problems = HOLD) -> str:
    """Return the kind of lock, or the text of the refusal."""
    line = f"36 25 0:40 / /runs rw,relatime shared:1 - {fstype} server:/runs {options}"
    try:
        return decide(mount_of(line, "/runs/a"), several, wanted, proofs.__getitem__).kind
    except LockError as error:
        return str(error)


@pytest.mark.parametrize(
    ("fstype", "options", "one_node", "several_nodes"),
    [
        ("ext4", "rw", "flock", "flock"),
        ("xfs", "rw", "flock", "flock"),
        ("btrfs", "rw", "flock", "flock"),
        ("tmpfs", "rw", "flock", "flock"),
        ("overlay", "rw,lowerdir=/l", "flock", "flock"),
        ("nfs4", "rw,vers=4.2,local_lock=none", "flock", "flock"),
        ("nfs4", "rw,vers=4.1,local_lock=posix", "flock", "flock"),
        ("nfs4", "rw,vers=4.1,local_lock=flock", "soft", "soft"),
        ("nfs4", "rw,vers=4.1,local_lock=all", "soft", "soft"),
        ("nfs", "rw,vers=3,local_lock=none", "flock", "flock"),
        ("nfs", "rw,vers=3,nolock,local_lock=all", "soft", "soft"),
        ("lustre", "rw,flock", "flock", "flock"),
        ("lustre", "rw,localflock", "soft", "soft"),
        ("lustre", "rw,noflock", "soft", "soft"),
        ("lustre", "rw,lazystatfs", "soft", "soft"),
        ("gpfs", "rw", "flock", "flock"),
        ("beegfs", "rw", "soft", "soft"),
        ("ceph", "rw", "flock", "flock"),
        ("fuse.ceph-fuse", "rw", "flock", "flock"),
        ("afs", "rw", "soft", "soft"),
        ("9p", "rw,trans=virtio,cache=none", "soft", "soft"),
        ("9p", "rw,trans=virtio,cache=loose", "flock", "9p: whether locks work"),
        ("cifs", "rw,vers=3.0", "flock", "depends on its server"),
        ("cifs", "rw,vers=3.0,nobrl", "flock", "mounted with nobrl"),
        ("fuse.sshfs", "rw", "fuse.sshfs has no locks", "fuse.sshfs has no locks"),
        ("fuse.s3fs", "rw", "fuse.s3fs has no locks", "fuse.s3fs has no locks"),
        ("newfs", "rw", "soft", "soft"),
    ],
)
def test_the_lock_that_each_file_system_gets(fstype, options, one_node, several_nodes):
    for several, expected in ((ONE, one_node), (SEVERAL, several_nodes)):
        found = decided(fstype, options, several)
        assert found == expected or (" " in expected and expected in found)


@pytest.mark.parametrize(
    ("fstype", "options", "several", "wanted", "proofs", "expected"),
    [
        pytest.param("ext4", "rw", ONE, "auto", NO_FLOCK, "soft", id="the proof wins over the table"),
        pytest.param("nfs4", "rw,vers=4.2", SEVERAL, "auto", NO_FLOCK, "soft", id="on NFS too"),
        pytest.param("nfs", "rw,nolock", ONE, "auto", NO_LINKS, "flock", id="no links, one node: flock will do"),
        pytest.param("nfs", "rw,nolock", SEVERAL, "auto", NO_LINKS, "hard links unavailable", id="no links, more"),
        pytest.param("ext4", "rw", ONE, "auto", NOTHING, "7 of 50 updates were lost", id="nothing holds"),
        pytest.param("ext4", "rw", ONE, "flock", NO_FLOCK, "7 of 50 updates", id="what was asked for does not hold"),
        pytest.param("ext4", "rw", ONE, "soft", HOLD, "soft", id="the soft lock was asked for"),
        pytest.param("ext4", "rw", ONE, "soft", NO_LINKS, "hard links unavailable", id="and does not hold"),
        pytest.param("beegfs", "rw", SEVERAL, "flock", HOLD, "flock", id="the user knows what a mount does not show"),
        pytest.param("newfs", "rw", SEVERAL, "flock", HOLD, "flock", id="the same of an unknown one"),
        pytest.param("nfs", "rw,nolock", SEVERAL, "flock", HOLD, "mounted with nolock", id="known to be wrong"),
        pytest.param("lustre", "rw,localflock", SEVERAL, "flock", HOLD, "localflock", id="known to be wrong, Lustre"),
        pytest.param("nfs", "rw,nolock", ONE, "flock", HOLD, "flock", id="on one node it is right"),
        pytest.param("fuse.s3fs", "rw", ONE, "soft", HOLD, "which needs hard links", id="there are none"),
    ],
)
def test_the_proof_and_the_setting_decide_too(fstype, options, several, wanted, proofs, expected):
    found = decided(fstype, options, several, wanted, proofs)
    assert found == expected or (" " in found and expected in found)


@pytest.mark.parametrize(("several", "wanted", "proofs"), [(SEVERAL, "flock", HOLD), (SEVERAL, "auto", NO_LINKS)])
def test_a_refusal_names_the_mount_and_what_else_can_be_done(several, wanted, proofs):
    text = decided("nfs", "rw,vers=3,nolock", several, wanted, proofs)
    assert text.startswith("nfs on /runs: ")
    assert '"database": "postgresql+psycopg://' in text
    assert "--runs-dir" in text
    assert "\n" not in text


def test_where_the_kernel_names_no_mount_the_proof_alone_decides():
    assert decide(None, ONE, "auto", HOLD.__getitem__) == Choice("soft", "proven on this file system")


# --- the record of the choice ------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "cls"), [("flock", FairFileLock), ("soft", SoftLock)])
def test_every_process_takes_the_lock_that_is_recorded_beside_the_database(tmp_path, kind, cls):
    choice = Choice(kind, "proven on ext4 on /")
    write_record(tmp_path / "orch.db", choice)
    assert read_record(tmp_path / "orch.db") == choice
    assert isinstance(lock_of(choice, tmp_path / "orch.db"), cls)
    assert Database(None, tmp_path).lock_choice == choice


def test_a_run_from_before_there_was_a_choice_has_flock(tmp_path):
    assert read_record(tmp_path / "orch.db").kind == "flock"


def test_a_record_that_is_gone_is_not_taken_for_flock_where_the_soft_lock_was_in_use(tmp_path):
    with SoftLock(tmp_path / "orch.db.lock", timeout=5):
        pass
    with pytest.raises(LockError, match="the soft lock was in use here"):
        Database(None, tmp_path)


@pytest.mark.parametrize("text", ["", "{}", '{"kind": "lease", "why": ""}', '{"kind": "soft", "why": "", "more": 1}'])
def test_a_damaged_record_is_an_error_that_says_what_to_do(tmp_path, text):
    record_path(tmp_path / "orch.db").write_text(text)
    with pytest.raises(LockError, match="Put it back from a backup"):
        read_record(tmp_path / "orch.db")


@pytest.mark.parametrize("kind", ["flock", "soft"])
def test_where_the_mount_refuses_sqlite_s_own_locks_it_works_without_them(tmp_path: Path, monkeypatch, kind):
    write_record(tmp_path / "orch.db", Choice(kind, "", sqlite_locks=False))
    database = Database(None, tmp_path)
    with database.creation() as connection:
        connection.exec_driver_sql("CREATE TABLE t (n INTEGER)")
    with database.transaction() as connection:
        connection.exec_driver_sql("INSERT INTO t VALUES (7)")
        inode = (tmp_path / "orch.db").stat().st_ino
        assert f":{inode} " not in Path("/proc/locks").read_text()
    with database.transaction() as connection:
        assert connection.exec_driver_sql("SELECT n FROM t").scalar_one() == 7


def test_the_record_is_plain_json(tmp_path):
    write_record(tmp_path / "orch.db", Choice("soft", "proven on nfs on /runs", sqlite_locks=False))
    assert json.loads((tmp_path / "orch.db.lock.json").read_text()) == {
        "kind": "soft",
        "why": "proven on nfs on /runs",
        "sqlite_locks": False,
    }
