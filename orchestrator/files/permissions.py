"""Permissions of a run's files. They matter because the run's folder contains code: jobs are pickles, and the settings
name modules to import.

Regardless of the umask, only the run's user has access to the folder (mode 0700) and its files (0600). With the setting
"group", the members of that group have access too (2770, 0660). orch refuses to open a run if every user can write the
run's folder or an untrusted user owns it.
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

PRIVATE, SHARED = 0o700, 0o2770  # modes of the run folder; in a shared one, new files get the folder's group
PRIVATE_UMASK, SHARED_UMASK = 0o077, 0o007
_umask_at_start: int | None = None  # this process's original umask, set when `use_umask` changes it


def group_id(name: str) -> int:
    """Return a group's number. Raises SettingsError if the group does not exist or this process is not in it."""
    try:
        gid = grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):  # ValueError: not a valid name
        raise SettingsError(f"group: there is no group {name!r} on this machine; yours are {_own_groups()}") from None
    if os.geteuid() != 0 and gid not in _own_group_ids():
        raise SettingsError(
            f"group: you are not in the group {name!r}; yours are {_own_groups()} (a new membership takes effect at "
            "the next login)"
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
    """Return a user's name, or the user's number if there is no name for it."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


# --- making


def make_folder(folder: Path, group: str | None) -> None:
    """Create the folder of a run. Missing parent folders are created with the user's own umask.

    Raises SettingsError for an unusable group, RunError if the file system ignores permissions, or OSError.
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
    """Inside the block, give new files of this process and its children the permissions of the run."""
    return _umask(_umask_of(folder))


def use_umask(folder: Path) -> None:
    """Do the same as `files_of` for the rest of this process. Call this only in a process that works for one run."""
    global _umask_at_start
    before = os.umask(_umask_of(folder))
    if _umask_at_start is None:
        _umask_at_start = before


def users_umask() -> AbstractContextManager[None]:
    """Inside the block, use the umask that this process was started with. For files outside runs, such as exports."""
    return nullcontext() if _umask_at_start is None else _umask(_umask_at_start)


# --- opening


def owner(folder: Path) -> str | None:
    """Return the name of the user who owns the run's folder; None if this process runs as that user."""
    uid = folder.stat().st_uid
    return None if uid == os.geteuid() else user_name(uid)


def check_permissions(folder: Path, *others: Path) -> None:
    """Check that no untrusted user can write the run's folder or a file that determines which code is executed.

    others: files of the run in other folders. Missing files are skipped. Raises RunError, which says what to do.
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
                f"changed them, then run: chmod -R o-w {folder}. (If chmod has no effect, the file system keeps no "
                "permissions: choose another --runs-dir.)"
            )
        if status.st_uid not in (os.geteuid(), 0) and status.st_gid != trusted_group:
            other, me = user_name(status.st_uid), user_name(os.geteuid())
            raise RunError(
                f"{path} belongs to {other}, and orch would execute its contents as {me}. Let {other} run orch, or "
                'launch the run with "group" set to a group that both of you are in. If the files should be yours, '
                f"run: chown -R {me} {folder}"
            )


def _declared_group(folder: Path) -> int | None:
    """Return the group named in the run's settings, if this process is in the group and the group owns the folder."""
    try:
        status = folder.stat()
        name = json.loads((folder / SETTINGS_NAME).read_bytes()).get("group")
        gid = grp.getgrnam(name).gr_gid if isinstance(name, str) else None
    except (OSError, ValueError, AttributeError, KeyError, RecursionError):
        return None
    member = os.geteuid() == 0 or gid in _own_group_ids()
    return gid if gid == status.st_gid and member and _is_shared(folder) else None
