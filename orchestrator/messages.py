"""How numbers, times and values are written for people. Text in, text out."""

from __future__ import annotations

from datetime import UTC, datetime


def counted(count: int, one: str, many: str | None = None) -> str:
    """A number with its noun: 1 epoch, 2 epochs."""
    return f"{count} {one if count == 1 else many or f'{one}s'}"


def iso(at: float | None) -> str | None:
    """A Unix time as ISO 8601 in UTC, to the second."""
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
