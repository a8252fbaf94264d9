"""What `orchestrator.locking.mounts` knows of a file system's locks, as a finding; and its quota."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.doctor.findings import Finding, Level
from orchestrator.locking.mounts import ELSEWHERE, LockFacts, Mount, is_local, lock_facts, mount_here, mount_of

__all__ = ["ELSEWHERE", "Mount", "is_local", "lock_advice", "mount_here", "mount_of", "quota_command"]

TOPIC = "locks"
QUOTA = {
    "lustre": "lfs quota -hu $USER {point}", "gpfs": "mmlsquota --block-size auto",
    "beegfs": "beegfs-ctl --getquota --uid $USER", "nfs": "quota -s", "nfs4": "quota -s",
    "ceph": "getfattr -n ceph.quota.max_bytes {point}",
}  # fmt: skip


def lock_advice(fstype: str, options: Sequence[str]) -> Finding:
    """Whether flock, which the lock around SQLite uses where it can, holds between the nodes that mount this.

    fstype and options: as in /proc/self/mountinfo.
    """
    facts = lock_facts(fstype, options)
    return Finding(_level(facts), TOPIC, facts.what, facts.do)


def _level(facts: LockFacts) -> Level:
    if facts.local:
        return "note"
    if facts.flock == "nodes":
        return "note" if facts.do else "ok"
    return "warning" if facts.flock == "unsure" else "error"


def quota_command(mount: Mount) -> str | None:
    """Says how much of a quota is left, which free space does not; None where nothing is known."""
    command = QUOTA.get(mount.fstype)
    return command.format(point=mount.point) if command else None
