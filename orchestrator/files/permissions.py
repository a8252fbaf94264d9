"""Who may write to a run. What is in its folder is executed: jobs are pickles, the settings name a module to import.

A run's folder is its user's alone (0700, files 0600), or with "group" that group's too (2770, 0660), whatever the
umask. A folder that anybody may write, or of a user who is not trusted, is not opened.
"""

from __future__ import annotations

import grp
import json
import os
import pwd
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.errors import RunError, SettingsError
from orchestrator.files.run_folder import PARTS, SETTINGS_NAME

PRIVATE, SHARED = 0o700, 0o2770  # of the run folder; setgid: what is made in it belongs to its group
PRIVATE_UMASK, SHARED_UMASK = 0o077, 0o007
_users: list[int] = []  # the umask that this process was started with, once it is changed for good


def group_id(name: str) -> int:
    """Raises SettingsError if there is no such group here, or this process is not in it."""
    try:
        gid = grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):  # ValueError: what no name can be
        raise SettingsError(f"group: there is no group {name!r} on this machine; yours are {_own_groups()}") from None
    if os.geteuid() != 0 and gid not in (os.getegid(), *os.getgroups()):
        raise SettingsError(
            f"group: you are not in the group {name!r}; yours are {_own_groups()} (a new membership counts from the "
            "next login)"
        )
    return gid


def _own_groups() -> str:
    names = []
    for gid in sorted({os.getegid(), *os.getgroups()}):
        try:
            names.append(grp.getgrgid(gid).gr_name)
        except KeyError:
            names.append(str(gid))
    return ", ".join(names)


def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


# --- making


def make_folder(folder: Path, group: str | None) -> None:
    """Make the folder of a run; the folders above it with the user's own umask.

    Raises SettingsError for a group that can't be used, RunError where the file system keeps no rights, OSError.
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


@contextmanager
def files_of(folder: Path) -> Iterator[None]:
    """Files made inside the block, by this process and by those that it starts, have the rights of this run."""
    before = os.umask(SHARED_UMASK if _is_shared(folder) else PRIVATE_UMASK)
    try:
        yield
    finally:
        os.umask(before)


def use_umask(folder: Path) -> None:
    """As `files_of`, for the rest of this process: it works for this run."""
    before = os.umask(SHARED_UMASK if _is_shared(folder) else PRIVATE_UMASK)
    if not _users:
        _users.append(before)


@contextmanager
def users_umask() -> Iterator[None]:
    """For files that the user asked for, outside of runs."""
    before = os.umask(_users[0]) if _users else None
    try:
        yield
    finally:
        if before is not None:
            os.umask(before)


# --- opening


def owner(folder: Path) -> str | None:
    """The user whose jobs a run's are; None: this process's own."""
    uid = folder.stat().st_uid
    return None if uid == os.geteuid() else user_name(uid)


def check_permissions(folder: Path, *others: Path) -> None:
    """Is this run's folder, and what in it is executed or says what is, safe from strangers? others: files of the
    run elsewhere. What is not there is not looked at.

    Raises RunError, which says how to mend it.
    """
    trusted_group = _declared_group(folder)
    for path in (folder, *(folder / part for part in PARTS), *others):
        try:
            found = path.stat()
        except OSError:
            continue  # not there, or not to be read: whoever needs it says so
        if found.st_mode & stat.S_IWOTH:
            raise RunError(
                f"{path} can be written by everybody, and orch executes what is in a run's folder. Look whether "
                f"anything was changed in it, then: chmod -R o-w {folder}. (Where chmod changes nothing, the file "
                "system keeps no rights: choose another --runs-dir.)"
            )
        if found.st_uid not in (os.geteuid(), 0) and found.st_gid != trusted_group:
            name = user_name(found.st_uid)
            raise RunError(
                f"{path} belongs to {name}, and orch would execute what is in it as {user_name(os.geteuid())}. Let "
                f'{name} run orch, or launch the run with "group" set to a group that both of you are in. If the files '
                f"should be yours: chown -R {user_name(os.geteuid())} {folder}"
            )


def _declared_group(folder: Path) -> int | None:
    """The group that a run was launched for, if this process is in it and the folder's rights say the same."""
    try:
        found = folder.stat()
        name = json.loads((folder / SETTINGS_NAME).read_bytes()).get("group")
        gid = grp.getgrnam(name).gr_gid if isinstance(name, str) else None
    except (OSError, ValueError, AttributeError, KeyError, RecursionError):
        return None
    mine = os.geteuid() == 0 or gid in (os.getegid(), *os.getgroups())
    return gid if gid == found.st_gid and mine and _is_shared(folder) else None
