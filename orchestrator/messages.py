"""How numbers, times and values are written for people. Text in, text out."""

from __future__ import annotations

import re
from datetime import UTC, datetime

_PASSWORD = re.compile(r"(://[^\s/:@\"']*):[^\s\"']*|(password=)[^\s&\"']*", re.IGNORECASE)
_NOT_PRINTED = re.compile("[\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]")


def counted(count: int, one: str, many: str | None = None) -> str:
    """A number with its noun: 1 epoch, 2 epochs."""
    return f"{count} {one if count == 1 else many or f'{one}s'}"


def iso(at: float | None) -> str | None:
    """A Unix time as ISO 8601 in UTC, to the second."""
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")


def shown(text: str, limit: int = 80) -> str:
    """For a message: in one line, not too long, and without the password of a URL."""
    text = _PASSWORD.sub(lambda found: f"{found[1]}:***" if found[1] is not None else f"{found[2]}***", text)
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    return text if text.isprintable() else ascii(text)[1:-1]


def one_line(text: str, allowed: str = "") -> str:
    """The text itself. Raises ValueError where it is not one line of characters that every file can hold."""
    found = [c for c in _NOT_PRINTED.findall(text) if c not in allowed]
    if found:
        raise ValueError(
            f"it holds the character {found[0]!r}; allowed is one line of text, without control characters"
        )
    return text
