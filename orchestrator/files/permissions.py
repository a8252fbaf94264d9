"""Who may write to a run. Files in its folder are executed: jobs are pickles, and the settings name modules to import.

Only its user can use a run's folder (0700, files 0600), or with "group" also that group (2770, 0660), whatever the
umask is. A folder that every user may write, or that belongs to a user who is not trusted, is not opened.
"""

from __future__ import annotations

import grp
import json
import os
import pwd
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from orchestrator.errors import RunError, SettingsError
from orchestrator.files.run_folder import PARTS, SETTINGS_NAME

PRIVATE, SHARED = 0o700, 0o2770  # of the run folder; setgid: new files in it belong to its group
PRIVATE_UMASK, SHARED_UMASK = 0o077, 0o007
_umask_at_start: int | None = None  # of this process, set once `use_umask` has changed it


def group_id(name: str) -> int:
    """Raises SettingsError if this machine has no such group, or this process is not in it."""
    try:
        gid = grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):  # ValueError: not a possible name
        raise SettingsError(f"group: there is no group {name!r} on this machine; yours are {_own_groups()}") from None
    if os.geteuid() != 0 and gid not in _own_group_ids():
        raise SettingsError(
            f"group: you are not in the group {name!r}; yours are {_own_groups()} (a new membership counts from the "
            "next login)"
        )
    return gid


def _own_groups() -> str:
    names = []
    for gid in sorted(_own_group_ids()):
        try:
            names.append(grp.getgrgid(gid).gr_name)
        except KeyError:
            names.append(str(gid))
    return ", ".join(names)


def _own_group_ids() -> set[int]:
    return {os.getegid(), *os.getgroups()}


def user_name(uid: int) -> str:
    """The number if the user has no name."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


# --- making


def make_folder(folder: Path, group: str | None) -> None:
    """Make the folder of a run. The folders above it get the user's own umask.

    Raises SettingsError for a group that can't be used, RunError where the file system keeps no permissions, OSError.
    """
    gid = group_id(group) if group is not None else -1
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(PRIVATE)
    if group is not None:
        os.chown(folder, -1, gid)
    folder.chmod(SHARED if group is not None else PRIVATE)
    check_permissions(folder)


def _is_shared(folder: Path) -> bool:
    try:
        mode = folder.stat().st_mode
    except OSError:
        return False
    return bool(mode & stat.S_ISGID and mode & stat.S_IWGRP)


def _umask_of(folder: Path) -> int:
    return SHARED_UMASK if _is_shared(folder) else PRIVATE_UMASK


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def files_of(folder: Path) -> AbstractContextManager[None]:
    """Files that this process and its children make inside the block get the permissions of this run."""
    return _umask(_umask_of(folder))


def use_umask(folder: Path) -> None:
    """As `files_of`, for the rest of this process, which works only for this run."""
    global _umask_at_start
    before = os.umask(_umask_of(folder))
    if _umask_at_start is None:
        _umask_at_start = before


def users_umask() -> AbstractContextManager[None]:
    """For files outside of runs, such as exported models: the umask that this process was started with."""
    return nullcontext() if _umask_at_start is None else _umask(_umask_at_start)


# --- opening


def owner(folder: Path) -> str | None:
    """The user that a run's jobs belong to; None: this process's own user."""
    uid = folder.stat().st_uid
    return None if uid == os.geteuid() else user_name(uid)


def check_permissions(folder: Path, *others: Path) -> None:
    """Check that no untrusted user can write the run's folder, or a file that is executed or that names what is.

    others: files of the run in other places. Missing files are skipped. Raises RunError, which says what to do.
    """
    trusted_group = _declared_group(folder)
    for path in (folder, *(folder / part for part in PARTS), *others):
        try:
            status = path.stat()
        except OSError:
            continue  # missing or not readable: the code that needs it reports it
        if status.st_mode & stat.S_IWOTH:
            raise RunError(
                f"{path} can be written by everybody, and orch executes files in a run's folder. Check that nobody has "
                f"changed them, then: chmod -R o-w {folder}. (If chmod changes nothing, the file system keeps no "
                "permissions: choose another --runs-dir.)"
            )
        if status.st_uid not in (os.geteuid(), 0) and status.st_gid != trusted_group:
            other, me = user_name(status.st_uid), user_name(os.geteuid())
            raise RunError(
                f"{path} belongs to {other}, and orch would execute what is in it as {me}. Let {other} run orch, or "
                'launch the run with "group" set to a group that both of you are in. If the files should be yours: '
                f"chown -R {me} {folder}"
            )


def _declared_group(folder: Path) -> int | None:
    """The group that a run was launched for, if this process is in it and the folder belongs to it."""
    try:
        status = folder.stat()
        name = json.loads((folder / SETTINGS_NAME).read_bytes()).get("group")
        gid = grp.getgrnam(name).gr_gid if isinstance(name, str) else None
    except (OSError, ValueError, AttributeError, KeyError, RecursionError):
        return None
    member = os.geteuid() == 0 or gid in _own_group_ids()
    return gid if gid == status.st_gid and member and _is_shared(folder) else None
