"""Which file system a folder is on, and how far locks on it reach. Pure, but for `mount_here`: text in, values out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# nodes: between all that mount it. machine: between the processes of one node. unsure: by how its server or its
# configuration is set, which a mount does not show. nowhere: a lock fails, or is none.
Reach = Literal["nodes", "machine", "unsure", "nowhere"]

# Of one machine: its kernel keeps the locks, and no other node sees the files.
LOCAL = (
    "aufs", "bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "ramfs", "reiserfs", "tmpfs", "xfs",
    "zfs",
)  # fmt: skip
# Shared, with flock kept by the servers.
COHERENT = {
    "ceph": "CephFS",
    "fuse.ceph-fuse": "CephFS",
    "gfs2": "GFS2",
    "ocfs2": "OCFS2",
    "fuse.glusterfs": "GlusterFS",
}
# Files that are objects in a store, or of a server that has no locks; hard links are missing or not exclusive.
LOCKLESS = (
    "fuse.gcsfuse", "fuse.goofys", "fuse.rclone", "fuse.s3fs", "fuse.mount-s3", "fuse.sshfs", "fuse.blobfuse2", "pvfs2",
    "orangefs",
)  # fmt: skip
# Options of 9p under which a node remembers a folder's names without asking the server again.
LOOSE_9P = ("cache=loose", "cache=fscache", "cache=mmap", "cache=readahead")

POSTGRES = 'set "database" to a PostgreSQL URL, which needs no locks of files'
ELSEWHERE = f"put the runs on another file system (--runs-dir), or {POSTGRES}"
PROVE = "`orch doctor --two-node` shows whether they hold between nodes"


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of /proc/self/mountinfo."""

    point: str
    fstype: str
    source: str
    options: tuple[str, ...]  # of the mount and of the file system

    def __str__(self) -> str:
        return f"{self.fstype} on {self.point}"


@dataclass(frozen=True, slots=True)
class LockFacts:
    """What is known of locks on a file system."""

    flock: Reach
    links: bool  # is a hard link made once only, and seen by every node at once? The soft lock is made of them
    what: str
    do: str = ""  # what a user can do; empty: there is nothing to do
    local: bool = False  # no other node sees the files


def mount_here(path: Path) -> Mount | None:
    """The mount that a folder is on; None where this kernel does not say."""
    try:
        text = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None  # not Linux
    return mount_of(text, str(path))


def mount_of(mountinfo: str, path: str) -> Mount | None:
    """The mount that an absolute path without symbolic links is on: of the mount points above it the longest,
    and of several at one point the last, for it hides the others. None if no line fits."""
    found: Mount | None = None
    for line in mountinfo.split("\n"):  # the kernel escapes space, tab, newline and backslash, and no other separator
        mount = _mount(line)
        if mount is None or not _is_under(path, mount.point):
            continue
        if found is None or len(mount.point) >= len(found.point):
            found = mount
    return found


def _mount(line: str) -> Mount | None:
    """ID PARENT MAJOR:MINOR ROOT POINT OPTIONS [FIELD...] - TYPE SOURCE OPTIONS; see proc(5)."""
    left, separator, right = line.partition(" - ")
    before, after = left.split(" "), right.split(" ")  # the source may be empty
    if not separator or len(before) < 6 or len(after) < 3:
        return None
    options = dict.fromkeys(f"{before[5]},{after[2]}".split(","))
    return Mount(_unescaped(before[4]), after[0], _unescaped(after[1]), tuple(name for name in options if name))


def _unescaped(text: str) -> str:
    r"""The kernel writes a space as \040, and so a tab, a newline, a backslash and #. Names are bytes."""
    raw = re.sub(
        rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8) & 255]), text.encode("utf-8", "surrogateescape")
    )
    return raw.decode("utf-8", "surrogateescape")


def _is_under(path: str, point: str) -> bool:
    return point == "/" or path == point or path.startswith(point + "/")


def is_local(fstype: str) -> bool:
    return fstype in LOCAL


def lock_facts(fstype: str, options: Sequence[str]) -> LockFacts:
    """How far locks reach on a file system.

    fstype and options: as in /proc/self/mountinfo. What a mount says of itself is no proof: `locking.proof` tries it on
    this machine, the doctor's two-node test between two.
    """
    if is_local(fstype):
        what = f"{fstype} is a local file system: its locks hold between processes of one machine"
        do = "fine for one machine; the nodes of a cluster need a folder that they share"
        return LockFacts("machine", True, what, do, local=True)
    if fstype in ("nfs", "nfs4"):
        return _nfs(fstype, options)
    if fstype == "lustre":
        return _lustre(options)
    if fstype in COHERENT:
        return LockFacts("nodes", True, f"{COHERENT[fstype]} keeps flock on its servers: it holds between nodes")
    if fstype == "gpfs":
        what = "GPFS keeps locks by its token manager, across nodes"
        return LockFacts("nodes", True, what, f"nothing, unless locks are slow or lost: {PROVE}")
    if fstype in ("beegfs", "fhgfs"):
        what = "BeeGFS checks locks between nodes only with tuneUseGlobalFileLocks=true, and false is its default"
        do = f"`grep -h tuneUseGlobalFileLocks /proc/fs/beegfs/*/config`; if it is 0 or false, {ELSEWHERE}. {PROVE}"
        return LockFacts("unsure", True, what, do)
    if fstype in ("cifs", "smb3", "smb2"):
        return _cifs(fstype, options)
    if fstype == "afs":
        what = "AFS: whether locks hold between nodes depends on its flock= mode, and with local they do not"
        return LockFacts("unsure", True, what, f"{ELSEWHERE}. {PROVE}")
    if fstype == "9p":
        what = "9p: whether locks hold between machines depends on its server"
        loose = any(option in LOOSE_9P for option in options)
        return LockFacts("unsure", not loose, what, f"{PROVE}; if not, {ELSEWHERE}")
    if fstype in LOCKLESS:
        return LockFacts("nowhere", False, f"{fstype} has no locks that hold between nodes", ELSEWHERE)
    what = f"{fstype} is a file system that orch does not know: whether its locks hold between nodes is open"
    return LockFacts("unsure", True, what, f"{PROVE}; if not, {ELSEWHERE}")


def _nfs(fstype: str, options: Sequence[str]) -> LockFacts:
    named = dict(option.split("=", 1) for option in options if "=" in option)
    version = named.get("vers") or named.get("nfsvers") or ("4" if fstype == "nfs4" else "3")
    local = named.get("local_lock", "none")
    if "nolock" in options or local in ("all", "flock"):
        option = "nolock" if "nolock" in options else f"local_lock={local}"
        what = f"NFS {version} is mounted with {option}: locks hold on one node only, and two nodes would both write"
        return LockFacts("machine", True, what, f"{ELSEWHERE}; or ask for a mount without {option}")
    if version.startswith("4"):
        return LockFacts("nodes", True, f"NFS {version}: locks are kept by the server and hold between nodes")
    what = f"NFS {version} keeps locks by a service of its own (lockd), on the server and on every node"
    do = f"{PROVE}; if they hang or fail with ENOLCK, {POSTGRES} or mount it with vers=4"
    return LockFacts("nodes", True, what, do)


def _lustre(options: Sequence[str]) -> LockFacts:
    if "localflock" in options:
        what = "Lustre is mounted with localflock: locks hold on one node only, and two nodes would both write"
        return LockFacts("machine", True, what, f"{POSTGRES}; or ask for a mount with flock")
    if "noflock" in options:
        what = "Lustre is mounted with noflock: every lock fails"
        return LockFacts("nowhere", True, what, f"{POSTGRES}; or ask for a mount with flock")
    if "flock" in options:
        return LockFacts("nodes", True, "Lustre is mounted with flock: locks hold between nodes")
    what = "Lustre shows no flock option; without it, older clients refuse every lock"
    return LockFacts("unsure", True, what, f"{PROVE}; if not, {POSTGRES}, or ask for a mount with flock")


def _cifs(fstype: str, options: Sequence[str]) -> LockFacts:
    if "nobrl" in options or "nolock" in options:
        what = f"{fstype} is mounted with nobrl: locks hold on one node only, and two nodes would both write"
        return LockFacts("machine", False, what, ELSEWHERE)
    what = f"{fstype}: whether locks hold between nodes depends on its server"
    return LockFacts("unsure", False, what, f"{PROVE}; if not, {ELSEWHERE}")
