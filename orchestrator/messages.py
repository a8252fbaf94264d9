"""Format numbers, times and values for messages."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime

_PASSWORD = re.compile(r"(://[^\s/:@\"']*):[^\s\"']*|(password=)[^\s&\"']*", re.IGNORECASE)
_NOT_PRINTED = re.compile("[\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]")
GB = 1e9


def counted(count: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun: 1 epoch, 2 epochs."""
    return f"{count} {one if count == 1 else many or f'{one}s'}"


def gb(size_bytes: float) -> str:
    """Format bytes as GB with three significant digits. Rounds up, so that a disk of the shown size is large enough."""
    if size_bytes <= 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(size_bytes / GB)))
    return f"{math.ceil(size_bytes / GB * 10**digits) / 10**digits:.{digits}f}"


def iso(at: float | None) -> str | None:
    """Format a Unix time as ISO 8601 in UTC, to the second."""
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")


def shown(text: str, limit: int = 80) -> str:
    """Prepare text for a message: one line, at most `limit` characters, without the password of a URL."""
    text = _PASSWORD.sub(lambda match: f"{match[1]}:***" if match[1] is not None else f"{match[2]}***", text)
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    return text if text.isprintable() else ascii(text)[1:-1]


def described(error: BaseException) -> str:
    """Return the class and the text of any error, as text that every database can store."""
    try:
        text = str(error)
    except Exception:  # a class of the user may have a broken __str__
        text = ""
    text = text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "backslashreplace").decode()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def one_line(text: str, allowed: str = "") -> str:
    """Return the text. Raises ValueError if it has a line break, control or unencodable character not in `allowed`."""
    for character in _NOT_PRINTED.findall(text):
        if character not in allowed:
            raise ValueError(
                f"it holds the character {character!r}; only one line of text without control characters is allowed"
            )
    return text
