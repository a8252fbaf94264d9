"""The one error of the job side that is meant for the user."""

from __future__ import annotations


class JobError(Exception):
    """The job lacks something that it needs; the message says what and where to get it."""
