"""The error that jobs raise to show the user a message."""

from __future__ import annotations


class JobError(Exception):
    """The job can't be used as it is. The message says what is wrong or missing and how to fix it."""
