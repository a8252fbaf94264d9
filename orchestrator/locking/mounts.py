"""Find out which file system a folder is on, and where its locks work. Pure except for `mount_here`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

# Where a lock works. nodes: between all nodes that mount the file system. machine: only between the processes of one
# node. unsure: this depends on the server or its configuration, which the mount does not show. nowhere: locks fail or
# have no effect.
Reach = Literal["nodes", "machine", "unsure", "nowhere"]

# Local file systems: the kernel manages the locks, and no other node sees the files.
LOCAL = (
    "aufs", "bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "ramfs", "reiserfs", "tmpfs", "xfs",
    "zfs",
)  # fmt: skip
# Shared file systems whose servers manage flock.
COHERENT = {
    "ceph": "CephFS", "fuse.ceph-fuse": "CephFS", "gfs2": "GFS2", "ocfs2": "OCFS2", "fuse.glusterfs": "GlusterFS",
}  # fmt: skip
SMB = ("cifs", "smb3", "smb2")
# Object stores, and servers without locks. They have no hard links, or let two processes create the same hard link.
LOCKLESS = (
    "fuse.gcsfuse", "fuse.goofys", "fuse.rclone", "fuse.s3fs", "fuse.mount-s3", "fuse.sshfs", "fuse.blobfuse2", "pvfs2",
    "orangefs",
)  # fmt: skip
# Mount options of 9p that let a node cache the names in a folder.
LOOSE_9P = ("cache=loose", "cache=fscache", "cache=mmap", "cache=readahead")

POSTGRES = 'set "database" to a PostgreSQL URL, which needs no file locks'
ELSEWHERE = f"put the runs on another file system (--runs-dir), or {POSTGRES}"
PROVE = "`orch doctor --two-node` shows whether they work between nodes"


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of /proc/self/mountinfo."""

    point: str
    fstype: str
    source: str
    options: tuple[str, ...]  # the options of the mount, then those of the file system

    def __str__(self) -> str:
        return f"{self.fstype} on {self.point}"


@dataclass(frozen=True, slots=True)
class LockFacts:
    """What is known about the locks of a file system."""

    flock: Reach
    links: bool  # for the soft lock: can only one process create a given hard link, and do all nodes see it at once?
    what: str
    do: str = ""  # what the user should do, if anything
    local: bool = False  # True: no other node sees the files


def mount_here(path: Path) -> Mount | None:
    """Return the mount that a folder is on; None if the kernel does not show mounts."""
    try:
        text = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None  # not Linux
    return mount_of(text, str(path))


def mount_of(mountinfo: str, path: str) -> Mount | None:
    """Return the mount that `path` is on: the one with the longest mount point above path; None if there is none. Of
    several mounts at one point, the last hides the others. path: must be absolute and without symbolic links."""
    mounts = map(_mount, mountinfo.split("\n"))  # splitlines also splits at other characters, which are not escaped
    above = [mount for mount in mounts if mount and PurePosixPath(path).is_relative_to(mount.point)]
    return max(reversed(above), key=lambda mount: len(mount.point), default=None)


def _mount(line: str) -> Mount | None:
    """Parse a line: ID PARENT MAJOR:MINOR ROOT POINT OPTIONS [FIELD...] - TYPE SOURCE OPTIONS; see proc(5)."""
    left, separator, right = line.partition(" - ")
    before, after = left.split(" "), right.split(" ")  # split() would lose an empty source
    if not separator or len(before) < 6 or len(after) < 3:
        return None
    options = dict.fromkeys(f"{before[5]},{after[2]}".split(","))
    return Mount(_unescaped(before[4]), after[0], _unescaped(after[1]), tuple(name for name in options if name))


def _unescaped(text: str) -> str:
    r"""Replace the kernel's octal escapes: \040 is a space; tab, newline, backslash and # are escaped too."""
    raw = text.encode("utf-8", "surrogateescape")
    raw = re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8) & 255]), raw)
    return raw.decode("utf-8", "surrogateescape")


def lock_facts(fstype: str, options: Sequence[str]) -> LockFacts:
    """Return what is known about the locks of a file system. fstype and options: as in /proc/self/mountinfo.

    This does not prove that the locks work: `locking.proof` tests them on this machine, and the doctor's two-node test
    tests them between two nodes.
    """
    if fstype in LOCAL:
        what = f"{fstype} is a local file system: its locks work between processes of one machine"
        do = "fine for one machine; on a cluster, use a folder that all nodes share"
        return LockFacts("machine", True, what, do, local=True)
    if fstype in ("nfs", "nfs4"):
        return _nfs(fstype, options)
    if fstype == "lustre":
        return _lustre(options)
    if fstype in COHERENT:
        return LockFacts("nodes", True, f"{COHERENT[fstype]} handles flock on its servers, so locks work between nodes")
    if fstype == "gpfs":
        what = "GPFS has a token manager, which makes locks work between nodes"
        return LockFacts("nodes", True, what, f"nothing, unless locks are slow or lost: {PROVE}")
    if fstype in LOCKLESS:
        return LockFacts("nowhere", False, f"{fstype} has no locks that work between nodes", ELSEWHERE)
    if fstype in SMB and ("nobrl" in options or "nolock" in options):
        what = f"{fstype} is mounted with nobrl: locks work on one node only, so two nodes could write at once"
        return LockFacts("machine", False, what, ELSEWHERE)
    if fstype in ("beegfs", "fhgfs"):
        what = "BeeGFS locks work between nodes only with tuneUseGlobalFileLocks=true, and the default is false"
        do = f"`grep -h tuneUseGlobalFileLocks /proc/fs/beegfs/*/config`; if it is 0 or false, {ELSEWHERE}. {PROVE}"
        return LockFacts("unsure", True, what, do)
    what, links = {
        **dict.fromkeys(SMB, (f"{fstype}: whether locks work between nodes depends on its server", False)),
        "afs": ("AFS: whether locks work between nodes depends on its flock= mode; with flock=local they do not", True),
        "9p": ("9p: whether locks work between machines depends on its server", not set(LOOSE_9P) & set(options)),
    }.get(fstype, (f"orch does not know the file system {fstype}: its locks may not work between nodes", True))
    return LockFacts("unsure", links, what, f"{PROVE}; if not, {ELSEWHERE}")


def _nfs(fstype: str, options: Sequence[str]) -> LockFacts:
    named = dict(option.split("=", 1) for option in options if "=" in option)
    version = named.get("vers") or named.get("nfsvers") or ("4" if fstype == "nfs4" else "3")
    local = named.get("local_lock", "none")
    if "nolock" in options or local in ("all", "flock"):
        option = "nolock" if "nolock" in options else f"local_lock={local}"
        what = f"NFS {version} is mounted with {option}: locks work on one node only, so two nodes could write at once"
        return LockFacts("machine", True, what, f"{ELSEWHERE}; or ask for a mount without {option}")
    if version.startswith("4"):
        return LockFacts("nodes", True, f"NFS {version}: the server manages locks, so they work between nodes")
    what = f"NFS {version} needs a separate service for locks (lockd), on the server and on every node"
    do = f"{PROVE}; if they hang or fail with ENOLCK, {POSTGRES}, or ask for a mount with vers=4"
    return LockFacts("nodes", True, what, do)


def _lustre(options: Sequence[str]) -> LockFacts:
    if "localflock" in options:
        what = "Lustre is mounted with localflock: locks work on one node only, so two nodes could write at once"
        return LockFacts("machine", True, what, f"{POSTGRES}; or ask for a mount with flock")
    if "noflock" in options:
        what = "Lustre is mounted with noflock: every lock fails"
        return LockFacts("nowhere", True, what, f"{POSTGRES}; or ask for a mount with flock")
    if "flock" in options:
        return LockFacts("nodes", True, "Lustre is mounted with flock: locks work between nodes")
    what = "Lustre is mounted with no flock option, and older clients then refuse every lock"
    return LockFacts("unsure", True, what, f"{PROVE}; if not, {POSTGRES}, or ask for a mount with flock")
