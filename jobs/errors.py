"""The error that jobs raise to show the user a message."""

from __future__ import annotations

import errno

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)  # the disk or the user's quota has no room


class JobError(Exception):
    """The job can't be used as it is. The message says what is wrong or missing and how to fix it."""
