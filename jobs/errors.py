"""The error of the job side whose message is for the user."""

from __future__ import annotations


class JobError(Exception):
    """The job can't be used as it is. The message says what is wrong or missing and what to do about it."""
